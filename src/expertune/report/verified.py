"""What engines found of an export, for its model card."""

from collections.abc import Mapping
from typing import Any

from expertune.report.markdown import exact, figure, how_many, plain, table, words

_OTHER_LOSSES = {"base": "of the base alone", "trained": "of the run's own model, in 4 bits"}


def verified(verification: Mapping[str, Any]) -> str:
    """What came of each engine, as a table with notes; empty where none was run.

    Args:
        verification: content of an export's `verification.json`.
    """
    engines = verification.get("engines") or ()
    head = "engine", "verdict", "difference", "allowed", "effect of the adapter", "experts reached"
    shown = table(head, [_engine_row(each) for each in engines])
    if not shown:
        return ""
    notes = []
    if any("differences" in (each.get("figures") or {}) for each in engines):
        notes.append(
            "Log-probabilities of every token, on evaluation examples and random tokens, are compared with those of "
            "stock transformers in float32, in nats. A wrong expert is found where the prompts reach it."
        )
    if any("relative_difference" in (each.get("figures") or {}) for each in engines):
        notes.append(
            "Relative differences are those of what an engine's loader would multiply by; or of each tensor of a file, "
            "by the size of what the adapter adds to it."
        )
    notes += [line for each in engines if (line := _loss(each))]
    is_of_16_bits = (verification.get("options") or {}).get("base") == "source"
    if is_of_16_bits and verification.get("compared_on") == "dequantized":
        notes.append(
            "The base of this comparison, losses included, has the values of the run's 4-bit weights: its 16-bit ones "
            "were not at hand."
        )
    reasons = [(str(each.get("engine")), str(each["reason"])) for each in engines if each.get("reason")]
    lines = [f"- {words(name)}: {words(reason)}" for name, reason in reasons]
    return "\n\n".join([*notes, shown, *(["\n".join(lines)] if lines else [])])


def _loss(engine: Mapping[str, Any]) -> str:
    """The loss that an engine found of the export; nothing where it takes none."""
    figures = engine.get("figures") or {}
    loss = figures.get("loss") or {}
    if not isinstance(loss.get("exported"), int | float):
        return ""
    beside = [f"{figure(loss[key])} {what}" for key, what in _OTHER_LOSSES.items() if loss.get(key) is not None]
    also = f" ({', '.join(beside)})" if beside else ""
    count, name = how_many(figures.get("examples"), "evaluation example"), plain(str(engine.get("engine")))
    return f"In {name} its loss on {count} is {figure(loss['exported'])}{also}."


def _engine_row(engine: Mapping[str, Any]) -> tuple[str, ...]:
    """Name, verdict and figures of one engine."""
    figures = engine.get("figures") or {}
    differences, experts = figures.get("differences") or {}, figures.get("experts") or {}
    found = [exact(differences.get("exported")), exact(figures.get("tolerance")), exact(differences.get("effect"))]
    if figures.get("measure") == "mean":
        found = [each if each == "-" else f"{each} (mean)" for each in found]
    if "relative_difference" in figures:
        found[:2] = [f"{exact(figures[f'relative_{each}'])} (relative)" for each in ("difference", "tolerance")]
    reached = f"{experts.get('reached')} of {experts.get('of')}" if experts.get("of") else "-"
    return (str(engine.get("engine")), str(engine.get("verdict")), *found, reached)
