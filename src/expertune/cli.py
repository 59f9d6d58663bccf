"""The command line: thin commands over `expertune.api`.

Results go to stdout, everything else to stderr. Exit code 0 is success, 2 an error that the user can fix, 130 Ctrl-C;
a traceback means a bug. torch and transformers are imported by the command that needs them, so that `--help`, a typing
mistake or a bad run file answers at once.
"""

import contextlib
import logging
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import expertune
from expertune import RunRecord, load_config
from expertune.distributed.processes import launched, require_one_process
from expertune.errors import ConfigError, ExpertuneError
from expertune.exporting import FORMATS
from expertune.kernels.threads import prepare_threads
from expertune.run.directory import ADAPTER_FOLDER, after_interruption
from expertune.run.signals import Terminated
from expertune.storage import failure
from expertune.terminal import (
    converse,
    log,
    log_error,
    print_json,
    print_scores,
    print_table,
    print_tasks,
    stdout_for_results,
    writing,
)

_LIBRARIES = ("accelerate", "bitsandbytes", "datasets", "huggingface_hub", "lm_eval", "peft", "torch", "transformers")


class _Commands(typer.core.TyperGroup):
    """The commands, which turn an error that a user can fix into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        with warnings.catch_warnings():  # `_silence_libraries` is undone where a program runs a command in-process
            try:
                return super().invoke(ctx)
            except ExpertuneError as error:
                log_error(error)
                raise typer.Exit(2) from None
            except OSError as error:
                # A failed read or write is the user's to fix; a closed pipe is handled by `main`.
                if (reason := failure(error)) is None:
                    raise
                log(f"expertune: error: {reason}")
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                log("expertune: interrupted")
                raise typer.Exit(130) from None


app = typer.Typer(
    name="expertune",
    cls=_Commands,
    help="Fine-tune mixture-of-experts language models whose experts are frozen in 4 bits (QLoRA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script `expertune`.

    Raises:
        SystemExit: always, with the exit code.
    """
    prepare_threads()  # before the command imports torch
    try:
        try:
            app(prog_name="expertune")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader has gone (`| head`). Python would fail once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"expertune {expertune.__version__}")
        raise typer.Exit


def _silence_libraries(verbose: bool) -> bool:
    """Keep notes that libraries write for developers off the terminal; a user's own settings of theirs win."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not verbose:
        for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        for name in _LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
        # What a user must know is an error or a line of ours; Python warnings are for developers.
        warnings.simplefilter("ignore")
    return verbose


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


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


@app.command()
def plan(
    run: RunFile,
    overrides: Overrides = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to plan for, e.g. 24GB, above memory_budget.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="A GPU to plan for without having it, e.g. rtx-4090.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many devices to plan for: what each holds and sends."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run needs, tensor by tensor, whether it fits, and how long a step takes. Loads no weights.

    Exit code 2 where it does not fit.
    """
    config = load_config(run, overrides or (), starts=False)
    with stdout_for_results():
        made = expertune.plan(config, gpu=gpu, memory=memory, devices=devices, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(made.to_json())
    else:
        print_table(made.render())
    if not made.fits:
        # The table above has all of it; a second one in the error would only push it off the screen.
        log(f"expertune: error: {made.model} does not fit; see what to give up above")
        raise typer.Exit(2)


@app.command()
def data(
    run: RunFile,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=0, help="How many examples of each source to show.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run would be trained on: layout, template, columns, and examples with their trained part marked.

    Checks every example as a run does. Needs the model's tokenizer alone; loads no weights and writes nothing.
    """
    config = load_config(run, overrides or (), starts=False)
    with stdout_for_results():
        from expertune.data.preview import preview_run
        from expertune.report.preview import render_preview

        shown = preview_run(config, examples, trust_remote_code)
    if as_json:
        print_json(shown)
        return
    for part, preview in shown.items():
        if preview:
            print_table(render_preview(part, preview, max_chars=4000))


@app.command()
def train(
    run: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune as the run file says, or as the run of a record was. Prints the run directory."""
    config = load_config(run, overrides or (), resume)
    try:
        with stdout_for_results():
            from rich.console import Console

            console = Console(stderr=True, soft_wrap=True)
            finished = expertune.finetune(config, resume=resume, console=console, trust_remote_code=trust_remote_code)
    except (KeyboardInterrupt, Terminated) as stop:
        options = ["--trust-remote-code"] if trust_remote_code else []
        command = shlex.join(["expertune", "train", str(run), *(overrides or ()), *options])
        count = launched().world_size
        as_before = f"in {count} processes as before, " if count > 1 else ""
        goes_on = after_interruption(Path(config.output_dir), command)
        log_error(stop, f"{str(stop) or 'interrupted'}; {as_before}{goes_on}")
        raise typer.Exit(stop.exit_code if isinstance(stop, Terminated) else 130) from None
    finished.context.ranks.on_main(lambda: print(finished.output_dir))


@app.command()
def evaluate(
    run_dir: RunDir,
    adapter: Adapter = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Examples to answer for the task's metric, or of each of TASKS.")
    ] = None,
    base_only: BaseOnly = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK[,TASK]", help="Tasks of lm-evaluation-harness to score instead, such as viggo."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with task files of your own.")
    ] = None,
    task_code: Annotated[bool, typer.Option("--task-code", help="Run the Python that task files of DIR name.")] = False,
    download: Annotated[bool, typer.Option("--download", help="Fetch what a task needs from the hub.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    model: BaseModel = None,
    other_base: OtherBase = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Score a run on its evaluation examples: the loss, and the task's metric where it has one.

    With --tasks, score tasks of lm-evaluation-harness with the adapter and without it; the record keeps the scores.
    """
    require_one_process()
    RunRecord.load(run_dir)
    of_tasks: dict[str, Any] = {"tasks": tasks} if tasks else {}
    of_tasks |= {"include_path": include_path} if include_path else {}
    of_tasks |= {name: True for name, given in (("task_code", task_code), ("download", download)) if given}
    with stdout_for_results():
        scores = expertune.evaluate(
            run_dir,
            adapter=adapter,
            rows=rows,
            base_only=base_only,
            trust_remote_code=trust_remote_code,
            other_base=other_base,
            model=model,
            **of_tasks,
        )
    if as_json:
        print_json(scores)
    elif tasks:
        print_tasks(scores["tasks"])
    else:
        print_scores(scores)


@app.command()
def generate(
    run_dir: RunDir,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to answer; - reads it from stdin.")],
    max_new_tokens: MaxNewTokens = 100,
    base_only: BaseOnly = False,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    model: BaseModel = None,
    other_base: OtherBase = False,
    verbose: Verbose = False,
) -> None:
    """Answer one prompt, put through the run's template. Prints the answer only, stripped of white space around it."""
    require_one_process()
    text = sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("the prompt holds no text; give it as --prompt TEXT, or as --prompt - on stdin")
    RunRecord.load(run_dir)
    with stdout_for_results():
        answer = expertune.generate(
            run_dir,
            text,
            max_new_tokens=max_new_tokens,
            base_only=base_only,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            other_base=other_base,
            model=model,
        )
    print(answer)


@app.command()
def chat(
    run_dir: RunDir,
    max_new_tokens: MaxNewTokens = 256,
    base_only: BaseOnly = False,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    model: BaseModel = None,
    other_base: OtherBase = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a run, one line at a time. /exit or Ctrl-D ends; Ctrl-C stops an answer.

    Earlier turns are remembered only where the run's template is a chat template.
    """
    require_one_process()
    RunRecord.load(run_dir)
    with stdout_for_results():
        run = expertune.open_run(
            run_dir, adapter=adapter, trust_remote_code=trust_remote_code, other_base=other_base, model=model
        )
    which = "its final adapter" if run.adapter == ADAPTER_FOLDER else f"the adapter of {run.adapter}"
    log(f"{run_dir}: {run.config.model} with{'out' if base_only else ''} {which}. /exit or Ctrl-D ends.")
    with run.model.disable_adapter() if base_only else contextlib.nullcontext():
        converse(run, max_new_tokens)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id.")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write; new or empty.")] = None,
    double_quantization: Annotated[
        bool | None,
        typer.Option(
            "--double-quantization/--no-double-quantization", help="Hold the scales in 8 bits (on by default)."
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(help="Of what stays unquantized; auto keeps each tensor's own."),
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: TrustRemoteCode = False,
    verify: Annotated[bool, typer.Option("--verify", help="Only hash the files of an NF4 folder again.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write a model's 4-bit weights into a folder that loads at reading speed. Prints the folder.

    Shards of a hub model are fetched one by one and deleted after use. The same command resumes after an interruption.
    `expertune quantize --verify FOLDER` checks a folder.
    """
    if verify:
        _verify(Path(out or model))
        return
    if out is None:
        raise typer.BadParameter("give the folder to write", param_hint="OUT")
    try:
        with stdout_for_results(), writing("quantize") as progress:
            expertune.quantize(
                model,
                out,
                double_quantization=double_quantization,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    except KeyboardInterrupt:
        log(f"expertune: interrupted; the same command resumes {out}")
        raise typer.Exit(130) from None
    print(out)


def _verify(folder: Path) -> None:
    with stdout_for_results():
        from expertune.checkpoint.verified import verify

        count = verify(folder)
    print(f"{folder}: {count} files are as they were written")


@app.command()
def export(
    run_dir: RunDir,
    to: Annotated[str, typer.Option(metavar="FORMAT", help=f"The form to write: {', '.join(FORMATS)}.")],
    adapter: Adapter = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write; RUN_DIR/exports/FORMAT by default.")
    ] = None,
    base: Annotated[
        Literal["source", "dequantized"],
        typer.Option(help="Weights of a merged model: the checkpoint's, or those that the adapter was trained beside."),
    ] = "source",
    type_: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="Numbers of a GGUF file: f32, f16, bf16 or q8_0.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the export in the engine that reads it, and compare.")
    ] = True,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Send it to this repository of the Hugging Face hub as well.")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a repository that is made; by default the owner's choice."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    model: BaseModel = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's adapter, or base and adapter as one model, in the form that an engine reads. Prints the folder.

    Exit code 2 where the engine computes something else from it than it should.
    """
    RunRecord.load(run_dir)
    with stdout_for_results(), writing("export") as progress:
        exported = expertune.export(
            run_dir,
            to,
            adapter=adapter,
            out=out,
            base=base,
            type=type_,
            verify=verify,
            trust_remote_code=trust_remote_code,
            model=model,
            progress=progress,
            push_to_hub=push_to_hub,
            private=private,
        )
    if as_json:
        print_json(exported.to_json())
    else:
        print(exported.folder)
        if exported.url:
            print(exported.url)


@app.command()
def report(run_dir: RunDir) -> None:
    """Write a run's page anew: one HTML file that needs no network. Prints its path. Loads no model."""
    record = RunRecord.load(run_dir)
    from expertune.report.page import write_page

    print(write_page(record.values, run_dir))


@app.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Run directories, two or more.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The page to write.")] = Path("comparison.html"),
    as_json: Json = False,
) -> None:
    """Compare runs: settings that differ, scores, cost and curves, as a table and as a page. Loads no model.

    The page is one HTML file that needs no network; its path is printed on stderr.
    """
    if len(run_dirs) < 2:
        raise typer.BadParameter("give two run directories or more", param_hint="RUN_DIR...")
    records = [(str(folder), RunRecord.load(folder).values) for folder in run_dirs]
    from expertune.report.compare import compare, render_comparison, write_comparison

    compared = compare(records)
    write_comparison(compared, out)
    if as_json:
        print_json(compared.to_json())
    else:
        print_table(render_comparison(compared))
    log(f"page: {out}")


@app.command()
def doctor(as_json: Json = False, verbose: Verbose = False) -> None:
    """Show what this machine has, and what of it Expertune will use."""
    with stdout_for_results():
        from expertune.doctor import collect, render

        found = collect()
    if as_json:
        print_json(found)
    else:
        print_table(render(found))
