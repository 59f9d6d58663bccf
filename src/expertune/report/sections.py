"""The parts of a run's page, from its record: plain values that the template lays out.

Every part may be missing, in a record of an earlier release or of a run that is still going on.
"""

import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from expertune.config import RunConfig, Section
from expertune.evaluation.metrics import shown_figures
from expertune.report.charts import Chart, Drawing, Point, Series, draw, is_number, points_of
from expertune.report.expert_maps import deaths_in_words
from expertune.report.objective import (
    evaluation_series,
    held_out_figures,
    held_out_loss,
    is_of_objective,
    loss_unit,
    objective_charts,
    with_mean,
)
from expertune.report.values import (
    PLANNED_PHASES,
    Record,
    at,
    count,
    duration,
    entries,
    figure,
    flattened,
    number,
    percent,
    section,
    selected_experts,
    setting,
    size,
)

Facts = list[tuple[str, str]]

_FEWEST_AVERAGED = 80
_PHASES = {"loss": "loss of a step", "layer": "layer of a step", "save": "checkpoint"}


def status(record: Record) -> dict[str, Any]:
    """How far the run is, in words, and why it stopped."""
    steps, last = number(record, "train", "steps"), _last_step(record)
    state = str(at(record, "run", "status") or "not started")
    started = number(record, "run", "started")
    planned = number(record, "train", "max_steps")
    taken = last if steps is None or state == "running" else steps
    whole = f" of {planned:,.0f}" if planned and taken < planned else ""
    progress = f"{taken:,.0f}{whole} step{'' if taken == 1 and not whole else 's'}"
    return {
        "state": state,
        "progress": progress,
        "processes": _processes(section(record, "train")),
        "error": str(at(record, "run", "error") or ""),
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else "",
    }


def _processes(train: Mapping[str, Any]) -> str:
    """How many processes trained, if it was more than one, and what they did with the experts."""
    several = number(train, "processes") or 1
    held = {"replicate": "replicated", "shard": "sharded", "parallel": "shared out"}.get(str(train.get("experts")), "")
    return f"{several:,.0f} processes{f', experts {held}' if held else ''}" if several > 1 else ""


def outcome(record: Record) -> dict[str, Any]:
    """What came out: scores before and after, and what it took."""
    before, after = section(record, "task", "before"), section(record, "task", "after")
    scores = [
        {"label": each.label, "before": before.get(each.name), "after": after.get(each.name)}
        for each in shown_figures(after or before)
    ]
    for each in (*held_out_figures(record), held_out_loss(record)):
        if each.is_known:
            label = f"{each.figure.label} on evaluation examples"
            scores.append({"label": label, "before": each.before(figure), "after": each.after})
    trained = points_of(at(record, "train", "loss"))
    training = {"label": "training loss", "before": trained[0][1], "after": trained[-1][1]} if trained else None
    return {
        "scores": scores,
        "training": training if not scores else None,
        "examples": count(number(after or before, "rows")),
        "scored": bool(after or before),
        "loss_examples": count(number(record, "data", "eval", "num_rows")),
        "tiles": list(_tiles(record)),
    }


def _tiles(record: Record) -> Iterator[tuple[str, str, str]]:
    """(label, figure, note) of what the run took."""
    if elapsed := number(record, "run", "seconds"):
        steps = sum(seconds for _, seconds in points_of(at(record, "train", "seconds")))
        yield "time", duration(elapsed), f"of which {duration(steps)} in training steps" if steps else ""
    elif steps := sum(seconds for _, seconds in points_of(at(record, "train", "seconds"))):
        yield "time", duration(steps), "in training steps"
    if peak := number(record, "memory", "peak_bytes"):
        planned = number(record, "plan", "memory", "peak_bytes")
        device = str(at(record, "model", "device") or "")
        several = (number(record, "train", "processes") or 1) > 1
        where = "on the GPU" if device.startswith("cuda") else "of the process"
        where += ", the fullest of all" if several else ""
        yield "peak memory", size(peak), where + (f"; {size(planned)} planned" if planned else "")
    if speed := number(record, "throughput", "tokens_per_second"):
        total = number(record, "throughput", "tokens")
        yield "speed", f"{speed:,.0f} tokens/s", f"{count(total)} tokens seen" if total else ""
    yield from _adapter_tile(record)
    if selection := section(record, "adapter", "selection"):
        yield "experts", *selected_experts(selection)


def _adapter_tile(record: Record) -> Iterator[tuple[str, str, str]]:
    adapter = section(record, "adapter")
    trained = number(adapter, "trainable") or number(record, "plan", "parameters", "trainable")
    note = f"{count(trained)} trained weights" if trained else ""
    if adapter.get("checkpoint"):
        best = f"the best by {adapter.get('metric')} ({figure(adapter.get('value'))})"
        yield "adapter", str(adapter["checkpoint"]), f"{best}; {note}" if note else best
    elif "step" in adapter:
        yield "adapter", f"step {count(number(adapter, 'step'))}", f"the last; {note}" if note else "the last"
    elif note:
        yield "adapter", "not written" + (" yet" if at(record, "run", "status") == "running" else ""), note


def charts(record: Record) -> list[Drawing]:
    """Loss, learning rate, gradient norm, speed and load of the experts by step."""
    train = section(record, "train")
    losses = points_of(train.get("loss"))
    drawn = [
        Chart(
            f"Loss {loss_unit(record)}",
            [
                *with_mean("training", losses, 0, _FEWEST_AVERAGED),
                Series("evaluation examples", points_of(at(record, "eval", "loss")), 1, "dots"),
            ],
            marks=_best(record),
        ),
        *objective_charts(record),
        Chart(
            "Losses of the routers, without their coefficients",
            [
                *with_mean("load balancing", points_of(train.get("router_aux_loss")), 4),
                *with_mean("z-loss", points_of(train.get("router_z_loss")), 7),
            ],
            from_zero=False,
        ),
        Chart("Learning rate", [Series("learning rate", points_of(train.get("learning_rate")), 2)]),
        Chart("Gradient norm before clipping", with_mean("gradient norm", points_of(train.get("grad_norm")), 3)),
        Chart("Tokens per second of a step", with_mean("tokens per second", _speeds(train), 5)),
        Chart(
            "Imbalance: tokens of a layer's busiest expert over the mean (1 is even)",
            with_mean("imbalance", points_of(train.get("expert_imbalance")), 4),
            from_zero=False,
        ),
        Chart(
            "Tokens of an expert in a step",
            [
                *with_mean("busiest of any layer", points_of(train.get("expert_tokens_most")), 4),
                *with_mean("least busy", points_of(train.get("expert_tokens_least")), 7),
            ],
        ),
    ]
    unused = points_of(train.get("experts_unused"))
    drawn.append(Chart("Experts without a token in a step, of all layers (%)", [Series("unused", unused, 4)]))
    for name, points in evaluation_series(record).items():
        if not is_of_objective(name):
            told = name.replace("_", " ")
            drawn.append(Chart(f"{told} on evaluation examples", [Series(told, points_of(points), 1, "dots")]))
    return [drawing for drawing in map(draw, drawn) if drawing]


def _best(record: Record) -> list[tuple[float, str]]:
    """Where the adapter is from, if it is that of the best checkpoint; else the evaluation with the lowest loss."""
    step, checkpoint = number(record, "adapter", "step"), at(record, "adapter", "checkpoint")
    if checkpoint and step is not None:
        return [(step, f"the adapter: {checkpoint}, the best by {at(record, 'adapter', 'metric')}")]
    evaluated = points_of(at(record, "eval", "loss"))
    if len(evaluated) < 2:
        return []
    step, loss = min(evaluated, key=lambda point: point[1])
    return [(step, f"lowest evaluation loss, {figure(loss)} at step {count(step)}")]


def _speeds(train: Record) -> list[Point]:
    """Tokens per second of each step."""
    tokens, times = dict(points_of(train.get("tokens"))), points_of(train.get("seconds"))
    return [(step, tokens[step] / seconds) for step, seconds in times if step in tokens and seconds]


def plan(record: Record) -> dict[str, Any]:
    """The plan beside what was measured, and what its memory consists of."""
    made, rows = section(record, "plan"), []
    phases = {name: number(record, "run", "phases", name) or 0 for name in section(record, "run", "phases")}
    counted = sum(phases.get(name, 0) for name in PLANNED_PHASES)
    is_least = at(made, "time", "is_least") is True  # nothing was estimated that the run could be compared with
    limits = {"time of training, evaluations and answers": "at least", "tokens per second": "at most"}
    for label, planned, measured, shown in (
        ("peak memory", number(made, "memory", "peak_bytes"), number(record, "memory", "peak_bytes"), size),
        ("time of training, evaluations and answers", number(made, "run", "seconds"), counted or None, duration),
        (
            "tokens per second",
            number(made, "time", "tokens_per_second"),
            number(record, "throughput", "tokens_per_second"),
            count,
        ),
        (
            "sequences in a micro-batch",
            number(made, "micro_batch", "rows"),
            number(record, "train", "micro_batch", "rows"),
            count,
        ),
    ):
        if planned is not None or measured is not None:
            if is_least and planned is not None and label in limits:
                rows.append((label, f"{limits[label]} {shown(planned)}", shown(measured), ""))
            else:
                rows.append((label, shown(planned), shown(measured), percent(measured, planned)))
    if layers := section(made, "placement", "layers"):
        held = section(record, "placement", "layers")
        rows.append(("expert layers", _in_words(layers), _in_words(held), ""))
    kept, keeps = number(made, "kept", "layers"), number(record, "train", "kept_layers")
    if kept or keeps:
        rows.append(("expert layers that keep gate and up", count(kept), count(keeps), ""))
    peak = number(made, "memory", "peak_bytes") or 0
    return {
        "rows": rows,
        "phase": _phase(str(at(made, "memory", "moment") or "")),
        "components": _shares(section(made, "memory", "components"), peak, size),
        "phases": [(_phase(name), *rest) for name, *rest in _shares(section(made, "memory", "moments"), peak, size)],
        "times": _shares(phases, sum(phases.values()), duration),
        "line": str(at(made, "parameters", "line") or ""),
        "notes": [str(note) for note in entries(made, "notes")],
    }


def _phase(name: str) -> str:
    return _PHASES.get(name, name)


def _in_words(layers: Mapping[str, Any]) -> str:
    return ", ".join(f"{held} on {place}" for place, held in layers.items()) or "-"


def _shares(values: Mapping[str, Any], whole: float, shown: Callable[[float], str]) -> list[tuple[str, str, float]]:
    """(name, figure in words, percent of a whole) of figures above zero, the largest first."""
    known = {name: value for name in values if (value := number(values, name))}
    ordered = sorted(known.items(), key=lambda item: -item[1])
    return [(name, shown(value), round(100 * value / whole, 1) if whole else 0) for name, value in ordered]


def preflight(record: Record) -> Facts:
    """What the preflight check found."""
    found = section(record, "preflight")
    if not found:
        return []
    facts = [("result", "passed" if found.get("passed") else f"failed: {found.get('failed', 'no reason is recorded')}")]
    if bits := number(found, "four_bit", "bits_per_expert_weight"):
        weights = count(number(found, "four_bit", "expert_weights"))
        facts.append(("experts", f"{weights} weights at {bits:.2f} bits each"))
    if (learning := number(found, "learning", "factors_learning")) is not None:
        without = count(number(found, "learning", "factors_without_tokens"))
        facts.append(("adapter factors", f"{count(learning)} receive a gradient; {without} saw no token"))
    if "repeatable" in found:
        facts.append(("forward", "repeatable to the bit" if found["repeatable"] else "not repeatable"))
    if (change := number(found, "effective", "largest_logit_change")) is not None:
        same = at(found, "effective", "disabled_equals_base")
        disabled = "is the base model's" if same else "is not the base model's"
        facts.append(("adapter in use", f"changes a logit by up to {change:g}; disabled, the output {disabled}"))
    if seconds := number(found, "seconds"):
        facts.append(("took", duration(seconds)))
    return facts


def settings(record: Record) -> list[tuple[str, str, str]]:
    """(key, value, default) of the run file's values that are not our default; of `training` transformers has them."""
    known, found = defaults(), []
    for key, value in flattened(at(record, "config")).items():
        if key not in known or known[key] != value:
            default = setting(known[key]) if known.get(key) is not None else ""
            found.append((key, setting(value), default or ("transformers' own" if key.startswith("training.") else "")))
    return found


def defaults() -> dict[str, Any]:
    """Values that the run file need not give, by dotted keys; of `training` transformers has them."""
    return flattened(_defaults(RunConfig))


def _defaults(keys: type[Section]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, about in keys.model_fields.items():
        if not about.is_required():
            default = about.get_default(call_default_factory=True)
            values[name] = default.model_dump(mode="json") if hasattr(default, "model_dump") else default
        elif isinstance(about.annotation, type) and issubclass(about.annotation, Section):
            values[name] = _defaults(about.annotation)
    return values


def notes(record: Record) -> list[str]:
    """What of the run file could not be used as written, and what was changed when memory ran out."""
    lines = [str(note) for note in entries(record, "train", "notes")]
    deaths = {name: rows for name, rows in section(record, "train", "experts_died").items() if _are_numbers(rows)}
    if deaths:
        lines.append(deaths_in_words(deaths))
    for change in entries(record, "train", "recoveries"):
        step, during, what = at(change, "step"), at(change, "during"), at(change, "change")
        lines.append(f"memory ran out at step {step} ({during}): {what}")
    return lines


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def versions(record: Record) -> Facts:
    """Releases of what decides a run's numbers."""
    return [(str(name), str(release)) for name, release in section(record, "versions").items() if name != "executable"]


def commands(record: Record, run_dir: str) -> list[tuple[str, str]]:
    """(purpose, command) of what can be done with the run, as far as it has come."""
    quoted, state = shlex.quote(run_dir), str(at(record, "run", "status"))
    processes = number(record, "train", "processes") or 1
    started = f"torchrun --nproc-per-node {processes:.0f} -m expertune" if processes > 1 else "expertune"
    found = []
    if state == "finished":
        found.append(("Ask the tuned model", f"expertune chat {quoted}"))
        if at(record, "config", "data", "eval"):
            found.append(("Score it again", f"expertune evaluate {quoted}"))
    elif state in ("stopped", "interrupted"):
        found.append(("Continue it, from its newest checkpoint if there is one", f"{started} train {quoted} --resume"))
    found.append(("Train the same run again", f"{started} train {quoted} output_dir=runs/again"))
    return [*found, ("Build this page again", f"expertune report {quoted}")]


def run_file(record: Record) -> str:
    """The run file as it was used, with its overrides."""
    config = section(record, "config")
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True) if config else ""


def _last_step(record: Record) -> float:
    losses = points_of(at(record, "train", "loss"))
    return losses[-1][0] if losses else 0
