"""How good a model is on examples: its loss, and the task's metric on answers that it writes.

Legend: T tokens, V vocabulary, N label tokens.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from expertune.config import TaskConfig
from expertune.data import IGNORE_INDEX, TokenizedExample, encode_prompt
from expertune.errors import ConfigError, DataError
from expertune.evaluation.metrics import METRICS, Metric
from expertune.generation.decoding import PLAIN, Batches, complete, evaluation_mode
from expertune.generation.sampling import Sampling
from expertune.objectives.figures import Figures, LossOutput
from expertune.objectives.log_probs import ForwardHook

_MOST_EXAMPLE_CHARS = 400_000
_FEWEST_EXAMPLES = 8

Feature = Mapping[str, Any]

# (inputs, labels [B, T]) -> summed loss and number of labels, or None where only the logits will do.
SummedLoss = Callable[[Mapping[str, Tensor], Tensor], tuple[float, int] | None]


def evaluation_loss(
    model: nn.Module,
    dataset: Sequence[Feature],
    collator: Callable[[Sequence[Feature]], dict[str, Any]],
    batch_size: int,
    in_chunks: SummedLoss | None = None,
    batches: Batches = PLAIN,
) -> float:
    """Mean cross entropy over all label tokens, each of them weighing the same.

    Only the language-model loss: a router's auxiliary loss, which some models add while training, is no part of it.

    Args:
        model: the model in any mode; its mode is restored.
        dataset: examples as `expertune.data.make_dataset` returns them.
        collator: examples -> batch, as `expertune.data.make_collator` returns it.
        batch_size: examples of a batch.
        in_chunks: takes a batch's loss without its logits, as `LanguageModelLoss.summed` does.
        batches: what is done with each batch besides.

    Returns:
        The loss in nats per token.

    Raises:
        DataError: no example holds a token that takes a loss.
    """
    device = next(model.parameters()).device

    def summed(counts: bool, batch: Mapping[str, Any]) -> tuple[float, int]:
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
            if name not in ("example_ids", "use_cache")
        }
        labels = inputs.pop("labels")
        with batches.watched(inputs) if counts else nullcontext():
            taken = in_chunks(inputs, labels) if in_chunks else None
            return taken or _summed_loss(model(**inputs, use_cache=False).logits, labels)

    total, num_tokens = 0.0, 0.0
    with evaluation_mode(model), torch.no_grad():
        for start, counts in batches.ranks.rounds(range(0, len(dataset), batch_size)):
            batch = collator([dataset[index] for index in range(start, min(start + batch_size, len(dataset)))])
            for batch_total, batch_tokens in batches.in_parts(partial(summed, counts), batch):
                total += batch_total * counts
                num_tokens += batch_tokens * counts
            if batches.progress:
                batches.progress(min(start + batch_size, len(dataset)), len(dataset))
    total, num_tokens = batches.ranks.total([total, num_tokens])
    if not num_tokens:
        raise DataError("the evaluation examples hold no token that takes a loss")
    return total / num_tokens


def evaluation_figures(
    model: nn.Module,
    dataset: Sequence[Feature],
    collator: Callable[[Sequence[Feature]], dict[str, Any]],
    batch_size: int,
    taken: Callable[[Mapping[str, Any], ForwardHook], LossOutput],
    batches: Batches = PLAIN,
) -> dict[str, float]:
    """The loss and figures of an objective over answers, each as the mean over the examples.

    Args:
        model: the model in any mode; its mode is restored.
        dataset: examples as `expertune.data.make_dataset` returns them.
        collator: examples -> batch.
        batch_size: examples of a batch.
        taken: takes the loss of a batch on the model's device.
        batches: what is done with each batch besides.

    Returns:
        `loss`, and the figures by their names.
    """
    device, found = next(model.parameters()).device, Figures(batches.ranks)

    def of_batch(counts: bool, batch: Mapping[str, Any]) -> LossOutput:
        on_device = {name: each.to(device) if isinstance(each, Tensor) else each for name, each in batch.items()}
        return taken(on_device, batches.watched if counts else PLAIN.watched)

    with evaluation_mode(model), torch.no_grad():
        for start, counts in batches.ranks.rounds(range(0, len(dataset), batch_size)):
            batch = collator([dataset[index] for index in range(start, min(start + batch_size, len(dataset)))])
            for part in batches.in_parts(partial(of_batch, counts), batch):
                figures = {"loss": (part.loss.item(), part.num_examples)} | part.figures
                for name, (figure, count) in figures.items():
                    found.add(name, figure, count * counts)
            if batches.progress:
                batches.progress(min(start + batch_size, len(dataset)), len(dataset))
    found.add_up()
    return found.take()


def score_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedExample],
    task: TaskConfig,
    batches: Batches = PLAIN,
) -> dict[str, Any]:
    """Let the model answer examples and measure the answers.

    Args:
        model: the model in any mode; its mode is restored.
        tokenizer: the model's tokenizer.
        rows: evaluation examples; the first `task.rows` of them are answered.
        task: metric, longest answer and batch size.
        batches: see `expertune.generation.decoding.complete`.

    Returns:
        `metric`, `rows` (how many were answered), the figures of the metric, `seconds`, and `examples`: as many of the
        first ones as make a record of sensible size, each as `prompt`, `expected`, `answered`, `right`, and `figure`
        where the metric has one of a single answer.

    Raises:
        ConfigError: the task names no metric.
        DataError: an example's answer is no reference for the metric, or a prompt leaves no room in the context.
    """
    if task.metric is None:
        raise ConfigError(f"task.metric names no metric; set it to one of {', '.join(METRICS)}")
    metric = METRICS[task.metric]
    rows = rows[: task.rows]
    for row in rows:
        if problem := metric.problem(row.completion):
            raise DataError(
                f"data.eval: {row.place}: the answer {row.completion.strip()!r} {problem}, or correct the row"
            )
    started = time.monotonic()
    prompts = [encode_prompt(row.prompt, tokenizer) for row in rows]

    def answer(some: Sequence[list[int]]) -> list[str]:
        sampling = Sampling(task.max_new_tokens)
        return [each.text for each in complete(model, tokenizer, some, sampling, task.batch_size, batches)]

    answers = batches.ranks.spread(prompts, answer)
    seconds = time.monotonic() - started
    figures = metric.score([row.completion for row in rows], answers)
    examples = list(_examples(rows, answers, metric))
    return {"metric": task.metric, "rows": len(rows), **figures, "seconds": seconds, "examples": examples}


def _examples(rows: Sequence[TokenizedExample], answers: Sequence[str], metric: Metric) -> Iterator[dict[str, Any]]:
    """Answered examples from the first on, until their texts are as long together as is kept."""
    num_chars = 0
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        num_chars += len(row.prompt) + len(row.completion) + len(answer)
        if num_chars > _MOST_EXAMPLE_CHARS and number >= _FEWEST_EXAMPLES:
            return
        yield {
            "prompt": row.prompt,
            "expected": row.completion.strip(),
            "answered": answer.strip(),
            "right": metric.is_right(row.completion, answer),
        } | ({"figure": metric.per_answer(row.completion, answer)} if metric.per_answer else {})


def _summed_loss(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[float, int]:
    """Summed cross entropy of the next token, and how many tokens it sums over."""
    targets = labels_BT[:, 1:]
    trained = targets != IGNORE_INDEX
    # Only label positions go to float32: on long prompts they are few, and logits are the largest tensor there is.
    logits_NV = logits_BTV[:, :-1][trained].float()
    loss = F.cross_entropy(logits_NV, targets[trained], reduction="sum")
    return loss.item(), logits_NV.shape[0]
