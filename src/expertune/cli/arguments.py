"""Arguments and options that several commands have."""

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer

LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "lm_eval", "peft", "torch", "transformers")


def _silence_libraries(verbose: bool) -> bool:
    """Keep notes that libraries write for developers off the terminal; a user's own settings of theirs win."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not verbose:
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        for name in LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
        # What a user must know is an error or a line of ours; Python warnings are for developers.
        warnings.simplefilter("ignore")
    return verbose


RunFile = Annotated[Path, typer.Argument(metavar="RUN", help="A run file; or a run directory or its record.json.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values to use instead of the run file's."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run directory (an output_dir).")]
Adapter = Annotated[
    str | None,
    typer.Option(metavar="CHECKPOINT", help="An earlier state, e.g. checkpoint-50; the final adapter by default."),
]
BaseOnly = Annotated[bool, typer.Option("--base-only", help="Use the base model without the adapter.")]
BaseModel = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", help="Where the base model lies now; as in the run file by default."),
]
OtherBase = Annotated[
    bool,
    typer.Option(
        "--other-base", help="Continue although the model's weights are not those that the adapter was trained on."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", callback=_silence_libraries, help="Show the notes and warnings of libraries too.")
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python that ships with the model; no file can ask for it.")
]
