"""Synthetic rows that can only be predicted by copying.

Records, call layouts, repeats and few-shot mappings are made from spans of the open texts under random keys. A small
model learns little world knowledge from a few megabytes, but it can learn to copy, and that is what tuning on short
structured tasks builds on.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from pretrain_corpus import WORD, Corpus, find_names, find_numbers

# Function and attribute names of the task the model is later tuned on; no synthetic key may equal one of them.
FORBIDDEN_TEXT = """
inform request give_opinion confirm verify_attribute suggest request_explanation recommend request_attribute name
exp_release_date release_year developer esrb rating genres player_perspective has_multiplayer platforms
available_on_steam has_linux_release has_mac_release specifier
"""
FORBIDDEN_KEYS = frozenset(FORBIDDEN_TEXT.split())
SYLLABLE_TEXT = """
ba be bri cor da del dra el fa gor gri ha il ka kor la lum mar mi nor o pha qui ra rin sa sha tor u va wyn xe zan zu
"""
SYLLABLES = SYLLABLE_TEXT.split()


class RowMaker:
    """Makes one synthetic row at a time; every answer can be read off the row itself."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.kinds: list[tuple[float, Callable[[random.Random], str]]] = [
            (0.34, self.mapping),
            (0.16, self.extract_all),
            (0.14, self.record_to_answers),
            (0.12, self.repeat),
            (0.10, self.chosen_spans),
            (0.07, self.presence),
            (0.07, self.fill_in),
        ]

    def __call__(self, rng: random.Random) -> str:
        weights = [weight for weight, _ in self.kinds]
        return rng.choices([make for _, make in self.kinds], weights)[0](rng)

    def key(self, rng: random.Random) -> str:
        """A random snake-case key of one to three words."""
        while True:
            key = "_".join(rng.choice(self.corpus.common_words) for _ in range(rng.choice((1, 1, 1, 2, 2, 3))))
            if key not in FORBIDDEN_KEYS:
                return key

    def invented(self, rng: random.Random) -> str:
        """A made-up name, so that no value can be known by heart."""
        words = []
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            words.append("".join(rng.choice(SYLLABLES) for _ in range(rng.randint(1, 4))).capitalize())
        if rng.random() < 0.25:
            words.append(rng.choice(("2", "3", "4", "II", "III", "12", "64", str(rng.randint(1950, 2030)))))
        joiner = ": " if len(words) > 2 and rng.random() < 0.2 else " "
        return joiner.join((words[0], " ".join(words[1:]))) if len(words) > 1 else words[0]

    def value(self, rng: random.Random, kind: str) -> str:
        """A value of the same kind as the span it replaces."""
        if kind == "number":
            return rng.choice(self.corpus.numbers) if rng.random() < 0.4 else str(rng.randint(0, 2030))
        if kind == "name":
            return self.invented(rng) if rng.random() < 0.35 else rng.choice(self.corpus.names)
        words = [rng.choice(self.corpus.words) for _ in range(rng.choice((1, 1, 1, 2)))]
        return " ".join(words)

    def sentence(self, rng: random.Random) -> str:
        return rng.choice(self.corpus.sentences)

    def spans(self, rng: random.Random, sentence: str, at_most: int) -> list[tuple[str, str]]:
        """Up to ``at_most`` (span, kind) pairs of a sentence, in order of appearance, none inside another."""
        found = [(n, "name") for n in find_names(sentence)] + [(n, "number") for n in find_numbers(sentence)]
        words = [w for w in dict.fromkeys(WORD.findall(sentence)) if sentence.count(w) == 1]
        rng.shuffle(words)
        found += [(w, "word") for w in words[: rng.choice((0, 1, 1, 2, 2, 3))]]
        rng.shuffle(found)
        kept: list[tuple[str, str]] = []
        for span, kind in found:
            if len(kept) < at_most and not any(span in other or other in span for other, _ in kept):
                kept.append((span, kind))
        return sorted(kept, key=lambda pair: sentence.find(pair[0]))

    @staticmethod
    def layout(rng: random.Random) -> Callable[[str, list[tuple[str, str]]], str]:
        """One surface layout for (key, value) pairs."""
        choice = rng.randrange(9)
        if choice < 4:
            return lambda head, pairs: f"{head}(" + ", ".join(f"{k}[{v}]" for k, v in pairs) + ")"
        if choice == 4:
            return lambda head, pairs: "\n".join(f"{k}: {v}" for k, v in pairs)
        if choice == 5:
            return lambda head, pairs: json.dumps(dict(pairs), ensure_ascii=False)
        if choice == 6:
            return lambda head, pairs: " ".join(f"[{v}]" for _, v in pairs)
        if choice == 7:
            return lambda head, pairs: f"{head} | " + " | ".join(f"{k} = {v}" for k, v in pairs)
        return lambda head, pairs: f"{head}(" + ", ".join(f'{k}="{v}"' for k, v in pairs) + ")"

    @staticmethod
    def frame(rng: random.Random) -> tuple[str, str]:
        """The words before a sentence and before its answer."""
        before = rng.choice(("Sentence: ", "Text: ", "Input: ", "", "Q: ", "From: ", "Read: "))
        after = rng.choice(("Meaning: ", "Output: ", "Result: ", "-> ", "A: ", "Fields: ", "=> ", "Record: "))
        return before, after

    def mapping(self, rng: random.Random) -> str:
        return "\n\n".join(prompt + answer for prompt, answer in self.mapping_blocks(rng))

    def mapping_blocks(self, rng: random.Random) -> list[tuple[str, str]]:
        """One sentence skeleton filled several times: the first fillings show which slot gets which key."""
        for _ in range(20):
            skeleton = self.sentence(rng)
            spans = self.spans(rng, skeleton, rng.choice((1, 2, 2, 3, 3, 4, 5)))
            if spans and len(skeleton) < 220:
                break
        keys = [self.key(rng) for _ in spans]
        order = list(range(len(spans)))
        if rng.random() < 0.5:
            rng.shuffle(order)
        head, write, (before, after) = self.key(rng), self.layout(rng), self.frame(rng)
        blocks = []
        for _ in range(rng.choice((2, 2, 3, 3, 4))):
            text, values = skeleton, []
            for index, (span, kind) in enumerate(spans):
                values.append(self.value(rng, kind))
                text = text.replace(span, f"\x00{index}\x01", 1)
            for index, value in enumerate(values):
                text = text.replace(f"\x00{index}\x01", value)
            answer = write(head, [(keys[i], values[i]) for i in order])
            blocks.append((f"{before}{text}\n{after}", answer))
        return blocks

    def extract_all(self, rng: random.Random) -> str:
        """All names and all numbers of a sentence, in order: the answer follows from the sentence alone."""
        for _ in range(20):
            text = self.sentence(rng)
            names, numbers = find_names(text), find_numbers(text)
            if len(names) + len(numbers) >= 2:
                break
        if rng.random() < 0.5:
            for old in names:
                text = text.replace(old, self.value(rng, "name"), 1)
            names = find_names(text)
        before, after = self.frame(rng)
        style = rng.randrange(5)
        if style == 0:
            answer = " ".join(f"[{v}]" for v in names + numbers)
        elif style == 1:
            answer = f"names: {', '.join(names)}\nnumbers: {', '.join(numbers)}"
        elif style == 2:
            answer = "extract(" + ", ".join([f"title[{v}]" for v in names] + [f"number[{v}]" for v in numbers]) + ")"
        elif style == 3:
            answer = json.dumps({"names": names, "numbers": numbers}, ensure_ascii=False)
        else:
            answer = f"list(titles[{', '.join(names)}], numbers[{', '.join(numbers)}])"
        return f"{before}{text}\n{after}{answer}"

    def record_to_answers(self, rng: random.Random) -> str:
        """A record with random keys, then questions on single keys in another order."""
        keys = list(dict.fromkeys(self.key(rng) for _ in range(rng.randint(2, 7))))
        values = {k: self.value(rng, rng.choice(("name", "number", "word"))) for k in keys}
        record = self.layout(rng)(self.key(rng), list(values.items()))
        if not all(k in record for k in keys):
            record = "\n".join(f"{k}: {v}" for k, v in values.items())
        asked = rng.sample(keys, rng.randint(1, len(keys)))
        style = rng.randrange(3)
        lines = [
            (f"{k}? {values[k]}", f"What is the {k.replace('_', ' ')}? {values[k]}", f"{values[k]} <- {k}")[style]
            for k in asked
        ]
        return record + "\n\n" + "\n".join(lines)

    def repeat(self, rng: random.Random) -> str:
        """Repeat a sentence, a word list, a list of names or a shuffled sentence."""
        choice = rng.randrange(4)
        if choice == 0:
            text = self.sentence(rng)
        elif choice == 1:
            text = " ".join(rng.choice(self.corpus.words) for _ in range(rng.randint(4, 16)))
        elif choice == 2:
            kinds = [rng.choice(("name", "number", "word")) for _ in range(rng.randint(3, 9))]
            text = ", ".join(self.value(rng, kind) for kind in kinds)
        else:
            words = self.sentence(rng).split()
            rng.shuffle(words)
            text = " ".join(words)
        lead = rng.choice(("Repeat: {}\n{}", "Say it again.\n{}\n{}", "{}\n[{}]", "Copy({})\n{}", "A: {}\nB: {}"))
        return lead.format(text, text)

    def chosen_spans(self, rng: random.Random) -> str:
        """Spans of a sentence in order of appearance under random keys, in any layout."""
        text = self.sentence(rng)
        spans = self.spans(rng, text, rng.choice((2, 3, 4, 5)))
        before, after = self.frame(rng)
        return f"{before}{text}\n{after}{self.layout(rng)(self.key(rng), [(self.key(rng), s) for s, _ in spans])}"

    def presence(self, rng: random.Random) -> str:
        """Yes or no: does the sentence hold this word?"""
        text = self.sentence(rng)
        own = WORD.findall(text) or ["that"]
        lines = []
        for _ in range(rng.randint(1, 4)):
            there = rng.random() < 0.5
            word = rng.choice(own) if there else rng.choice(self.corpus.words)
            lines.append((word, "yes" if re.search(rf"\b{word}\b", text) else "no"))
        before, after = self.frame(rng)
        if rng.random() < 0.5:
            return f"{before}{text}\n{after}check(" + ", ".join(f"with_{w}[{a}]" for w, a in lines) + ")"
        return f"{before}{text}\n" + "\n".join(f"Does it say {w}? {a}" for w, a in lines)

    def fill_in(self, rng: random.Random) -> str:
        """A sentence, the same sentence with one word blanked, and the word."""
        text = self.sentence(rng)
        words = text.split()
        index = rng.randrange(len(words))
        holed = " ".join("____" if i == index else w for i, w in enumerate(words))
        return f"{text}\n{holed}\nMissing: {words[index]}"
