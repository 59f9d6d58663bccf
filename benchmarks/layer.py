"""One expert layer, forward and backward, with the recipe's adapters: seconds, share of the bare product's rate, peers.

Peers hold the same weights and factors in this process: bitsandbytes' own product, matrix by matrix of each expert; and
`torch.nn.functional.grouped_mm` over the decoded weights, as transformers runs experts that are not 4-bit. Tokens are
real text's: each token of the text is one random vector, and a random router chooses, so that what repeats in the text
repeats here.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, R routed rows, E experts, r rank.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import floor, report
from benchmarks.peers.bitsandbytes_weight import bitsandbytes_weight
from benchmarks.timing import extra_bytes, interleave, median_ratio
from benchmarks.workload import DOLLY_SAMPLE, Lora, Shape, token_ids
from expertune.kernels import native, routes, workspace
from expertune.kernels.expert_mlp import Activation, ExpertLayer, LoraUpdate, expert_mlp, reference
from expertune.kernels.nf4 import Nf4Stack

# Relative to the largest value of each tensor; float32 differs by the order of sums, bfloat16 by its rounding.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Forward = Callable[[Tensor, Tensor], Tensor]

PEERS = {"bitsandbytes, per expert": "by_bitsandbytes", "grouped_mm on decoded weights": "by_grouped_mm"}
"""Methods of `Layer`, by the peers' names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"hidden": 2048, "intermediate": 7168, "experts": 8, "top-k": 2, "tokens": 320, "rounds": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    report.add_dtype_argument(parser)
    parser.add_argument("--text", type=Path, default=DOLLY_SAMPLE, help="JSONL rows in dolly's layout")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report.

    Raises:
        CorrectnessError: a stack's output or gradients are not those of plain float32 arithmetic.
    """
    shape = Shape(args.hidden, args.intermediate, 1, args.experts, args.top_k)
    dtype = report.resolve_dtype(args.dtype, "cpu")
    layers = {
        report.name_of(each): Layer(shape, Lora(), args.tokens, args.text, each)
        for each in report.dtypes_of_peers(args.dtype, "cpu")
    }
    layer = layers[report.name_of(dtype)]
    route = routes.KernelSettings().choose(torch.device("cpu"), args.tokens * args.top_k / args.experts, dtype)
    stacks: dict[str, Forward] = {f"ours, {route}": layer.ours(route) for route in _routes()}
    for name, forward in stacks.items():
        layer.require_plain_result(name, forward)
    runs = {name: layer.step(forward) for name, forward in stacks.items()}
    dtypes = dict.fromkeys(stacks, report.name_of(dtype))
    for name, method in PEERS.items():
        for each in layers.values():
            each.require_plain_result(name, getattr(each, method))
        tried = {each: of_dtype.step(getattr(of_dtype, method)) for each, of_dtype in layers.items()}
        dtypes[name] = _fastest(tried)
        runs[name] = tried[dtypes[name]]
    chosen = f"ours, {route}"
    seconds = interleave(runs | {"ours, no LoRA": layer.step(layer.ours(route, lora=False))}, args.rounds)
    lora = 1 - 1 / median_ratio(seconds[chosen], seconds["ours, no LoRA"])
    rates = floor.product_rates(shape, args.tokens, dtype)
    flops = 2 * 6 * args.tokens * args.top_k * args.hidden * args.intermediate
    bare = rates["expert"]["flops_per_second"]
    result = {
        "benchmark": "layer",
        "dtype": report.name_of(dtype),
        "dtypes": dtypes,
        "tokens": args.tokens,
        "rows_per_expert": layer.rows_per_expert,
        "chosen": chosen,
        "seconds": seconds,
        "ratios": {name: median_ratio(times, seconds[chosen]) for name, times in seconds.items()},
        "extra_bytes": {name: _extra_bytes(each) for name, each in runs.items()},
        "lora_share": lora,
        "floor": {
            "flops": flops,
            "product_rates": rates,
            "share_reached": flops / statistics.median(seconds[chosen]) / bare,
            "share_with_recomputation": flops * 8 / 6 / statistics.median(seconds[chosen]) / bare,
        },
        "model": {**vars(shape), "lora": vars(Lora()) | {"dropout": 0.0}},
        **report.environment(),
    }
    if args.json:
        report.write(args.json, result)
    _show(result)
    return result


class Layer:
    """Weights, factors and inputs of one expert layer.

    Args:
        shape: of the layer.
        lora: rank and alpha; dropout only where `dropout` is set, later.
        tokens: of the batch.
        text: whose tokens they are.
        dtype: of inputs and products.
        device: where all of it lies.
        fill: writes a stack's weights; None quantizes normal ones.

    Attributes:
        dropout: probability on the adapters' inputs; 0 at first, for results are compared without.
    """

    def __init__(
        self,
        shape: Shape,
        lora: Lora,
        tokens: int,
        text: Path,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        fill: Callable[[Nf4Stack], None] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dropout = 0.0

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        E, D, size = shape.experts, shape.hidden, shape.intermediate
        self.shape, self.dtype, self.scaling = shape, dtype, lora.alpha / lora.r
        self.gate_up, self.down = Nf4Stack(2 * E, size, D, device=device), Nf4Stack(E, D, size, device=device)
        for stack in (self.gate_up, self.down):
            if fill is not None:
                fill(stack)
                continue
            for index in range(stack.num_matrices):
                stack.write(index, normal(stack.out_features, stack.in_features) / stack.in_features**0.5)
        self.factors = [
            ((normal(E, lora.r, width) / width**0.5).to(device), (normal(E, height, lora.r) * 0.01).to(device))
            for width, height in ((D, size), (D, size), (size, D))
        ]
        ids_T = token_ids(text, tokens)
        hidden_TD = normal(int(ids_T.max()) + 1, D)[ids_T]
        scores_TE = (hidden_TD @ normal(D, E) / D**0.5).softmax(dim=-1)
        weights_TK, self.index_TK = scores_TE.topk(shape.top_k, dim=-1)
        self.index_TK = self.index_TK.to(device)
        self.hidden_TD = hidden_TD.to(device, dtype).requires_grad_()
        self.weights_TK = (weights_TK / weights_TK.sum(dim=-1, keepdim=True)).to(device, dtype).requires_grad_()
        self.dout_TD = normal(tokens, D).to(device, dtype)
        self.activation = Activation(_swiglu, columnwise=True, swiglu=True)
        self.rows_per_expert = torch.bincount(self.index_TK.flatten(), minlength=E).tolist()
        for factor in (factor for pair in self.factors for factor in pair):
            factor.requires_grad_()
        self._decoded: tuple[Tensor, Tensor] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden_TD, self.weights_TK, *(factor for pair in self.factors for factor in pair)]

    @property
    def updates(self) -> list[LoraUpdate]:
        return [LoraUpdate(part, a, b, self.scaling, self.dropout) for part, (a, b) in enumerate(self.factors)]

    def step(self, forward: Forward) -> Callable[[], object]:
        """Forward and backward; returns output and gradients."""
        leaves = self.leaves

        def run() -> tuple[Tensor, tuple[Tensor | None, ...]]:
            out = forward(self.hidden_TD, self.weights_TK)
            return out, torch.autograd.grad(out, leaves, self.dout_TD, allow_unused=True)

        return run

    def require_plain_result(self, name: str, forward: Forward) -> None:
        """Output and gradients against plain float32 arithmetic; taken once, and held against every stack."""
        if not hasattr(self, "_plain"):
            plain = reference.expert_mlp(
                *(self.hidden_TD, self.index_TK, self.weights_TK, self.gate_up, self.down),
                *(self.activation, self.updates),
            )
            self._plain = [plain.detach(), *torch.autograd.grad(plain, self.leaves, self.dout_TD.float())]
        out = forward(self.hidden_TD, self.weights_TK)
        found = [out.detach(), *torch.autograd.grad(out, self.leaves, self.dout_TD)]
        for what, one, plain in zip(("output", *("gradient",) * len(self.leaves)), found, self._plain, strict=True):
            error = float((one.float() - plain.float()).abs().max() / plain.float().abs().max())
            if error > _TOLERANCE[self.dtype]:
                raise report.CorrectnessError(f"{name}: {what} is off by {error:.1e} of its largest value")

    def ours(self, route: str, lora: bool = True, **settings: Any) -> Forward:
        """The layer by a route, with other values of `KernelSettings` where some are given."""
        kernels = routes.KernelSettings(route, name="benchmark", **settings)
        frozen = self.gate_up, self.down, ExpertLayer(self.activation, settings=kernels)

        def forward(hidden: Tensor, weights: Tensor) -> Tensor:
            out, _ = expert_mlp(hidden, self.index_TK, weights, *frozen, self.updates if lora else [])
            return out

        forward.settings = kernels  # what ran is known there
        return forward

    def by_bitsandbytes(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """The loop over experts that stacks of separate `Linear4bit`s run, with PEFT's arithmetic for LoRA."""
        out = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        # Taken apart once, so that no expert's gradient is as large as the factors of all.
        factors = [(a.unbind(), b.unbind()) for a, b in self.factors]
        for expert in range(self.shape.experts):
            tokens, choices = (self.index_TK == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            x = hidden[tokens]
            pairs = [(a[expert], b[expert]) for a, b in factors]
            gate, up = (self._linear4bit(self.gate_up, 2 * expert + part, x, pairs[part]) for part in range(2))
            y = self._linear4bit(self.down, expert, F.silu(gate) * up, pairs[2])
            out = out.index_add(0, tokens, (y * weights[tokens, choices, None]).float())
        return out.to(hidden.dtype)

    def _linear4bit(self, stack: Nf4Stack, index: int, x: Tensor, factors: tuple[Tensor, Tensor]) -> Tensor:
        a, b = factors
        base = bnb.matmul_4bit(x, *bitsandbytes_weight(stack, index, x.dtype))
        dropped = F.dropout(x.float(), self.dropout)
        return base + (self.scaling * F.linear(F.linear(dropped, a), b)).to(x.dtype)

    def by_grouped_mm(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """All experts in one product over 16- or 32-bit weights, as transformers 5 runs them."""
        if self._decoded is None:
            E, size, D = self.shape.experts, self.shape.intermediate, self.shape.hidden
            first = torch.stack([self.gate_up.dequantize(index, self.dtype) for index in range(2 * E)])
            second = torch.stack([self.down.dequantize(index, self.dtype) for index in range(E)])
            self._decoded = first.view(E, 2 * size, D).transpose(1, 2), second.transpose(1, 2)
        order_R = self.index_TK.flatten().argsort(stable=True)
        offsets_E = torch.bincount(self.index_TK.flatten(), minlength=self.shape.experts).cumsum(0).int()
        tokens_R = order_R // self.shape.top_k
        x = hidden[tokens_R]
        gate, up = F.grouped_mm(x, self._decoded[0], offs=offsets_E).chunk(2, dim=-1)
        gate, up = (each + self._grouped_lora(x, part, offsets_E) for part, each in enumerate((gate, up)))
        inter = F.silu(gate) * up
        y = F.grouped_mm(inter, self._decoded[1], offs=offsets_E) + self._grouped_lora(inter, 2, offsets_E)
        weighted = y * weights.flatten()[order_R, None]
        return torch.zeros_like(hidden).index_add(0, tokens_R, weighted.to(hidden.dtype))

    def _grouped_lora(self, x: Tensor, update: int, offsets_E: Tensor) -> Tensor:
        a, b = (factor.to(x.dtype).transpose(1, 2) for factor in self.factors[update])
        return F.grouped_mm(F.grouped_mm(x, a, offs=offsets_E), b, offs=offsets_E) * self.scaling


def _fastest(runs: dict[str, Callable[[], object]]) -> str:
    """The name of the run that is the fastest; of a single one nothing is run."""
    if len(runs) == 1:
        return next(iter(runs))
    seconds = interleave(runs, rounds=1)
    return min(seconds, key=lambda name: seconds[name])


def _extra_bytes(run: Callable[[], object]) -> int | None:
    """Of a run that begins without what earlier ones left."""
    workspace.clear()
    return extra_bytes(run)


def _routes() -> list[str]:
    return [routes.FUSED, routes.DEQUANT_GEMM] if native.available() else [routes.DEQUANT_GEMM]


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _show(result: dict[str, Any]) -> None:
    rows = [
        [
            name,
            f"{statistics.median(times):.3f}",
            result["dtypes"].get(name, result["dtype"]),
            f"{result['ratios'][name]:.2f}",
            "" if (extra := result["extra_bytes"].get(name)) is None else f"{extra / 1e6:,.0f}",
        ]
        for name, times in result["seconds"].items()
    ]
    rates = result["floor"]
    title = (
        f"Expert layer, forward + backward, {result['tokens']} tokens, {result['dtype']}, on {result['device']}, "
        f"{result['threads']} threads"
    )
    notes = [
        f"rows of each expert: {result['rows_per_expert']}",
        f"LoRA of rank 8 takes {result['lora_share']:.0%} of the layer",
        f"{rates['share_reached']:.2f} of the rate of a bare product of as many rows, recomputation not counted; "
        f"{rates['share_with_recomputation']:.2f} with it",
        "outputs and gradients of all checked against plain float32 arithmetic",
    ]
    report.show(title, ["", "seconds", "dtype", f"times {result['chosen']}", "extra MB"], rows, notes)
