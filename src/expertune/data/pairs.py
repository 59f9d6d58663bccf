"""The data check of answers that are compared: what a set of pairs, labels or prompts does as a whole.

Pairs without a difference and answers without text are refused one by one, in `answers`. What is told here can be
meant: pairs that stand twice, answers told apart by their length alone, prompts that are evaluated and trained on. The
last is told of examples that are imitated, too, where they are the same as a whole.
"""

import dataclasses
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from expertune.data.examples import TokenizedExample, TokenizedExamples, hash_of
from expertune.errors import DataError

# A share of pairs in which one side is longer that hardly comes about by chance, of so many pairs.
_ONE_SIDED, _MIN_PAIRS = 0.85, 20


class AnswerTally:
    """Counts over examples of a preference objective, taken while they come one by one; of others it counts nothing."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._lengths = [0, 0]
        self._num_longer = [0, 0]
        self._labels = [0, 0]
        self._kind = ""
        self._num_white = 0

    def add(self, example: TokenizedExample) -> None:
        """Count one example."""
        if example.rejected is not None:
            self._kind = "pairs"
            lengths = [side.uncut_length - example.num_prompt_tokens for side in example.sides]
            self._lengths = [total + length for total, length in zip(self._lengths, lengths, strict=True)]
            self._num_longer[0] += lengths[0] > lengths[1]
            self._num_longer[1] += lengths[0] < lengths[1]
            self._num_white += example.completion.split() == example.rejected.completion.split()
        elif example.label is not None:
            self._kind = "labels"
            self._labels[example.label] += 1
        elif example.columns is not None:
            self._kind = "prompts"
        else:
            return
        label = [] if example.label is None else [int(example.label)]
        self._hashes.append(hash_of(*(side.input_ids for side in example.sides), label))

    def report(self) -> dict[str, Any]:
        """Plain values for the run record: `kind`, `num_repeated`, and `pairs` or `labels`; nothing of other examples.

        `pairs` has the mean tokens of both answers, and in how many pairs each is the longer and in how many they
        differ in white space alone; `labels` how many answers are good ones and how many are not.
        """
        if not self._kind:
            return {}
        count = len(self._hashes)
        report: dict[str, Any] = {"kind": self._kind, "num_repeated": count - len(np.unique(self._hashes))}
        if self._kind == "pairs":
            report["pairs"] = {
                "chosen_tokens": self._lengths[0] / count,
                "rejected_tokens": self._lengths[1] / count,
                "chosen_longer": self._num_longer[0],
                "rejected_longer": self._num_longer[1],
                "differ_in_white_space": self._num_white,
            }
        elif self._kind == "labels":
            report["labels"] = {"desirable": self._labels[1], "undesirable": self._labels[0]}
        return report


def answer_warnings(report: Mapping[str, Any]) -> Iterator[str]:
    """What pairs, labels or prompts do that their owner may not have meant.

    Args:
        report: of the source, with what `AnswerTally.report` gives.
    """
    count = report["num_rows"]
    if repeated := report.get("num_repeated"):
        one = {"pairs": "pairs", "labels": "answers with their label", "prompts": "prompts"}[report["kind"]]
        yield f"{repeated} of {count} {one} stand in the data before, and count once more each time"
    pairs = report.get("pairs")
    if pairs and (alike := pairs.get("differ_in_white_space")):
        yield (
            f"chosen and rejected differ in white space alone in {alike} of {count} pairs, so that this is all they "
            "teach"
        )
    if pairs and count >= _MIN_PAIRS:
        means = f"{pairs['chosen_tokens']:.0f} tokens on average against {pairs['rejected_tokens']:.0f}"
        if pairs["chosen_longer"] >= _ONE_SIDED * count:
            yield (
                f"the chosen answer is the longer one in {pairs['chosen_longer']} of {count} pairs ({means}), so "
                "length alone tells most of them apart, and longer answers may be what is learned"
            )
        elif pairs["rejected_longer"] >= _ONE_SIDED * count:
            yield (
                f"the chosen answer is the shorter one in {pairs['rejected_longer']} of {count} pairs ({means}). That "
                "is as it should be where brevity is wanted; elsewhere, see whether chosen and rejected are the right "
                "way round"
            )
    if (labels := report.get("labels")) and (only := _only_label(labels)):
        yield f"every label is {only}; metrics of rewards need both kinds"


def require_both_labels(report: Mapping[str, Any]) -> None:
    """Refuse to train on labels of one kind.

    Args:
        report: of the training examples.

    Raises:
        DataError: there are labels, and all are the same.
    """
    if (labels := report.get("labels")) and (only := _only_label(labels)):
        raise DataError(
            f"{report['source']}: every one of {report['num_rows']} labels is {only}, and objective: kto learns from "
            f"good and bad answers; add answers of the other kind, or train on good ones alone with objective: sft"
        )


def with_leak_told(train: TokenizedExamples, evaluation: TokenizedExamples) -> TokenizedExamples:
    """The evaluation examples; their report tells how many are trained on: of what is compared, how many prompts."""
    num_leaked = int(np.isin(evaluation.overlap_hashes, train.overlap_hashes).sum())
    key = "num_prompts_trained_on" if "kind" in evaluation.report else "num_trained_on"
    report = evaluation.report | {key: num_leaked}
    if warning := leak_warning(report):
        report["warnings"] = [*report["warnings"], warning]
    return dataclasses.replace(evaluation, report=report)


def leak_warning(report: Mapping[str, Any]) -> str:
    """What a report from `with_leak_told` says of evaluation examples that are trained on; empty where none are."""
    count = report["num_rows"]
    if leaked := report.get("num_prompts_trained_on"):
        return (
            f"{leaked} of {count} have a prompt that the training examples have too, so that what is measured on them "
            "is partly learned by heart"
        )
    if leaked := report.get("num_trained_on"):
        return (
            f"{leaked} of {count} evaluation examples are trained on, token for token, so that what is measured on "
            "them, and the checkpoint that is best by it, is partly learned by heart; take them out of data.train"
        )
    return ""


def _only_label(labels: Mapping[str, int]) -> str:
    if not labels["undesirable"]:
        return "true"
    return "" if labels["desirable"] else "false"
