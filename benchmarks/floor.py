"""The floor of a step: the products that no implementation can do without, at the rate of the bare product.

Counted by `step_flops`: every frozen matrix forward, again for gradient checkpointing (lm_head lies outside it), and dX
(the first layer's q, k and v need none: nothing below them is trained). Left out, so that the figure stays a lower
bound: decoding, routing, norms, the loss and the optimizer; attention's products and those of the adapters, which are
small at the recipe's sizes, have functions of their own.

Shape suffixes: M rows, N out_features, K in_features.
"""

import statistics
import time

import torch

from benchmarks.workload import VOCAB_SIZE, Shape

_REPEATS = 6


def step_flops(shape: Shape, tokens: int) -> int:
    """FLOPs of one optimizer step over `tokens` tokens."""
    attention = {name: rows * columns for name, (rows, columns) in shape.attention().items()}
    router = shape.experts * shape.hidden
    layers = 3 * shape.layers * (sum(attention.values()) + router)
    not_needed = attention["q_proj"] + attention["k_proj"] + attention["v_proj"]
    head = 2 * VOCAB_SIZE * shape.hidden
    return 2 * tokens * (layers - not_needed + head) + expert_flops(shape, tokens)


def expert_flops(shape: Shape, tokens: int) -> int:
    """The part of `step_flops` that experts have."""
    weights = sum(rows * columns for rows, columns in shape.expert().values())
    return 2 * tokens * 3 * shape.layers * shape.top_k * weights


def attention_flops(shape: Shape, tokens: int, sequence: int) -> int:
    """Scores and what they weight, causal, in sequences of one length: two products forward, again, four backward."""
    return 8 * tokens * sequence * shape.hidden * shape.layers


def adapter_flops(shape: Shape, tokens: int, rank: int) -> int:
    """Both factors of every matrix forward, again for checkpointing (not lm_head), dX and the factors' gradients."""
    attention = sum(rows + columns for rows, columns in shape.attention().values())
    experts = shape.top_k * sum(rows + columns for rows, columns in shape.expert().values())
    return 2 * tokens * rank * (4 * shape.layers * (attention + experts) + 3 * (VOCAB_SIZE + shape.hidden))


class ProductRates:
    """FLOP/s of `torch.mm` on shapes of the step: one expert's rows and all rows, forward and for input gradients.

    A machine that others share has spells, in which the same product takes three times as long: `measure` is called
    between the rounds of what is timed, so that both are medians of the same minutes.
    """

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype) -> None:
        sizes = {"expert": max(tokens * shape.top_k // shape.experts, 1), "all rows": tokens}
        w_NK = torch.randn(shape.intermediate, shape.hidden).to(dtype)
        self._products = {}
        for name, rows in sizes.items():
            x_MK, dy_MN = torch.randn(rows, shape.hidden).to(dtype), torch.randn(rows, shape.intermediate).to(dtype)
            self._products[name] = x_MK, w_NK.t(), torch.empty_like(dy_MN)
            self._products[f"{name}, input gradient"] = dy_MN, w_NK, torch.empty_like(x_MK)
        self._seconds: dict[str, list[float]] = {name: [] for name in self._products}

    def measure(self) -> None:
        """A few runs of each product."""
        for name, (x, w, out) in self._products.items():
            torch.mm(x, w, out=out)  # warm
            for _ in range(_REPEATS):
                started = time.perf_counter()
                torch.mm(x, w, out=out)
                self._seconds[name].append(time.perf_counter() - started)

    def medians(self) -> dict[str, dict[str, float]]:
        """{name: {"rows", "flops_per_second"}} of all that was measured."""
        found = {}
        for name, (x, w, _) in self._products.items():
            flops = 2 * x.shape[0] * w.shape[0] * w.shape[1]
            found[name] = {"rows": x.shape[0], "flops_per_second": flops / statistics.median(self._seconds[name])}
        return found


def product_rates(shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """The rates at this moment; see `ProductRates`."""
    rates = ProductRates(shape, tokens, dtype)
    rates.measure()
    return rates.medians()
