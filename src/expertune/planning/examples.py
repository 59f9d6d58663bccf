"""How many examples a run has and how long they are, for the time that a plan expects."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from expertune.config import RunConfig
from expertune.data.sources import find_source, local_bytes, rows_of_slices
from expertune.errors import DataError, ExpertuneError, naming
from expertune.planning.duration import Lengths
from expertune.planning.passes import passes_of

# A plan tokenizes sources of up to so much text, and counts the examples of those up to so much: a few seconds' work.
_MOST_TOKENIZED, _MOST_READ = 8_000_000, 200_000_000


def read_lengths(
    config: RunConfig,
    trust_remote_code: bool = False,
    tokenized: Callable[[RunConfig, bool], Lengths] | None = None,
) -> Lengths:
    """What is known of a run's examples without going online: by its tokenizer, or by their number alone.

    Args:
        config: the run.
        trust_remote_code: run Python that ships with the model's tokenizer.
        tokenized: looks at tokens in place of `expertune.planning.tokenized.tokenized_lengths`.
    """
    data, folder = config.data, Path(config.model).expanduser()
    unread = None
    try:
        sizes = []
        for key, spec in (("data.train", data.train), ("data.eval", data.eval)):
            with naming(key, DataError):
                sizes += [] if spec is None else [local_bytes(spec)]
        if folder.is_dir() and all(num_bytes is not None and num_bytes <= _MOST_TOKENIZED for num_bytes in sizes):
            return (tokenized or _tokenized)(config, trust_remote_code)
    except ExpertuneError as error:  # at which a run stops; a plan goes without
        unread = str(error)
    counted = _count(data.eval) if data.eval else 0
    longest = passes_of(config).sequences * data.max_length
    return Lengths(_count(data.train), longest, counted, longest, data.packing != "padded", unread=unread)


def _tokenized(config: RunConfig, trust_remote_code: bool) -> Lengths:
    from expertune.planning.tokenized import tokenized_lengths  # which imports transformers' tokenizers

    return tokenized_lengths(config, trust_remote_code)


def _count(spec: str | list[str]) -> int | None:
    """How many examples a source has; None where that is not known without going online, or it is large."""
    with suppress(ExpertuneError):
        if (count := rows_of_slices(spec)) is not None:
            return count
        if (num_bytes := local_bytes(spec)) is not None and num_bytes <= _MOST_READ:
            return sum(find_source(spec).read(stream=True).num_rows.values())
    return None
