"""Execute the notebook from first cell to last, and keep the outputs in it and in its translation: `make notebook`.

Left out are times, bars that have gone, and what libraries write to stderr, which depends on the machine. The first
cell that raises an error ends it, and the file stays as it was.
"""

import os
import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "mixtral-qlora.ipynb"
TRANSLATION = NOTEBOOK.with_suffix(".zh-CN.ipynb")
RUN_DIR = ROOT / "runs" / "notebook"


def main() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    # Without ipywidgets, which the notebook does not need, tqdm warns.
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": NOTEBOOK.parent}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_left_out(output)]
    notebook.metadata["language_info"] = {"name": "python"}
    # A translation has other prose around the same cells of code.
    translated = nbformat.read(TRANSLATION, as_version=4)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            translated.cells[number] = cell
    for path, content in ((NOTEBOOK, notebook), (TRANSLATION, translated)):
        beside = path.with_suffix(".partial")
        nbformat.write(content, beside)
        beside.replace(path)


def _is_left_out(output: nbformat.NotebookNode) -> bool:
    return output.get("name") == "stderr" or output.get("data", {}).get("text/html") == ""


if __name__ == "__main__":
    main()
