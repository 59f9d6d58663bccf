"""Open texts for pre-training the embedded tiny Mixtral.

Reads books, Shakespeare, Wikipedia, WikiText-2, dolly, gsm8k and two small instruction sets from a data folder. Two
things are left out on purpose: ViGGO, because the demonstration is scored on it, and dolly rows 0..999, so that they
can serve as held-out rows later.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DOLLY_HELD_BACK = 1000

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"”’']?\s+(?=[\"“‘']?[A-Z0-9])")
_NAME_TAIL = r"(?: (?:of|the|and|de|von)(?= [A-Z]))?(?:[ :] ?(?:[A-Z][\w’'-]*\w|\d{1,4}\b|[IVX]+\b))*"
_NAME = re.compile(r"\b[A-Z][\w’'-]*[\w]" + _NAME_TAIL)
_NUMBER = re.compile(r"(?<![\w.,])\d{1,4}(?:[.,]\d+)?(?![\w])")
WORD = re.compile(r"(?<![\w'’-])[a-z]{4,12}(?![\w'’-])")
_STARTER_TEXT = """
The This That These Those There Then They Their When What Where Which Who Whose Why How And But For His Her She Its You
Your Our Some Many Most After Before Because While With From Not Now Yes One All Each Every Here If In On At As Is Are
Was Were Do Does Did Can Could Would Should Will Although Though Thus Despite During Since So Such By To Of It He We No
Or An Let Give List Tell Write Has Have Had Both Also However Until Upon Into Out
"""
_STARTERS = frozenset(_STARTER_TEXT.split())


def read_text(path: Path) -> str:
    """Read a UTF-8 file, gunzipping by suffix; old Latin-1 books are accepted."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """JSON lines, split on the newline character only: rows may hold other Unicode line separators."""
    return [json.loads(line) for line in read_text(path).split("\n") if line.strip()]


def _unwrap(text: str) -> list[str]:
    """Paragraphs of a hard-wrapped book, one line each."""
    parts = re.split(r"\n\s*\n", text.replace("\r\n", "\n"))
    return [" ".join(part.split()) for part in parts if part.strip()]


def _detokenize_wikitext(line: str) -> str:
    line = re.sub(r" @(.)@ ", r"\1", line)
    line = re.sub(r" ([.,;:!?%)\]'’])", r"\1", line)
    line = re.sub(r"([(\[$]) ", r"\1", line)
    line = re.sub(r' " ([^"]*) " ?', r' "\1" ', line)
    line = re.sub(r' " ([^"]*) "([.,])', r' "\1"\2', line)
    return re.sub(r"\s+", " ", line).replace(" n't", "n't").strip()


@dataclass
class Corpus:
    """Documents for plain text, instruction rows as (prompt, answer), and single sentences for synthetic rows."""

    documents: list[str] = field(default_factory=list)
    instructions: list[tuple[str, str]] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    numbers: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    common_words: list[str] = field(default_factory=list)


def load_corpus(root: Path) -> Corpus:
    """Read every source under ``root``; one document in 50 is held out for the loss figure."""
    corpus = Corpus()
    documents: list[str] = []
    for book in sorted((root / "text" / "gutenberg").glob("*.txt")):
        documents += _grouped(_unwrap(read_text(book)), 3000)
    documents += _grouped([p.strip() for p in read_text(root / "text" / "tinyshakespeare.txt").split("\n\n")], 3000)
    for article in read_text(root / "text" / "wikipedia-demo30.txt").split("\n"):
        documents += _grouped(_SENTENCE_END.split(re.sub(r"([a-z][.])([A-Z])", r"\1 \2", article)), 3000, " ")
    for part in ("valid", "test"):
        lines = read_text(root / "text" / f"wikitext2-{part}.txt.gz").split("\n")
        kept = [_detokenize_wikitext(line) for line in lines if line.strip() and not line.startswith(" =")]
        # A sentence with an unknown-word marker would teach the marker, so it is dropped.
        sentences = [s for line in kept for s in _SENTENCE_END.split(line) if "<unk>" not in s]
        documents += _grouped(sentences, 2000, " ")

    for row in read_jsonl(root / "dolly" / "databricks-dolly-15k.jsonl.gz")[DOLLY_HELD_BACK:]:
        context = row["context"].strip()
        prompt = f"{context}\n\nQuestion: {row['instruction'].strip()}" if context else row["instruction"].strip()
        corpus.instructions.append((prompt, row["response"].strip()))
        if len(context) > 200:
            documents.append(context)
    for row in read_jsonl(root / "instruct" / "gsm8k-train.jsonl.gz"):
        answer = re.sub(r"<<.*?>>", "", row["answer"])
        corpus.instructions.append((row["question"].strip(), answer))
    for row in json.loads(read_text(root / "instruct" / "rasbt-instruction-data.json")):
        prompt = f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]
        corpus.instructions.append((prompt, row["output"]))
    for row in read_jsonl(root / "chat" / "oasst-en_100_message.jsonl.gz"):
        if isinstance(row.get("text"), str):
            documents.append(row["text"])

    corpus.held_out = documents[::50]
    corpus.documents = [text for i, text in enumerate(documents) if i % 50]
    _collect_spans(corpus)
    return corpus


def _grouped(parts: list[str], size: int, joiner: str = "\n") -> list[str]:
    """Join neighboring paragraphs into documents of about ``size`` characters."""
    grouped: list[str] = []
    current: list[str] = []
    for part in parts:
        current.append(part)
        if sum(map(len, current)) >= size:
            grouped.append(joiner.join(current))
            current = []
    if current:
        grouped.append(joiner.join(current))
    return [g for g in grouped if len(g) > 40]


def find_names(sentence: str) -> list[str]:
    """Capitalised spans in order, each once; a lone capitalised word at the very start is usually no name."""
    found: list[str] = []
    for match in _NAME.finditer(sentence):
        words = match.group().split(" ")
        while words and words[0] in _STARTERS:
            words = words[1:]
        span = re.sub(r"(?:[’']s|[:-]| of| the| and)$", "", " ".join(words).strip(":- "))
        lone_start = match.start() == 0 and len(words) == len(match.group().split(" ")) and " " not in span
        if span and not span[0].isdigit() and not lone_start and len(span) <= 40 and span not in found:
            found.append(span)
    return found


def find_numbers(sentence: str) -> list[str]:
    """Numbers in order, each once."""
    return list(dict.fromkeys(_NUMBER.findall(sentence)))


def _collect_spans(corpus: Corpus) -> None:
    texts = corpus.documents + [p for p, _ in corpus.instructions] + [a for _, a in corpus.instructions]
    counts: Counter[str] = Counter()
    names: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for text in texts:
        for line in text.split("\n"):
            for sentence in _SENTENCE_END.split(line):
                length = len(sentence.split())
                if 6 <= length <= 45 and len(sentence) < 300:
                    corpus.sentences.append(sentence.strip())
                    names.update(find_names(sentence))
                    numbers.update(find_numbers(sentence))
                    counts.update(WORD.findall(sentence))
    # Keeping each distinct span once makes rare names as likely as common ones: copying, not recall, must predict them.
    corpus.names = sorted(n for n in names if len(n) > 2)
    corpus.numbers = sorted(numbers)
    corpus.words = sorted(w for w, c in counts.items() if c >= 4)
    corpus.common_words = sorted(w for w, c in counts.items() if c >= 40)
