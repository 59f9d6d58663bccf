"""What the data check found, for a run's page."""

from collections.abc import Iterator, Mapping
from typing import Any

from expertune.report.charts import bars
from expertune.report.values import Record, count, entries, figure, number, percent, section

_LENGTHS = (("min", "shortest"), ("median", "median"), ("p95", "95 % up to"), ("max", "longest"))
_COUNTS = (
    ("num_skipped", "skipped as unusable"),
    ("num_flagged", "left out, flagged not to be trained"),
    ("num_empty_prompts", "with an empty prompt"),
    ("num_open_turns", "turns whose end is not learned"),
    ("num_repeated", "repeat an earlier one"),
    ("num_prompts_trained_on", "with a prompt that is trained on"),
    ("num_trained_on", "trained on, token for token"),
)


def data_reports(record: Record) -> list[dict[str, Any]]:
    """What the data check found, for training and for evaluation examples."""
    found = []
    for part, title in (("train", "Training examples"), ("eval", "Evaluation examples")):
        report = section(record, "data", part)
        if not report:
            continue
        histogram = section(report, "length_histogram")
        counts = [int(value) for value in entries(histogram, "counts") if isinstance(value, int)]
        found.append(
            {
                "title": title,
                "facts": list(_data_facts(report)),
                "warnings": [str(warning) for warning in entries(report, "warnings")],
                "skipped": [str(message) for message in entries(report, "skipped")],
                "bars": list(zip(bars(counts), counts, strict=True)),
                "longest": count(number(report, "length", "max")),
                "width": number(histogram, "width") or 0,
            }
        )
    return found


def _data_facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "source", str(report.get("source", "-"))
    yield "layout", f"{report.get('format', '-')}, template {report.get('template', '-')}"
    yield "examples", count(number(report, "num_rows"))
    tokens, trained = number(report, "num_tokens"), number(report, "num_label_tokens")
    if report.get("kind") == "prompts":
        yield "tokens", f"{count(tokens)} in prompts"
    else:
        yield "tokens", f"{count(tokens)}, of which {count(trained)} are trained ({percent(trained, tokens)})"
    if pairs := section(report, "pairs"):
        longer = [count(number(pairs, f"{side}_longer")) for side in ("chosen", "rejected")]
        means = [figure(number(pairs, f"{side}_tokens")) for side in ("chosen", "rejected")]
        yield "longer side of a pair", f"the chosen in {longer[0]}, the rejected in {longer[1]}"
        yield "tokens of an answer, mean", f"{means[0]} chosen, {means[1]} rejected"
    if labels := section(report, "labels"):
        good, bad = count(number(labels, "desirable")), count(number(labels, "undesirable"))
        yield "labels", f"{good} good answers, {bad} bad ones"
    length = section(report, "length")
    yield "length in tokens", ", ".join(f"{words} {count(number(length, key))}" for key, words in _LENGTHS)
    cut = number(report, "num_truncated")
    yield f"cut at {count(number(report, 'max_length'))} tokens", count(cut)
    for key, words in _COUNTS:
        if number(report, key):
            yield words, count(number(report, key))
    used = entries(report, "columns", "used")
    ignored = section(report, "columns", "ignored")
    yield "columns used", ", ".join(map(str, used)) or "-"
    yield "columns ignored", ", ".join(f"{name} (in {held})" for name, held in ignored.items()) or "none"
    if special := section(report, "special_tokens_as_text"):
        yield "special tokens as text", ", ".join(f"{token} ({held})" for token, held in special.items())
