"""Token windows for pre-training the embedded tiny Mixtral: texts, instruction rows and copying rows, packed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer

from pretrain_corpus import Corpus
from pretrain_rows import RowMaker

EOS = 2
INSTRUCTION_LAYOUTS = (
    "{}\n{}",
    "{}\n\nAnswer: {}",
    "Q: {}\nA: {}",
    "### Instruction:\n{}\n\n### Response:\n{}",
)


def random_copy(rng: random.Random, vocab_size: int, length: int, period: int = 0) -> list[int]:
    """Random tokens over and over: pure induction. Short periods teach it first, long ones stretch it."""
    period = period or rng.choice((8, 16, 32, 64, length // 2))
    unit = [rng.randrange(3, vocab_size) for _ in range(period)]
    return (unit * (length // period + 1))[:length]


class WindowMaker:
    """Token windows of one length: plain text, instruction rows, synthetic rows and random copies."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer) -> None:
        self.corpus, self.tokenizer = corpus, tokenizer
        self.make_row = RowMaker(corpus)
        self.vocab_size = tokenizer.get_vocab_size()
        self.text = self._stream(corpus.documents)

    def _stream(self, texts: list[str]) -> np.ndarray:
        encoded = self.tokenizer.encode_batch(texts)
        return np.concatenate([np.array([*e.ids, EOS], dtype=np.uint16) for e in encoded])

    def rows(self, rng: random.Random, make: Callable[[random.Random], str], length: int) -> list[int]:
        """Whole rows one after the other; the last one is cut at the end of the window."""
        ids: list[int] = []
        while len(ids) < length:
            ids += [*self.tokenizer.encode(make(rng)).ids, EOS]
        return ids[:length]

    def instruction(self, rng: random.Random) -> str:
        prompt, answer = rng.choice(self.corpus.instructions)
        return rng.choice(
            ("{}\n{}", "{}\n\nAnswer: {}", "Q: {}\nA: {}", "### Instruction:\n{}\n\n### Response:\n{}")
        ).format(prompt, answer)

    def batch(self, seed: str, count: int, length: int, shares: Sequence[float]) -> np.ndarray:
        """``count`` windows of ``length`` tokens; the same seed gives the same batch."""
        rng = random.Random(seed)
        windows = []
        for _ in range(count):
            kind = rng.choices(range(4), shares)[0]
            if kind == 0:
                start = rng.randrange(len(self.text) - length)
                windows.append(self.text[start : start + length].astype(np.int64))
            elif kind == 1:
                windows.append(np.array(self.rows(rng, self.instruction, length)))
            elif kind == 2:
                windows.append(np.array(self.rows(rng, self.make_row, length)))
            else:
                windows.append(np.array(random_copy(rng, self.vocab_size, length)))
        return np.stack(windows)

    def held_out_windows(self, count: int, length: int) -> np.ndarray:
        """The first windows of the documents that training never sees."""
        stream = self._stream(self.corpus.held_out).astype(np.int64)
        return stream[: count * length].reshape(count, length)


def training_texts(corpus: Corpus, rows: int, seed: int) -> Iterator[str]:
    """Everything the tokenizer is trained on: documents, instruction rows and some synthetic rows."""
    yield from corpus.documents
    for prompt, answer in corpus.instructions:
        yield prompt
        yield answer
    make, rng = RowMaker(corpus), random.Random(seed)
    for _ in range(rows):
        yield make(rng)
