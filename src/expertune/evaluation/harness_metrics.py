"""What the shipped task files of lm-evaluation-harness name: Expertune's own metrics over a task's answers."""

from collections.abc import Mapping, Sequence

from expertune.evaluation.metrics import METRICS

Pair = tuple[str, str]


def reference_and_answer(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, Pair]:
    """What each figure of a ViGGO example is made of; the harness collects these over all examples."""
    pair = doc["mr"], results[0]
    return {"slot_f1": pair, "exact_match": pair}


def slot_f1(pairs: Sequence[Pair]) -> float:
    """F1 of slots over all answers together."""
    return _figure("slot_f1", pairs)


def exact_match(pairs: Sequence[Pair]) -> float:
    """Share of answers with the reference's slots and no others."""
    return _figure("exact_match", pairs)


def _figure(name: str, pairs: Sequence[Pair]) -> float:
    expected, answered = zip(*pairs, strict=True)
    return METRICS["slot-f1"].score(expected, answered)[name]
