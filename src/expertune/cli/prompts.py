"""What `generate` and `chat` are asked, as their options say it."""

import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from expertune.errors import ConfigError, DataError, naming
from expertune.generation.sampling import Sampling
from expertune.terminal import note

STDIN = "-"


@dataclass(frozen=True)
class Prompts:
    """Prompts as `expertune.answers` takes them.

    Attributes:
        asked: texts, or columns by name.
        places: what errors call them; empty where there is nothing to tell.
    """

    asked: Sequence[str | Mapping[str, Any]]
    places: Sequence[str] = ()


def columns_of(given: Sequence[str] | None) -> dict[str, str]:
    """Values of `--column NAME=TEXT`.

    Raises:
        ConfigError: one is not of this form, or names a column that another one has named.
    """
    columns: dict[str, str] = {}
    for each in given or ():
        name, equals, text = each.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--column {each!r}: write it as NAME=TEXT, for example --column context='Born in 1815.'")
        if name in columns:
            raise ConfigError(f"--column {name} is given twice; a column has one text")
        columns[name] = text
    return columns


def drawn(sampling: Sampling) -> int | None:
    """The seed; where something is drawn and none was given, a new one, which is told, as is what has no effect."""
    if sampling.is_greedy and (sampling.top_p is not None or sampling.top_k is not None):
        if sampling.temperature is None:
            given = "--top-p 1" if sampling.top_k is None else "--top-k 0"
            note(f"{given} leaves out no token, and the most likely one is taken each time; --temperature 1 draws")
        else:
            note("--temperature 0 takes the most likely token each time; --top-p and --top-k change nothing then")
    if sampling.is_greedy and sampling.seed is not None:
        note(f"--seed {sampling.seed} decides nothing: the most likely token is taken each time; --temperature 1 draws")
    if sampling.is_greedy or sampling.seed is not None:
        return sampling.seed
    import secrets  # which loads a library of ciphers

    seed = secrets.randbelow(2**31)
    note(f"drawing with seed {seed}; --seed {seed} draws the same again")
    return seed


def check_prompts(prompt: str | None, file: str | None, columns: Mapping[str, str]) -> None:
    """Refuse what is no way to ask.

    Raises:
        ConfigError: neither a prompt nor a file of them is given, or both, or the prompt holds no text.
    """
    if prompt is not None and file is not None:
        raise ConfigError("--prompt and --prompt-file: give one of the two")
    if prompt is None and file is None and not columns:
        raise ConfigError(
            "nothing is asked: give --prompt TEXT, --prompt-file FILE, or the template's columns as --column NAME=TEXT"
        )
    if prompt is not None and prompt != STDIN:
        _require_text(prompt)


def read_prompts(prompt: str | None, file: str | None) -> Prompts:
    """The prompt, or the prompts of a file; without either, one that `--column` has all of.

    Raises:
        ConfigError: the prompt holds no text.
        DataError: a file cannot be read, is empty or is not UTF-8, or one of its lines is no prompt.
    """
    if file is not None:
        with naming("--prompt-file", DataError):
            return _read_file(file)
    if prompt is None:
        return Prompts([{}])
    if prompt != STDIN:
        return Prompts([prompt])
    content = _stdin()
    try:
        text = content.decode("utf-8").replace("\r\n", "\n").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"stdin: not UTF-8: byte 0x{content[error.start]:02x} at byte offset {error.start}") from None
    _require_text(text)
    return Prompts([text])


def _require_text(prompt: str) -> None:
    if not prompt.strip():
        raise ConfigError("the prompt holds no text; give it as --prompt TEXT, or as --prompt - on stdin")


def _read_file(name: str) -> Prompts:
    """One prompt a line, or the examples of a data file by its name's end; of a pipe, JSONL where line 1 is."""
    from expertune.data.readers import READERS, RawFile, check_whole, read_rows, reader_of

    @dataclass(frozen=True)
    class Piped(RawFile):
        """What has been read from stdin or a pipe, which can be read only once."""

        content: bytes

        @property
        def num_bytes(self) -> int:
            return len(self.content)

        @contextmanager
        def open(self) -> Iterator[BinaryIO]:
            yield io.BytesIO(self.content)

    text = READERS[".txt"]
    path = Path(name)
    if name != STDIN and (not path.exists() or path.is_dir()):
        raise DataError(f"{name}: {'a folder; give a file in it' if path.is_dir() else 'no such file'}")
    if name == STDIN or not path.is_file():
        content, label = (_stdin(), "stdin") if name == STDIN else (path.read_bytes(), name)
        file: RawFile = Piped(Path(label), label, content)
        read = READERS[".jsonl"] if _starts_with_object(content) else text
    else:
        file, read = RawFile(path, name), reader_of(path) or text
    check_whole(file)
    asked: list[str | Mapping[str, Any]] = []
    places = []
    for row in read_rows(file, read):
        if row.values is None:
            raise DataError(f"{row.place}: {row.problem}")
        asked.append(row.values["text"] if read is text else row.values)
        places.append(row.place)
    return Prompts(asked, places)


def _starts_with_object(content: bytes) -> bool:
    first = next((line for line in content.splitlines() if line.strip()), b"")
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _stdin() -> bytes:
    return sys.stdin.buffer.read()
