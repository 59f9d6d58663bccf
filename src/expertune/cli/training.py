"""The commands up to a trained run: init, plan, data, train."""

import shlex
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import expertune
from expertune.cli.arguments import Json, Overrides, RunFile, TrustRemoteCode, TrustRewards, Verbose
from expertune.cli.lazy_torch import import_torch_when_used
from expertune.distributed.processes import launched
from expertune.errors import ConfigError, naming
from expertune.gpus import find_device
from expertune.run.signals import Terminated
from expertune.storage import write_text
from expertune.terminal import importing, log, log_error, note, print_json, print_table, stdout_for_results, working

if TYPE_CHECKING:
    from expertune.config import RunConfig


def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a hub id.")],
    examples: Annotated[str, typer.Argument(metavar="DATA", help="Examples: a file, or a hub dataset.")],
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The run file to write; one that exists is kept.")] = Path(
        "run.yaml"
    ),
    trust_remote_code: TrustRemoteCode = False,
    verbose: Verbose = False,
) -> None:
    """Write a run file for a model and its examples, with the reason beside each choice. Prints its path.

    Recognizes the layout of the examples, chooses a template, shows one example as it will be trained on, and plans the
    run on this machine. Loads no weights.
    """
    _require_new(out)
    with stdout_for_results():
        with working("reading the examples, and planning"):
            with importing():
                from expertune.planning.recall import may_recall, recall_shapes

                read = recall_shapes if may_recall(trust_remote_code) else None
                from expertune.run.draft import draft_run_file  # which imports transformers

            draft = draft_run_file(model, examples, out, overrides or (), trust_remote_code, read)
        from rich.console import Console

        from expertune.report.preview import render_preview

        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        console.print(render_preview("train", draft.preview))
        _require_new(out)
        write_text(out, draft.text)
        for line in takewhile(lambda line: line.startswith("# "), draft.text.splitlines()):
            log(line.removeprefix("# "))
        if draft.note:
            log(f"note: {draft.note}")
    print(out)


def _require_new(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: is there already, and is not overwritten; choose another file with --out FILE")


def _read(run: Path, overrides: list[str] | None, resume: bool = False, starts: bool = True) -> "RunConfig":
    """A run file, held to the adapter that it starts from before any library is loaded."""
    config = expertune.load_config(run, overrides or (), resume, starts)
    if not resume:  # which has its adapter in its directory
        from expertune.checkpoint.adapter_folder import require_beginning

        require_beginning(config.lora)
    return config


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
    config = _read(run, overrides, starts=False)
    if gpu is not None:
        find_device(gpu)
    if memory is not None:
        from expertune.config import parse_size

        with naming("--memory"):
            parse_size(memory)
    import_torch_when_used()
    # What no plan has kept is read with libraries that are imported then.
    with stdout_for_results(), working("planning"), importing():
        made = expertune.plan(config, gpu=gpu, memory=memory, devices=devices, trust_remote_code=trust_remote_code)
    if as_json:
        print_json(made.to_json())
    else:
        print_table(made.render())
    if not made.fits:
        # The table above has all of it; a second one in the error would only push it off the screen.
        note(f"expertune: error: {made.model} does not fit: see the plan above")
        raise typer.Exit(2)


def data(
    run: RunFile,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(metavar="N", min=0, help="How many examples of each source to show.")] = 3,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show what a run would be trained on: layout, template, columns, and examples with their trained part marked.

    Checks every example as a run does. Needs the model's tokenizer alone; loads no weights and writes nothing.
    """
    config = expertune.load_config(run, overrides or (), starts=False)
    with stdout_for_results(), working("tokenizing"):
        with importing():
            from expertune.data.preview import preview_run
            from expertune.report.preview import render_preview

        shown = preview_run(config, examples, trust_remote_code)
    if as_json:
        print_json(shown)
        return
    for part, preview in shown.items():
        if preview:
            print_table(render_preview(part, preview, max_chars=4000))


def train(
    run: RunFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    trust_rewards: TrustRewards = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune as the run file says, or as the run of a record was. Prints the run directory."""
    config = _read(run, overrides, resume)
    from expertune.run.directory import after_interruption, require_directory

    if launched().world_size == 1:  # several look at it together, once they are connected
        require_directory(config, resume)
    trusted = {"trust_remote_code": trust_remote_code, "trust_rewards": trust_rewards}
    try:
        with stdout_for_results():
            from rich.console import Console

            console = Console(stderr=True, soft_wrap=True)
            with working("loading the libraries") if launched().rank == 0 else nullcontext(), importing():
                finetune = expertune.finetune
            finished = finetune(config, (), resume, console, trust_remote_code, trust_rewards)
    except (KeyboardInterrupt, Terminated) as stop:
        options = [f"--{name.replace('_', '-')}" for name, given in trusted.items() if given]
        command = shlex.join(["expertune", "train", str(run), *(overrides or ()), *options])
        count = launched().world_size
        as_before = f"in {count} processes as before, " if count > 1 else ""
        goes_on = after_interruption(Path(config.output_dir), command)
        log_error(stop, f"{str(stop) or 'interrupted'}; {as_before}{goes_on}")
        raise typer.Exit(stop.exit_code if isinstance(stop, Terminated) else 130) from None
    finished.context.ranks.on_main(lambda: print(finished.output_dir))
