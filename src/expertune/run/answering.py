"""Answers of a finished run: to prompts at once, and in a conversation."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from pydantic import PositiveInt

from expertune.checkpoint.context import context_length, read_config
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config.arguments import checked
from expertune.data import Question, Questions
from expertune.errors import ConfigError, DataError, option
from expertune.generation.chat import Conversation, questions_in_turn, require_system
from expertune.generation.decoding import Batches, Completion, FinishReason, complete, in_turn
from expertune.generation.sampling import Sampling
from expertune.run.inference import OpenOptions, Run, find_run, load_run, opened_run, recovery_of
from expertune.train.oom import OutOfMemory

BASE = "none"
"""What the base model without an adapter is called, as in scores of tasks."""


class ChatOptions(OpenOptions, total=False):
    """How a run directory is opened, how tokens are chosen, and what goes with every prompt."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    system: str | None
    columns: Mapping[str, str] | None


class GenerateOptions(ChatOptions, total=False):
    """The same, and how many prompts are answered at once."""

    batch_size: PositiveInt


class AnswersOptions(GenerateOptions, total=False):
    """The same, and what makes more of the answers."""

    compare: bool
    places: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """An answer to a prompt.

    Attributes:
        prompt: what was asked, as it was given.
        completion: the answer, without white space around it.
        adapter: the adapter that answered, or `none`.
        prompt_tokens: tokens of the rendered prompt.
        tokens: tokens of the answer, without the one that ends it.
        finish_reason: `stop` at an end token, `length` after `max_new_tokens`, `context` at the end of the context.
        seconds: how long its batch took.
    """

    prompt: Question
    completion: str
    adapter: str
    prompt_tokens: int
    tokens: int
    finish_reason: FinishReason
    seconds: float


@checked
def generate(
    run: Run | str | Path,
    prompt: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]],
    max_new_tokens: PositiveInt = 100,
    base_only: bool = False,
    **options: Unpack[GenerateOptions],
) -> str | list[str]:
    """Answer a prompt, or several, put through the run's template; white space around an answer is taken off.

    Args:
        run: a run directory, or a run.
        prompt: the user's text; or the columns of an example without its answer, e.g. `instruction` and `context`; or
            a list of these, which has a list of answers.
        max_new_tokens: the longest answer.
        base_only: answer without the adapter.
        **options: `temperature` (0, greedy, by default), `top_p`, `top_k` and `seed`; `system`, a system prompt;
            `columns` that every prompt has; `batch_size`, prompts that are answered at once; and how a run directory is
            opened, see `open_run`.

    Raises:
        ConfigError: a prompt holds no text, or the template has no place for a column or a system prompt.
        DataError: a prompt lacks a column, or leaves no room in the model's context.
        DoesNotFitError: memory ran out, and nothing that could be changed is left.
    """
    alone = isinstance(prompt, str | Mapping)
    asked = [prompt] if isinstance(prompt, str | Mapping) else prompt
    found = [each.completion for each in answers(run, asked, max_new_tokens, base_only, **options)]
    return found[0] if alone else found


@checked
def answers(
    run: Run | str | Path,
    prompts: Sequence[str | Mapping[str, Any]],
    max_new_tokens: PositiveInt = 100,
    base_only: bool = False,
    **options: Unpack[AnswersOptions],
) -> Iterator[Answer]:
    """Answers to prompts in their order, each as soon as its batch has been answered.

    All prompts are checked before the model is loaded.

    Args:
        run: see `generate`.
        prompts: see `generate`.
        max_new_tokens: see `generate`.
        base_only: see `generate`.
        **options: those of `generate`; `compare`, which answers each prompt without the adapter first and then with it;
            and `places`, what errors call each prompt.

    Raises:
        ConfigError, DataError, DoesNotFitError: see `generate`.
    """
    compare, places, size = options.pop("compare", False), options.pop("places", None), options.pop("batch_size", 32)
    sampling, system, columns = _of_every_prompt(max_new_tokens, options)
    if compare and base_only:
        raise ConfigError(f"{option('compare')} answers with the adapter and without it; leave out base_only")
    if not places:
        places = ["the prompt"] if len(prompts) == 1 else [f"prompt {n + 1}" for n in range(len(prompts))]
    for place, prompt in zip(places, prompts, strict=True):
        if isinstance(prompt, str) and not prompt.strip():
            raise ConfigError(f"{place} holds no text; write one")
    asked = _Asked(run, options)
    questions = Questions(asked.data, asked.tokenizer)
    questions.require_columns(columns)
    if any(isinstance(prompt, str) for prompt in prompts) and (twice := columns.keys() & questions.main_columns):
        raise ConfigError(f"column {min(twice)} is the prompt itself; give one of the two")
    if system is not None and prompts:
        require_system(questions, system, {**columns, **questions.asked(prompts[0], {})})
        columns = columns | {"system": system}
    ids = []
    for place, prompt in zip(places, prompts, strict=True):
        try:
            ids.append(questions.encode(questions.asked(prompt, columns)))
        except DataError as error:
            raise DataError(
                f"{place}: {error}; give an example of this run without its answer (columns: "
                f"{', '.join(questions.columns)}), or its text alone"
            ) from None
        if asked.context is not None and len(ids[-1]) >= asked.context:
            raise DataError(
                f"{place} has {len(ids[-1])} tokens, but the model's context holds {asked.context}; shorten it"
            )
    given = {name: None for prompt in prompts if not isinstance(prompt, str) for name in prompt}
    if unused := [name for name in given if name not in {*questions.columns, *questions.answers}]:
        asked.notify(f"template {questions.template.name} does not use the prompts' columns {', '.join(unused)}")
    which = [True, False] if compare else [base_only]
    return _Answering(asked.opened(), sampling, which, asked.context).answers(prompts, ids, size)


@checked
def chat(
    run: Run | str | Path,
    max_new_tokens: PositiveInt = 256,
    base_only: bool = False,
    **options: Unpack[ChatOptions],
) -> Conversation:
    """A conversation with a run: `conversation.ask(text)`, or `conversation.stream(text)` piece by piece.

    Args:
        run: see `generate`.
        max_new_tokens: see `generate`.
        base_only: see `generate`.
        **options: those of `generate`, without `batch_size`; `columns` under a template of columns only.

    Raises:
        ConfigError: see `generate`.
    """
    sampling, system, columns = _of_every_prompt(max_new_tokens, options)
    asked = _Asked(run, options)
    questions = questions_in_turn(asked.data, asked.tokenizer)
    if columns and questions.template.takes_messages:
        raise ConfigError(
            f"column {next(iter(columns))}: template {questions.template.name} takes messages; write it into a message"
        )
    questions.require_columns(columns)
    if typed := columns.keys() & questions.main_columns:
        raise ConfigError(f"column {min(typed)} is what you type; leave it out")
    if system is not None:
        require_system(questions, system, columns)
    opened = asked.opened()
    conversation = Conversation(opened.model, questions, sampling, columns, base_only, opened.context.notify)
    conversation.system = system
    return conversation


def _of_every_prompt(max_new_tokens: int, options: ChatOptions) -> tuple[Sampling, str | None, dict[str, str]]:
    """What goes with every prompt, taken out of the options; how a run directory is opened is left."""
    names = "temperature", "top_p", "top_k", "seed"
    sampling = Sampling(max_new_tokens, **{name: options.pop(name, None) for name in names})  # type: ignore[misc]
    return sampling, options.pop("system", None), dict(options.pop("columns", None) or {})


class _Asked:
    """A run, or the one in a directory, with what prompts need of it; a directory's model is loaded by `opened`.

    Attributes:
        data: the run's data section, settled.
        tokenizer: the base model's.
        context: tokens that the model's context holds; None where it names no limit.
        notify: shows the user a line.
    """

    def __init__(self, run: Run | str | Path, opening: OpenOptions) -> None:
        self._opening = opening
        self._run = opened_run(run, opening) if isinstance(run, Run) else None
        if self._run is not None:
            self.data, self.tokenizer = self._run.data, self._run.tokenizer
            self.context, self.notify = context_length(self._run.model.config), self._run.context.notify
            return
        trust = opening.get("trust_remote_code", False)
        self._found = find_run(run, opening.get("adapter"), trust, opening.get("model"))  # type: ignore[arg-type]
        self.data, self.notify = Run(self._found.context).data, self._found.context.notify
        self.tokenizer = load_tokenizer(self._found.base.folder, trust)
        self.context = context_length(read_config(self._found.base.folder, trust))

    def opened(self) -> Run:
        """The run with its model."""
        return self._run or load_run(self._found, self.tokenizer, self._opening)


@dataclass(frozen=True)
class _Answering:
    """A run that answers prompts.

    Attributes:
        run: the run, whose model is loaded.
        sampling: how tokens are chosen.
        which: whether the base model answers: once, or first without and then with the adapter.
        context: tokens that the model's context holds; None where it names no limit.
    """

    run: Run
    sampling: Sampling
    which: Sequence[bool]
    context: int | None

    def answers(self, prompts: Sequence[Question], ids: Sequence[list[int]], batch_size: int) -> Iterator[Answer]:
        """The answers, a batch at a time."""
        recovery = recovery_of(self.run, [])
        for start in range(0, len(prompts), batch_size):
            end = min(start + batch_size, len(prompts))
            found = [
                self._completions(ids[start:end], base_only, recovery, start, len(ids)) for base_only in self.which
            ]
            for prompt, prompt_ids, *completions in zip(prompts[start:end], ids[start:end], *found, strict=True):
                for base_only, each in zip(self.which, completions, strict=True):
                    yield Answer(
                        prompt,
                        each.text.strip(),
                        BASE if base_only else self.run.adapter,
                        len(prompt_ids),
                        each.num_tokens,
                        each.finish_reason,
                        each.seconds,
                    )

    def _completions(
        self, ids: Sequence[list[int]], base_only: bool, recovery: OutOfMemory, num_before: int, num_all: int
    ) -> list[Completion]:
        """Those of one batch; prompts that leave the same room in the context are answered together."""
        which = f" {num_before + 1}-{num_before + len(ids)} of {num_all}" if len(ids) < num_all else ""
        most, seed = self.sampling.max_new_tokens, self.sampling.seed
        # Another batch draws other numbers; the base model draws the same as the adapter.
        sampling = self.sampling if seed is None else replace(self.sampling, seed=seed + num_before)
        rooms = [most if self.context is None else min(most, self.context - len(each)) for each in ids]
        found: dict[int, Completion] = {}
        in_parts = partial(recovery.in_parts, "generation", step=0 if base_only else self.run.steps)
        who = "base model answering" if base_only else "answering"
        with (
            in_turn(self.run.model),
            self.run.model.disable_adapter() if base_only else nullcontext(),
            self.run.context.bars.task(f"{who}{which}", "tokens") as update,
        ):
            batches = Batches(in_parts, each_token=lambda num_tokens: update(num_tokens, most))
            for room in dict.fromkeys(rooms):
                group = [index for index, each in enumerate(rooms) if each == room]
                some = [ids[index] for index in group]
                completed = complete(self.run.model, self.run.tokenizer, some, sampling, len(some), batches)
                found |= dict(zip(group, completed, strict=True))
        return [found[index] for index in range(len(ids))]
