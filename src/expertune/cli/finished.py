"""The commands that use a finished run: evaluate, generate, chat."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import expertune
from expertune.cli.arguments import (
    Adapter,
    BaseModel,
    BaseOnly,
    Column,
    Json,
    MaxNewTokens,
    OtherBase,
    RunDir,
    Seed,
    System,
    Temperature,
    TopK,
    TopP,
    TrustRemoteCode,
    Verbose,
    require_adapter,
)
from expertune.cli.conversing import converse, how_it_goes
from expertune.cli.prompts import check_prompts, columns_of, drawn, read_prompts
from expertune.distributed.processes import require_one_process
from expertune.errors import ConfigError
from expertune.generation.sampling import Sampling
from expertune.terminal import importing, note, print_json, print_scores, print_tasks, stdout_for_results

if TYPE_CHECKING:
    from expertune import RunRecord


def evaluate(
    run_dir: RunDir,
    adapter: Adapter = None,
    rows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Examples to answer for the task's metric, or of each of TASKS."),
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
    record = require_adapter(run_dir, adapter)
    given = {"include_path": include_path, "task_code": task_code, "download": download}
    of_tasks: dict[str, Any] = {name: value for name, value in given.items() if value not in (None, False)}
    if tasks is not None:
        of_tasks["tasks"] = tasks
    elif of_tasks:
        raise ConfigError(f"--{next(iter(of_tasks)).replace('_', '-')}: of use with --tasks TASK only; give one")
    note(_loading(record, run_dir, adapter, model, base_only))
    with stdout_for_results():
        with importing():
            score = expertune.evaluate
        scores = score(
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
    elif tasks is not None:
        print_tasks(scores["tasks"])
    else:
        print_scores(scores)


def generate(
    run_dir: RunDir,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to answer; - reads it from stdin, as one prompt.")
    ] = None,
    prompt_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to answer: one a line, or with the template's columns as .jsonl, .csv, ...; - is stdin.",
        ),
    ] = None,
    column: Column = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the base model's answer and the tuned one's, differences marked.")
    ] = False,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts answered at once.")] = 32,
    base_only: BaseOnly = False,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    model: BaseModel = None,
    other_base: OtherBase = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each prompt, a line each.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Answer prompts, put through the run's template.

    Prints the answer to --prompt and nothing else; of a file, each prompt and its answer. White space around an answer
    is left out.
    """
    require_one_process()
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    columns = columns_of(column)
    check_prompts(prompt, prompt_file, columns)
    if compare and base_only:
        raise ConfigError("--compare answers with the adapter and without it; leave out --base-only")
    record = require_adapter(run_dir, adapter)
    prompts = read_prompts(prompt, prompt_file)
    note(_loading(record, run_dir, adapter, model, base_only))
    with stdout_for_results():
        with importing():
            answer = expertune.answers
        answers = answer(
            run_dir,
            prompts.asked,
            max_new_tokens=max_new_tokens,
            base_only=base_only,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=drawn(sampling),
            system=system,
            columns=columns,
            batch_size=batch_size,
            compare=compare,
            places=prompts.places,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            other_base=other_base,
            model=model,
        )
    from expertune.cli.answered import Form, print_answers

    print_answers(answers, Form(compare, as_json, with_prompts=prompt_file is not None), max_new_tokens)


def chat(
    run_dir: RunDir,
    system: System = None,
    column: Column = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    base_only: BaseOnly = False,
    adapter: Adapter = None,
    trust_remote_code: TrustRemoteCode = False,
    model: BaseModel = None,
    other_base: OtherBase = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a run, one line at a time. /help lists the commands; /exit or Ctrl-D ends; Ctrl-C stops an answer.

    Earlier turns are part of a question where the run's template is a chat template.
    """
    require_one_process()
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    columns = columns_of(column)
    record = require_adapter(run_dir, adapter)
    note(_loading(record, run_dir, adapter, model, base_only))
    with stdout_for_results():
        with importing():
            begin = expertune.chat
        conversation = begin(
            run_dir,
            max_new_tokens=max_new_tokens,
            base_only=base_only,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=drawn(sampling),
            system=system,
            columns=columns,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            other_base=other_base,
            model=model,
        )
    note(f"{run_dir}: {_which(record, adapter, model, base_only)}. /help lists commands; /exit or Ctrl-D ends.")
    note(how_it_goes(conversation))
    converse(conversation)


def _loading(record: "RunRecord", run_dir: Path, adapter: str | None, model: str | None, base_only: bool) -> str:
    """What is under way until the first answer, said at once: libraries and a large model take a while."""
    return f"{run_dir}: loading the libraries, then {_which(record, adapter, model, base_only)}"


def _which(record: "RunRecord", adapter: str | None, model: str | None, base_only: bool) -> str:
    which = "its final adapter" if adapter in (None, "adapter") else f"the adapter of {adapter}"
    base = model or record.section("config").get("model", "the base model")
    return f"{base} with{'out' if base_only else ''} {which}"
