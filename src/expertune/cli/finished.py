"""The commands that use a finished run: evaluate, generate, chat."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import expertune
from expertune import RunRecord
from expertune.cli.arguments import (
    Adapter,
    BaseModel,
    BaseOnly,
    Json,
    MaxNewTokens,
    OtherBase,
    RunDir,
    TrustRemoteCode,
    Verbose,
)
from expertune.distributed.processes import require_one_process
from expertune.errors import ConfigError
from expertune.run.directory import ADAPTER_FOLDER
from expertune.terminal import converse, log, print_json, print_scores, print_tasks, stdout_for_results


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
