"""llama.cpp's converters, run in a process of their own (`engines/gguf_converter.py`)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from expertune.errors import ExportError
from expertune.exporting.engines import gguf_converter
from expertune.exporting.programs import run_program
from expertune.exporting.source import ExportSource


@dataclass(frozen=True)
class Converted:
    """What came of one command line of a converter.

    Attributes:
        error: why it was refused; None where it was not.
        knows_tokenizer: llama.cpp splits text as the model's tokenizer does, as far as the converter can tell.
    """

    error: str | None
    knows_tokenizer: bool


def convert(runs: Sequence[Sequence[str]], source: ExportSource) -> list[Converted]:
    """Run command lines of llama.cpp's converters in one process of their own.

    Raises:
        ExportError: the process failed as a whole.
    """
    with TemporaryDirectory(prefix="expertune-gguf-") as scratch:
        request = {"runs": runs, "trust_remote_code": source.base.trust_remote_code}
        path = Path(scratch) / "request.json"
        run_program("gguf_converter.py", request, path, "llama.cpp's converter", source.num_weights)
        found = json.loads(path.with_name("converted.json").read_text(encoding="utf-8"))
    return [Converted(each["error"], gguf_converter.UNKNOWN_TOKENIZER not in each["notes"]) for each in found]


def require_converted(runs: Sequence[Sequence[str]], source: ExportSource) -> None:
    """Run command lines.

    Raises:
        ExportError: the converter refuses one of them.
    """
    for found in convert(runs, source):
        if found.error:
            raise ExportError(f"llama.cpp's converter: {found.error}")


def command_of_model(folder: Path, file: Path, kind: str, name: str) -> list[str]:
    """The command line that makes a GGUF file of a type, under a name, of a model's folder."""
    arguments = [str(folder), "--outfile", str(file), "--outtype", kind, "--model-name", name]
    return ["convert_hf_to_gguf.py", *arguments]
