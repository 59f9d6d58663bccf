"""How the next token of an answer is chosen, and how long an answer may be: for commands and in Python."""

from dataclasses import dataclass

from expertune.errors import ConfigError

# Beyond these the most likely token always wins, or every token is as likely as any other.
_COLDEST, _HOTTEST = 0.01, 100.0

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Sampling:
    """Greedy by default: the most likely token each time.

    Attributes:
        max_new_tokens: the longest answer. An answer also ends where the model's context does.
        temperature: 0 is greedy; any other value draws tokens by their probability at this temperature. None means 1
            where `top_p` or `top_k` leaves tokens out, otherwise 0.
        top_p: draw from the most likely tokens whose probabilities add up to this; 1 means all.
        top_k: draw from this many most likely tokens; 0 means all.
        seed: of the draws; None means torch's own generator, as it is.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_new_tokens: int = 100
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more")
        if self.temperature and not _COLDEST <= self.temperature <= _HOTTEST:  # NaN is in no range
            raise ConfigError(
                f"temperature is {self.temperature}; it must be 0, which takes the most likely token each time, or "
                f"from {_COLDEST} to {_HOTTEST:g}"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0, which means all tokens, or more")
        if self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            raise ConfigError(f"seed is {self.seed}; it must be from 0 to {_MAX_SEED}")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        if self.temperature is None:
            return self.top_p in (None, 1) and not self.top_k
        return self.temperature == 0
