"""Arguments and options that several commands have."""

import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import expertune

if TYPE_CHECKING:
    from expertune import RunRecord

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
    typer.Argument(metavar="SECTION.KEY=VALUE", help="Values to use instead of the run file's."),
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
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(metavar="T", help="Draw tokens by their probability at T; 0, the default, takes the likeliest."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        metavar="P",
        help="Draw from the likeliest tokens that add up to P, at temperature 1 by default; 1: all.",
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        metavar="K",
        help="Draw from the K likeliest tokens, at temperature 1 by default; 0: all.",
    ),
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Where T, P or K is given: draw as another command with this seed did.")
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="A system prompt, where the run's template has a place for one.")
]
Column = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=TEXT", help="A column that the template needs beside the prompt; may be repeated."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", callback=_silence_libraries, help="Show the notes and warnings of libraries too.")
]

TrustRewards = Annotated[
    bool,
    typer.Option("--trust-rewards", help="Run Python that the run file names as a reward; no file can ask for it."),
]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python that ships with the model; no file can ask for it.")
]


def require_adapter(run_dir: Path, adapter: str | None) -> "RunRecord":
    """The run's record; a wrong directory or adapter is told before any library is loaded."""
    record = expertune.RunRecord.load(run_dir)
    if adapter is not None:
        from expertune.run.directory import adapter_in

        adapter_in(run_dir, adapter)
    return record
