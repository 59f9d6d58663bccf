"""How long a step takes at the least, which is arithmetic over a rate or bytes over another, and how long is expected.

Shape suffixes: T tokens of a micro-batch, D hidden size.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from expertune.adapt.amounts import EXACT_SIDE, EXTRA_COLUMNS
from expertune.gpus import Link, Rates
from expertune.kernels.amounts import FLOAT16
from expertune.planning.communication import Traffic
from expertune.planning.inventory import Layer, count_adapter
from expertune.planning.placement import PlannedPlacement
from expertune.planning.settings import Workload

# Share of the floor's speed that a step reaches. CPU: the optimizer step with AVX2 of docs/performance-details.md, 87.8
# of 118 tokens a second by arithmetic, and less where GEMMs are thin. CUDA: an assumption, nothing has been measured.
EFFICIENCY = {"cpu": 0.6, "cuda": 0.4}

# Hidden size of the smallest model whose time is estimated. Below, a step is mostly what lies around its products: one
# of the demo (256) can take several times as long as expected, and the estimate is given as a limit alone.
_SMALLEST_ESTIMATED = 1024


def decomposition_flops(shape: tuple[int, int], rank: int) -> float:
    """Operations that the largest singular values of a matrix cost; see `expertune.adapt.initial.low_rank`.

    All of a small matrix cost about 20 for each weight and feature of its smaller side;
    a subspace costs eight products with it.
    """
    smaller = min(shape)
    per_weight = 20.0 * smaller if smaller <= EXACT_SIDE else 16.0 * (min(rank, smaller) + EXTRA_COLUMNS)
    return shape[0] * shape[1] * per_weight


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step.

    Attributes:
        floor_seconds: least time, by `rates`.
        seconds: what is expected: the floor by the efficiency, and the transfers that it cannot hide.
        tokens: of a step on all ranks, by the bound that the plan counts with.
        efficiency: share of the floor's speed that is expected.
        flops: arithmetic of a step; a multiply-add is two.
        brought_bytes: expert bytes that are transferred to the device in a step.
        waiting_seconds: of `seconds`, how long the device waits for these, and for layers that are gathered.
        sending_seconds: of `seconds`, how long gradients and tokens are on their way between ranks.
        rates: what was divided by.
        is_least: the model's products are too small for an estimate, and `seconds` are at the least.
    """

    floor_seconds: float
    seconds: float
    tokens: int
    efficiency: float
    flops: float
    brought_bytes: int
    waiting_seconds: float
    sending_seconds: float
    rates: Rates
    is_least: bool

    @property
    def tokens_per_second(self) -> float:
        """Tokens of a step over the expected seconds."""
        return self.tokens / self.seconds

    @property
    def source(self) -> str:
        """Where the rates are from, in words."""
        return "measured while others kept the machine busy" if self.rates.was_busy else self.rates.source

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


@dataclass(frozen=True)
class StepCost:
    """What the time of a step is made of.

    Attributes:
        workload: what runs.
        placement: where the experts are held.
        accumulation: micro-batches of a step.
        rates: how fast the device is.
        traffic: what a rank sends in the step.
        link: what it sends over.
    """

    workload: Workload
    placement: PlannedPlacement
    accumulation: int
    rates: Rates
    traffic: Traffic
    link: Link

    def of_batch(self, tokens: float, sequence_length: float) -> "StepCost":
        """The same for micro-batches of so many tokens, in sequences of such a length."""
        tokens, length = max(round(tokens), 1), max(round(sequence_length), 1)
        return replace(self, workload=replace(self.workload, tokens=tokens, sequence_length=length))

    def time(self) -> StepTime:
        """Time of an optimizer step."""
        w, accumulation, rates = self.workload, self.accumulation, self.rates
        efficiency, silent = EFFICIENCY[w.device], w.passes.silent
        # Forwards without gradients come before the one with them.
        passes, moved, flops = (
            [each_way[0]] * silent + list(each_way)
            for each_way in (self._passes, self._moved, [each.total for each in _flops(w)])
        )
        each_forward, each_backward = self.placement.transferred_bytes
        writing = self._writing_seconds()
        expected = [seconds / efficiency for seconds in passes]
        waiting = sum(max(transfer - computed, 0.0) for transfer, computed in zip(moved, expected, strict=True))
        ahead = [max(passes[0], moved[0])] if self._looks_ahead else []
        sending = (self.traffic.gradient_bytes + self.traffic.token_bytes) / self.link.bytes_per_second
        return StepTime(
            floor_seconds=accumulation * sum([*map(max, passes, moved), *ahead]) + efficiency * writing + sending,
            seconds=accumulation * (sum(expected) + waiting + sum(ahead) / efficiency) + writing + sending,
            tokens=w.inventory.distribution.world_size * accumulation * w.tokens,
            efficiency=efficiency,
            flops=accumulation * sum(flops),
            brought_bytes=accumulation * ((1 + silent) * each_forward + each_backward),
            waiting_seconds=accumulation * waiting,
            sending_seconds=sending,
            rates=rates,
            is_least=w.inventory.hidden_size < _SMALLEST_ESTIMATED,
        )

    def forward_seconds(self) -> float:
        """Expected time of the forward of one batch, as evaluations and answers have it."""
        return max(self._passes[0] / EFFICIENCY[self.workload.device], self._moved[0])

    def _writing_seconds(self) -> float:
        """Expected time of a step's share of the answers that it trains on: prompts at once, then token by token."""
        passes, length = self.workload.passes, self.workload.sequence_length
        if not passes.written:
            return 0.0
        prompt = max(length - passes.written, 1)
        reading = self.of_batch(passes.written_at_once * prompt, prompt).forward_seconds()
        token = self.of_batch(passes.written_at_once, 1).forward_seconds()
        return self.accumulation / passes.written_for * (reading + passes.written * token)

    @property
    def _looks_ahead(self) -> bool:
        """Whether a forward of the whole step comes first, for the routers' load-balancing loss."""
        parts = self.accumulation * self.workload.inventory.distribution.world_size
        return self.workload.router_losses[0] > 0 and parts > 1

    @property
    def _passes(self) -> list[float]:
        """Least seconds of a micro-batch's forward and backward; the 4-bit weights are read once each way."""
        reading = self.workload.inventory.read_bytes / self.rates.bytes_per_second
        return [max(flops.seconds(self.rates), reading) for flops in _flops(self.workload)]

    @property
    def _moved(self) -> list[float]:
        """Seconds of what is transferred or gathered each way while another layer computes, if that takes as long."""
        gathering = self.traffic.weight_bytes / self.link.bytes_per_second / (2 * self.accumulation)
        each_way = self.placement.transferred_bytes
        return [num_bytes / self.rates.link_bytes_per_second + gathering for num_bytes in each_way]


class _Flops(NamedTuple):
    """Floating-point operations: of GEMMs with weights that a CPU may make in integers, and of all others."""

    weights: float
    others: float

    @property
    def total(self) -> float:
        return self.weights + self.others

    def seconds(self, rates: Rates) -> float:
        """How long they take at the least."""
        of_weights = rates.integer_flops_per_second or rates.flops_per_second
        return self.weights / of_weights + self.others / rates.flops_per_second


def _flops(w: Workload) -> tuple[_Flops, _Flops]:
    """Floating-point operations of a micro-batch that must be, in forward and in backward.

    Counted are the frozen GEMMs of forward, their input gradients, gate and up once more in backward where they are not
    kept (with checkpointing everything but the experts), attention, the output head and the adapter; with DoRA the
    output of down once more, and the norms.
    """
    T, inventory = w.tokens, w.inventory
    to_recompute = sum(len(layer.experts) for layer in inventory.layers) - w.kept_layers
    forward = backward = beside = beside_backward = 0.0
    for layer in inventory.layers:
        # Weights that a token meets in the experts: of gate and up, and of down.
        down = inventory.top_k * sum(spec.hidden_size * spec.intermediate_size for spec in layer.experts.values())
        gate_up = down * max((len(spec.projections) - 1 for spec in layer.experts.values()), default=0)
        linears = sum(out_features * in_features for out_features, in_features in layer.linears.values())
        # Scores and values over the earlier half of a sequence; backward computes each twice, and the scores again.
        scores = T * w.sequence_length * (inventory.attention.query + inventory.attention.output)
        beside += scores
        beside_backward += (2.5 + w.checkpointing) * scores
        recomputed = 2 * T * linears if w.checkpointing else 0.0
        recomputed += 2 * T * gate_up if to_recompute > 0 else 0.0
        to_recompute -= len(layer.experts)
        forward += 2 * T * (gate_up + down + linears)
        backward += 2 * T * (gate_up + down + linears) + recomputed
        if w.targets.use_dora:
            backward += 2 * T * down
            beside_backward += _norm_flops(w, layer)
            if w.dropout:  # the dropped input is multiplied by W too
                forward += 2 * T * (gate_up + down)
                backward += 2 * T * (2 * gate_up + down)
    head = 2 * T * inventory.vocab_size * inventory.hidden_size
    # Each factor is multiplied once forward; backward has its own gradient and its input's.
    adapter = 2 * T * w.given_ranks * count_adapter(inventory, w.targets, experts_of=lambda _: inventory.top_k)
    if w.compute_dtype == FLOAT16:  # of which the head is multiplied in float32 where 4-bit weights are in integers
        return _Flops(forward, beside + head + adapter), _Flops(backward, beside_backward + head + 2 * adapter)
    return _Flops(forward + head, beside + adapter), _Flops(backward + head, beside_backward + 2 * adapter)


def _norm_flops(w: Workload, layer: Layer) -> float:
    """Of DoRA's norms in a step: the update is computed for every weight of an adapted matrix, and added.

    Those of the experts are computed once, whatever the tokens are; PEFT computes a linear's from an identity matrix.
    """
    flops = 0.0
    for name, spec in layer.experts.items():
        weights = w.inventory.experts_here(spec) * spec.hidden_size * spec.intermediate_size
        flops += sum((2 * rank + 3) * weights for rank, _ in w.targets.experts.get(name, {}).values())
    for name, (out_features, in_features) in layer.linears.items():
        if name in w.targets.linears:
            rank = w.targets.linears[name].rank
            flops += 2 * rank * in_features * (in_features + out_features) + 3 * in_features * out_features
    return flops
