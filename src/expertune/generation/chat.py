"""Use a tuned model in a conversation: stream an answer, and keep up the turns."""

import queue
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteriaList

from expertune.checkpoint.context import context_length
from expertune.config import DataConfig
from expertune.data import Questions
from expertune.errors import ConfigError, DataError
from expertune.generation.decoding import FinishReason, decode, end_ids, in_turn, to_text
from expertune.generation.sampling import Sampling

# Where the context is short, at least this part of it is left to the conversation.
_MOST_RESERVED = 1 / 4


class StillAnsweringError(KeyboardInterrupt):
    """Ctrl-C a second time, while the model is still at the token that the first one waits for."""


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    sampling: Sampling,
    around: AbstractContextManager[Any] | None = None,
) -> Generator[str, None, FinishReason]:
    """Complete one prompt and yield its text as it is written; returns why it ends.

    The pieces joined are what `complete` returns. Closing the iterator early (or an exception in the code that reads
    it) stops the model after the token it is at.

    Args:
        model, tokenizer, sampling: see `complete`.
        prompt_ids: token ids of the prompt.
        around: open while the model answers.

    Raises:
        Exception: whatever went wrong while generating, in the thread of the caller.
    """
    pieces = _Pieces(tokenizer, end_ids(model, tokenizer))
    closed = threading.Event()
    reasons: list[FinishReason] = []

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), closed.is_set(), device=input_ids.device)

    def write() -> None:
        try:
            criteria = StoppingCriteriaList([stop])
            with in_turn(model), around or nullcontext():
                ((_, reason),) = decode(
                    model, tokenizer, [prompt_ids], sampling, streamer=pieces, stopping_criteria=criteria
                )
            reasons.append(reason)
        except BaseException as error:  # nothing may die unseen in a thread, nor leave the reader waiting
            pieces.queue.put(error)
        else:
            pieces.queue.put(None)

    writer = threading.Thread(target=write, name="generate", daemon=True)
    writer.start()
    try:
        while (piece := pieces.queue.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed.set()
        try:
            writer.join()
        except KeyboardInterrupt:
            raise StillAnsweringError from None
    return reasons[0]


def questions_in_turn(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """What a run can be asked in a conversation.

    A chat template takes messages, whatever the layout of the examples that the run was tuned on.

    Args:
        data: the run's data section, with the layout and template that its examples were read with (`Run.data`).
        tokenizer: the run's tokenizer.
    """
    questions = Questions(data, tokenizer)
    if not questions.template.takes_messages:
        return questions
    return Questions(data.model_copy(update={"format": "messages", "columns": {}}), tokenizer)


class Conversation:
    """Questions to a run and its answers, each question through the run's template.

    Args:
        model: the run's model.
        questions: see `questions_in_turn`.
        sampling: how tokens are chosen; the draws of each answer have a seed of their own.
        columns: columns that each question has beside the user's text, under a template of columns.
        base_only: answer without the adapter.
        notify: called with what has become of the conversation, in words.

    Attributes:
        turns: earlier messages that the next question follows.
        base_only: whether answers are written without the adapter; may be set at any time.
        finish_reason: why the last answer ended: `stop`, `length` or `context`; None where it was interrupted.
    """

    def __init__(
        self,
        model: nn.Module,
        questions: Questions,
        sampling: Sampling,
        columns: Mapping[str, str] | None = None,
        base_only: bool = False,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.questions, self.sampling, self.base_only = questions, sampling, base_only
        self.turns: list[dict[str, str]] = []
        self.finish_reason: FinishReason | None = None
        self._model, self._columns, self._notify = model, dict(columns or {}), notify
        self._system: str | None = None
        self._num_asked = 0

    @property
    def remembers(self) -> bool:
        """Whether earlier turns are part of a prompt: only a chat template has a place for them."""
        return self.questions.template.takes_messages

    @property
    def system(self) -> str | None:
        """The system prompt, None where there is none. Setting one raises ConfigError where the template has no place
        for it."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text:
            require_system(self.questions, text, self._columns)
        self._system = text or None

    def reset(self) -> None:
        """Forget earlier turns; the system prompt stays."""
        self.turns.clear()

    def ask(self, message: str) -> str:
        """The answer to a message, without white space around it. Raises what `stream` does."""
        return "".join(self.stream(message)).strip()

    def stream(self, message: str) -> Generator[str, None, None]:
        """The answer to a message, piece by piece. The turn is remembered, as far as the answer came.

        Raises:
            DataError: the message cannot be asked; it is not remembered.
        """
        self.finish_reason, answer = None, ""
        ids = self.prompt(message)
        seed = self.sampling.seed
        sampling = self.sampling if seed is None else replace(self.sampling, seed=seed + self._num_asked)
        self._num_asked += 1
        around = self._model.disable_adapter() if self.base_only else nullcontext()  # type: ignore[operator]
        pieces = stream(self._model, self.questions.tokenizer, ids, sampling, around)
        try:
            while True:
                try:
                    piece = next(pieces)
                except StopIteration as ended:
                    self.finish_reason = ended.value
                    break
                answer += piece
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            pieces.close()
            self._remember(message, answer)
            raise
        self._remember(message, answer)

    def prompt(self, message: str) -> list[int]:
        """Token ids of the prompt that asks `message` after the turns so far.

        Where the model's context cannot hold them and an answer, the oldest turns are forgotten, which is notified.

        Raises:
            DataError: the template refuses the message, or the message alone fills the context.
        """
        turns = list(self.turns)
        ids = self._encode(message, turns)
        context = context_length(self._model.config)
        if context is not None:
            most = context - min(self.sampling.max_new_tokens, int(context * _MOST_RESERVED))
            while len(ids) > most and turns:
                del turns[:2]
                ids = self._encode(message, turns)
            if len(ids) >= context:
                raise DataError(
                    f"the message makes a prompt of {len(ids)} tokens, but the model's context holds {context}; "
                    "shorten it"
                )
        if num_forgotten := (len(self.turns) - len(turns)) // 2:
            which = "oldest question and its answer" if num_forgotten == 1 else f"{num_forgotten} oldest questions"
            self._notify(
                f"the conversation no longer fits into the model's context of {context} tokens; the {which} "
                f"{'are' if num_forgotten == 1 else 'and their answers are'} forgotten"
            )
            self.turns = turns
        return ids

    def _encode(self, message: str, turns: list[dict[str, str]]) -> list[int]:
        asked: Any = {"messages": [*turns, {"role": "user", "content": message}]} if self.remembers else message
        system = {"system": self._system} if self._system else {}
        return self.questions.encode(self.questions.asked(asked, self._columns | system))

    def _remember(self, message: str, answer: str) -> None:
        if not self.remembers:
            return
        # A template may write the space before an answer itself, as Mistral's does.
        answer = answer.strip()
        if not answer:
            # Many templates refuse an empty turn, or two turns of the user.
            self._notify("the answer is empty, and the question is forgotten")
            return
        self.turns += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]


def require_system(questions: Questions, system: str, columns: Mapping[str, str]) -> None:
    """Refuse a system prompt that holds no text, or that a run's template has no place for.

    Args:
        questions: see `questions_in_turn`.
        system: the system prompt.
        columns: columns of each question.

    Raises:
        ConfigError: says which.
    """
    if not system.strip():
        raise ConfigError("system: the system prompt holds no text; write one, or leave it out")
    questions.require_place_for(system, questions.asked("a", columns))


class _Pieces(BaseStreamer):
    """Receives token ids from `generate` and queues the text that they add.

    The whole answer is decoded again at each token. Decoding tokens one by one would lose the spaces that
    SentencePiece tokenizers strip from the start of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ends: list[int]) -> None:
        self.queue: queue.Queue[str | BaseException | None] = queue.Queue()
        self._tokenizer, self._ends = tokenizer, ends
        self._ids: list[int] | None = None
        self._num_sent = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, T] first, then each new token [1]."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += [token_id for token_id in value.flatten().tolist() if token_id not in self._ends]
        text = to_text(self._ids, self._tokenizer)
        # The bytes of a character may arrive over several tokens; until it is whole, it decodes as U+FFFD.
        if not text.endswith("\ufffd"):
            self._send(text)

    def end(self) -> None:
        """Send what was held back."""
        self._send(to_text(self._ids or [], self._tokenizer))

    def _send(self, text: str) -> None:
        if text[self._num_sent :]:
            self.queue.put(text[self._num_sent :])
        self._num_sent = len(text)
