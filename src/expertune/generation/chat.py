"""Use a tuned model: complete prompts, stream an answer, and keep up a conversation."""

import queue
import threading
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer, StoppingCriteriaList

from expertune.config import DataConfig
from expertune.data import encode_prompt, render_prompt
from expertune.generation.greedy import complete, end_ids, greedy, to_text

__all__ = ["Conversation", "complete", "stream"]

_CONVERSATIONS = ("chat", "chatml")


def stream(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], max_new_tokens: int
) -> Generator[str, None, None]:
    """Complete one prompt greedily and yield its text as it is written.

    The pieces joined are what `complete` returns. Closing the iterator early (or an exception in the code that reads
    it) stops the model after the token it is at.

    Args:
        model, tokenizer, max_new_tokens: see `complete`.
        prompt_ids: token ids of the prompt.

    Raises:
        Exception: whatever went wrong while generating, in the thread of the caller.
    """
    pieces = _Pieces(tokenizer, end_ids(model, tokenizer))
    closed = threading.Event()

    def stop(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), closed.is_set(), device=input_ids.device)

    def write() -> None:
        try:
            greedy(
                model,
                tokenizer,
                [prompt_ids],
                max_new_tokens,
                streamer=pieces,
                stopping_criteria=StoppingCriteriaList([stop]),
            )
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
        writer.join()


class Conversation:
    """The user's messages as prompts of a run's template.

    Args:
        data: the run's data section, with the layout and template that its examples were read with (`Run.data`).
        tokenizer: the run's tokenizer.
    """

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.turns: list[dict[str, str]] = []

    @property
    def keeps_history(self) -> bool:
        """Whether earlier turns are part of the prompt: only a chat template has a place for them."""
        return self.data.template in _CONVERSATIONS

    def prompt(self, message: str) -> list[int]:
        """Token ids of the prompt that asks `message`, after the turns so far.

        Raises:
            DataError, ConfigError: see `expertune.data.render_prompt`.
        """
        if not self.keeps_history:
            return encode_prompt(render_prompt(message, self.data, self.tokenizer), self.tokenizer)
        # A chat template takes messages, whatever the layout of the examples it was tuned on.
        data = self.data.model_copy(update={"format": "messages", "columns": {}})
        messages = [*self.turns, {"role": "user", "content": message}]
        return encode_prompt(render_prompt({"messages": messages}, data, self.tokenizer), self.tokenizer)

    def answered(self, message: str, answer: str) -> None:
        """Remember a turn, where the template has a place for it."""
        if self.keeps_history:
            self.turns += [{"role": "user", "content": message}, {"role": "assistant", "content": answer}]


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
