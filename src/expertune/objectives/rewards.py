"""What answers are rewarded with: functions that ship with this package or a user's own, checked at each call.

A reward function is TRL's: called with `prompts`, `completions` and `completion_ids` of some answers, and with each
column of their examples as a list, it returns a number for each answer, or None where it has none for it.

A run file may come from somebody else, and opening it must not run code. So a function that is not shipped is imported
only where whoever starts the command says so, as with `trust_remote_code`.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any
from zlib import crc32

from expertune.config import RewardConfig
from expertune.data.examples import TokenizedExample
from expertune.errors import ConfigError, RewardError, did_you_mean, first_line, option
from expertune.evaluation.metrics import METRICS, PerAnswer
from expertune.objectives.figures import Figures

# After so many generations in a row in which no group had two different rewards, it is said that nothing is learned.
_PATIENCE = 10

ANSWER = "answer"
"""The column with an example's own answer, which shipped rewards compare with."""

_OWN_COLUMNS = ("prompt", "prompt_ids", "example_ids")


@dataclass(frozen=True)
class Answers:
    """Some answers, and the examples that they are answers to: one entry for each in every list.

    Attributes:
        prompts: as the model read them.
        completions: texts.
        completion_ids: their tokens.
        columns: those of the example.
        places: of the example in its file, for messages.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Sequence[Mapping[str, Any]]
    places: Sequence[str]

    @classmethod
    def to(cls, rows: Sequence[Mapping[str, Any]], texts: Sequence[str], ids: Any, places: Sequence[str]) -> "Answers":
        """Answers to examples of a dataset, in the order of `rows`."""
        columns = [{key: value for key, value in row.items() if key not in _OWN_COLUMNS} for row in rows]
        return cls([row["prompt"] for row in rows], texts, ids, columns, places)

    def halves(self) -> tuple["Answers", "Answers"]:
        """The first half of them, and the second."""
        half = len(self.places) // 2
        first, second = ([values[part] for values in vars(self).values()] for part in (slice(half), slice(half, None)))
        return Answers(*first), Answers(*second)


@dataclass(frozen=True)
class Reward:
    """A function, and what its numbers are multiplied by.

    Attributes:
        name: the run file's.
        weight: of its numbers in the sum.
        function: see the module.
    """

    name: str
    weight: float
    function: Callable[..., Any]

    def of(self, answers: Answers) -> list[float | None]:
        """A number for each answer, or None where the function has none for it.

        Raises:
            RewardError: the function raised, or returned anything else; names it, and the row of the prompt.
        """
        try:
            found = self._call(answers)
        except Exception as error:
            raise RewardError(self._blame(answers, error)) from error
        try:
            rewards = list(found)
        except TypeError:
            raise RewardError(
                f"rewards: {self.name} returned {type(found).__name__}; it must return a list with a number for each "
                "of `completions`"
            ) from None
        if len(rewards) != len(answers.completions):
            raise RewardError(
                f"rewards: {self.name} returned {len(rewards)} numbers for {len(answers.completions)} answers (the "
                f"first is to {answers.places[0]}); it must return one for each of `completions`"
            )
        return [self._number(reward, place) for reward, place in zip(rewards, answers.places, strict=True)]

    def _call(self, answers: Answers) -> Any:
        names = sorted({name for columns in answers.columns for name in columns})
        return self.function(
            prompts=list(answers.prompts),
            completions=list(answers.completions),
            completion_ids=list(answers.completion_ids),
            **{name: [columns.get(name) for columns in answers.columns] for name in names},
        )

    def _blame(self, answers: Answers, error: Exception) -> str:
        """The message for an exception, with the answer that raises by itself: found by halves, in a few calls."""
        while len(answers.places) > 1:
            for half in answers.halves():
                try:
                    self._call(half)
                except Exception as own:
                    answers, error = half, own
                    break
            else:
                break
        if len(answers.places) == 1:
            where = f"for the answer {answers.completions[0][:80]!r} to {answers.places[0]}"
        else:
            where = f"among the answers to {', '.join(dict.fromkeys(answers.places))}"
        fix = "give it **columns, since it is called with all columns" if "keyword" in str(error) else "mend it"
        return f"rewards: {self.name} raised {type(error).__name__} {where}: {first_line(error)}; {fix}"

    def _number(self, reward: Any, place: str) -> float | None:
        if reward is None:
            return None
        value = reward.item() if hasattr(reward, "item") and getattr(reward, "ndim", 0) == 0 else reward
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(
                f"rewards: {self.name} gave {value!r:.80} for an answer to {place}; it must be a finite number, or "
                "None where the function has none for the answer"
            )
        return float(value)


class Rewards:
    """The rewards of a run.

    Args:
        rewards: at least one.
        notify: called once, with a sentence, if answers to one prompt are rewarded alike for long.

    Attributes:
        figures: what is known of a step beside its loss.
    """

    def __init__(self, rewards: Sequence[Reward], notify: Callable[[str], None] = lambda _: None) -> None:
        self.rewards, self._notify, self._num_alike = list(rewards), notify, 0
        self.figures = Figures()

    @property
    def weights(self) -> list[float]:
        """Of each."""
        return [reward.weight for reward in self.rewards]

    def means(self, answers: Answers) -> dict[str, float]:
        """`reward`, the mean of the weighted sums, and the mean of each, by TRL's names.

        Raises:
            RewardError: see `Reward.of`.
        """
        found = {}
        sums = [0.0] * len(answers.completions)
        for reward in self.rewards:
            numbers = reward.of(answers)
            known = [number for number in numbers if number is not None]
            if known:
                found[f"rewards/{reward.name}/mean"] = sum(known) / len(known)
            sums = [total + reward.weight * (number or 0.0) for total, number in zip(sums, numbers, strict=True)]
        return {"reward": sum(sums) / len(sums), **found}

    def watch(self, share_alike: float) -> None:
        """Count a generation.

        Args:
            share_alike: the share of prompts whose answers all got one reward.
        """
        self._num_alike = self._num_alike + 1 if share_alike == 1 else 0
        if self._num_alike == _PATIENCE:
            self._notify(
                f"rewards: in {_PATIENCE} generations in a row all answers to a prompt had the same reward, from which "
                "nothing is learned: raise training.temperature or training.num_generations, start from an adapter "
                "that is right at times (lora.init_from), or give a reward that tells the answers apart"
            )


def load_rewards(configs: Sequence[RewardConfig], trusted: bool) -> list[Reward]:
    """The functions that a run file names.

    Args:
        configs: the run file's.
        trusted: whether code may be imported.

    Raises:
        ConfigError: a function is code and that may not run, or there is none of its name.
    """
    modules: dict[str, Any] = {}
    return [Reward(config.function, config.weight, _function(config.function, trusted, modules)) for config in configs]


def require_answers(configs: Sequence[RewardConfig], examples: Sequence[TokenizedExample]) -> None:
    """Refuse examples without an answer where a shipped reward compares with it.

    Raises:
        RewardError: names the reward and the row.
    """
    shipped = next((config.function for config in configs if not config.is_code), None)
    for example in examples if shipped else ():
        if not (example.columns or {}).get(ANSWER):
            raise RewardError(
                f"{example.place}: the example has no answer, which reward {shipped} compares with; map its column "
                "with data.columns: {completion: NAME}, or give a reward of your own (module:function)"
            )


def _function(name: str, trusted: bool, modules: dict[str, Any]) -> Callable[..., Any]:
    where, colon, attribute = name.rpartition(":")
    if not colon:
        per_answer = METRICS[name].per_answer
        assert per_answer is not None  # the run file was checked
        return partial(_compare, per_answer)
    if not trusted:
        raise ConfigError(
            f"rewards: {name} is Python that the run file names, and that may come from others; if you have read it "
            f"and trust it, give {option('trust-rewards')}"
        )
    if where not in modules:
        modules[where] = _module(where, name)
    function = getattr(modules[where], attribute, None)
    if not callable(function):
        known = [key for key, value in vars(modules[where]).items() if callable(value) and not key.startswith("_")]
        # Short names are alike by chance: `nope` and `none`.
        hint = did_you_mean(attribute, known, cutoff=0.8)
        raise ConfigError(f"rewards: {where} has no function {attribute}{hint}")
    return function


def _compare(per_answer: PerAnswer, completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """A task metric as a reward."""
    return [per_answer(expected, answered) for expected, answered in zip(answer, completions, strict=True)]


def _module(where: str, name: str) -> Any:
    """A module by its name, or a file."""
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        own = f"expertune_rewards_{Path(where).stem}_{crc32(str(Path(where).resolve()).encode()):08x}"
        spec = importlib.util.spec_from_file_location(own, where)
        assert spec is not None
        assert spec.loader is not None  # by the ending
        module = importlib.util.module_from_spec(spec)
        sys.modules[own] = module  # where dataclasses and pickle look for what it defines
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        raise ConfigError(
            f"rewards: {name} cannot be imported: {type(error).__name__}: {first_line(error)}. Name an installed "
            "module, or a file from the working directory, as in my_rewards.py:brevity"
        ) from error
