"""What a run's objective is, and what its figures say, from the record: for page, summary, card and comparison."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from expertune.evaluation.metrics import Figure
from expertune.evaluation.objective_figures import OBJECTIVES, shown_objective_figures
from expertune.report.charts import Chart, Point, Series, centered_mean, is_number, mean_width, points_of
from expertune.report.values import Record, at, begins_as_base, entries, number, section

_FEWEST_AVERAGED = 80

# Charts of figures by TRL's names: title, and (name in the legend, name) of what is drawn in it.
_CHARTS = (
    (
        "Reward accuracy: share of pairs whose chosen answer has the higher reward",
        (("training", "rewards/accuracies"),),
    ),
    ("Reward margin: reward of good answers minus that of bad ones", (("training", "rewards/margins"),)),
    ("Rewards of good and of bad answers", (("good", "rewards/chosen"), ("bad", "rewards/rejected"))),
    ("Log-probability of an answer (nats)", (("good", "logps/chosen"), ("bad", "logps/rejected"))),
    ("Reward of the answers that the model writes", (("training", "reward"),)),
    ("Spread of rewards between answers to a prompt (standard deviation)", (("training", "reward_std"),)),
    ("Tokens of an answer that the model writes", (("training", "completions/mean_length"),)),
    ("Answers that were cut at the longest (share)", (("training", "completions/clipped_ratio"),)),
    ("KL divergence from the reference (nats)", (("training", "kl"),)),
)
_DRAWN = {name for _, lines in _CHARTS for _, name in lines}


def objective_of(record: Record) -> str:
    """The run's objective by its name in the run file."""
    name = at(record, "config", "objective")
    return name if isinstance(name, str) and name in OBJECTIVES else "sft"


def loss_unit(record: Record) -> str:
    """What the loss is of, in words."""
    if (objective := objective_of(record)) != "sft":
        return f"of {objective.upper()}"
    return f"per {'token' if at(record, 'data', 'train', 'train_on') == 'all' else 'answer token'} (nats)"


def all_tie(train: Record) -> bool:
    """Whether all pairs of a run's first step have two answers of one reward: the model is its own reference there.

    No chosen answer has the higher reward then, which is an accuracy of 0, and not one that is worse than chance.
    """
    first = [points_of(train.get(name)) for name in ("rewards/accuracies", "rewards/margins")]
    return all(points and points[0][1] == 0 for points in first)


class HeldOut(NamedTuple):
    """A figure of the evaluation examples.

    Attributes:
        figure: which one.
        base: of the base model, before training; None where it was not evaluated.
        at_start: at step 0 of a run whose adapter changed the base before it was trained: of that adapter; else None.
        after: at the adapter's step, or the last so far; None where it was not evaluated.
    """

    figure: Figure
    base: Any
    at_start: Any
    after: Any

    @property
    def is_known(self) -> bool:
        """Whether there is something to show."""
        return any(value is not None for value in (self.base, self.at_start, self.after))

    @property
    def begins_at_step_0(self) -> bool:
        """Whether what there is of the time before training is of the adapter as it began, and not of the base."""
        return self.base is None and self.at_start is not None

    def before(self, show: Callable[[Any], str]) -> str:
        """Where training began: the base model, unless it says otherwise."""
        if self.begins_at_step_0:
            return f"{show(self.at_start)} at step 0"
        return show(self.base)


def held_out_figures(record: Record) -> list[HeldOut]:
    """The objective's figures on evaluation examples.

    Where the model is its own reference at step 0, all rewards are zero there, and nothing is told of them.
    """
    evaluated = dict(_evaluations(record))
    if not evaluated:
        return []
    is_reference = objective_of(record) in ("dpo", "kto")
    first: Mapping[str, Any] = {} if is_reference else evaluated.get(0, {})
    last = evaluated.get(number(record, "adapter", "step") or -1, {})
    if not last and at(record, "run", "status") != "finished":
        last = evaluated[max(evaluated)]
    base, start = (first, {}) if begins_as_base(record) else ({}, first)
    shown = shown_objective_figures({**first, **last})
    return [HeldOut(each, base.get(each.name), start.get(each.name), last.get(each.name)) for each in shown]


def held_out_loss(record: Record) -> HeldOut:
    """The loss on evaluation examples."""
    base, after = at(record, "eval", "before"), at(record, "eval", "after")
    losses = points_of(at(record, "eval", "loss"))
    first = losses[0][1] if losses and losses[0][0] == 0 else None
    is_of_base = begins_as_base(record)
    if after is None and losses and at(record, "run", "status") != "finished":
        after = losses[-1][1]
        base = first if is_of_base else base
    return HeldOut(Figure("loss", "loss", higher_is_better=False), base, None if is_of_base else first, after)


def objective_charts(record: Record) -> list[Chart]:
    """The objective's figures by step, in training and on evaluation examples."""
    train, evaluated = section(record, "train"), evaluation_series(record)
    found = []
    for title, lines in _CHARTS:
        series: list[Series] = []
        for place, (legend, name) in enumerate(lines):
            points = points_of(train.get(name))
            series += with_mean(legend, points, 2 * place, _FEWEST_AVERAGED)
            held_out = "evaluation examples" if legend == "training" else f"{legend}, evaluation examples"
            series.append(Series(held_out, points_of(evaluated.get(name)), 2 * place + 1, "dots"))
        # Rewards and margins are below zero as well.
        found.append(
            Chart(title, series, from_zero=not any("rewards/" in name or "logps/" in name for _, name in lines))
        )
    own = {name: values for name, values in train.items() if name.startswith("rewards/") and name.endswith("/mean")}
    for place, (name, values) in enumerate(sorted(own.items())):
        series = with_mean("training", points_of(values), place % 8, _FEWEST_AVERAGED)
        series.append(Series("evaluation examples", points_of(evaluated.get(name)), 1, "dots"))
        found.append(Chart(f"Reward {name.removeprefix('rewards/').removesuffix('/mean')}", series))
    return found


def evaluation_series(record: Record) -> dict[str, list[Any]]:
    """[step, figure] of evaluations while training, by name; the loss apart."""
    found: dict[str, list[Any]] = {}
    for step, figures in _evaluations(record):
        for name, value in figures.items():
            found.setdefault(str(name), []).append([step, value])
    return found


def _evaluations(record: Record) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """(step, figures) of evaluations while training."""
    for entry in entries(record, "eval", "scores"):
        if isinstance(entry, list) and len(entry) == 2 and is_number(entry[0]) and isinstance(entry[1], Mapping):
            yield entry[0], entry[1]


def is_of_objective(name: str) -> bool:
    """Whether a figure has a place in `objective_charts`."""
    return name in _DRAWN or (name.startswith("rewards/") and name.endswith("/mean"))


def with_mean(name: str, points: list[Point], color: int, fewest: int = 400) -> list[Series]:
    """A series, and the mean around each step where it has so many points that its line could hide its course."""
    if len(points) < fewest:
        return [Series(name, points, color)]
    mean = f"{name}, mean of {mean_width(len(points))} steps around each"
    return [Series(f"{name}, each step", points, color, "faint"), Series(mean, centered_mean(points), color)]
