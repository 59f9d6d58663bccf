"""Nf4Experts: the one experts module, in place of whatever a model family has.

Shape suffixes: T tokens, D hidden size, F intermediate size, K experts per token, E experts, r rank.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from expertune.distributed.parallel import ExpertParallel
from expertune.distributed.sharded import ExpertSharding, Sharing
from expertune.experts import layout, replay
from expertune.experts.contract import ExpertsSpec, read_spec
from expertune.experts.dispatch import Dispatch, Routing
from expertune.kernels.expert_mlp import Activation, Chunk, ExpertLayer, LoraUpdate, expert_mlp, of_answer
from expertune.kernels.expert_mlp.few_tokens import Experts
from expertune.kernels.few_tokens import asked_for, in_answer
from expertune.kernels.nf4 import Fit, Nf4Stack, Part, Scheme
from expertune.kernels.routes import FUSED, HasKernelSettings, KernelSettings


class Nf4Experts(nn.Module, HasKernelSettings):
    """All experts of one MoE block as NF4 bytes, with transformers' experts forward; of several ranks, a rank's own.

    Experts are numbered as the model does, wherever they are. What is small is on every rank: biases, norms.

    Biases, where the family has them, are frozen parameters of the model's dtype under the family's own names
    (`gate_up_proj_bias` [E, P * F], `down_proj_bias` [E, D]), part by part whatever the family's layout. Whatever else
    the family's module holds, such as a `post_expert_norm`, keeps its name here too.

    Args:
        original: the model's own experts module, on any device (meta is enough); its weights are not read. Its
            `_apply_gate` and activation are what this module computes between the products.
        name: dotted name in the model, for errors and for the layer's operator.
        double_quantization: hold the absmax values in 8 bits.
        device: where the bytes live.
        scheme: `nf4`, or `mxfp4` for experts that are kept as a checkpoint has them.
        sharing: the ranks that hold the experts together; None means that all are here.

    Attributes:
        num_experts: of the layer, E.
        owned: the experts that are here.
        read_here: the experts of which bytes are held here, in whole or in part.
        parallel: the ranks that share the experts out; None means that each has all.
        sharding: the ranks that hold a slice of the bytes each; None where bytes are whole.
        passed_by: see `experts_passed_by`.

    Raises:
        UnsupportedModelError: see `expertune.experts.contract.read_spec`.
        ConfigError: there are fewer experts than ranks.
    """

    family: nn.Module

    def __init__(
        self,
        original: nn.Module,
        name: str = "experts",
        double_quantization: bool = True,
        device: torch.device | str | None = None,
        scheme: Scheme = "nf4",
        sharing: Sharing | None = None,
    ) -> None:
        super().__init__()
        self.spec: ExpertsSpec = read_spec(name, original)
        spec = self.spec
        self.num_experts = spec.num_experts
        self.parallel = sharing if isinstance(sharing, ExpertParallel) else None
        self.sharding = sharing if isinstance(sharing, ExpertSharding) else None
        self.owned = self.parallel.owned(spec.num_experts) if self.parallel else range(spec.num_experts)
        parts = 2 if spec.has_gate else 1
        held = double_quantization, "meta" if self.sharding else device, scheme
        self.gate_up = Nf4Stack(len(self.owned) * parts, spec.intermediate_size, spec.hidden_size, *held)
        self.down = Nf4Stack(len(self.owned), spec.hidden_size, spec.intermediate_size, *held)
        self.read_here = self.owned
        if self.sharding:
            part = Part(self.sharding.rank, self.sharding.size)
            self.gate_up.hold(part, device)
            self.down.hold(part, device)
            self.read_here = _span([*part.experts(self.gate_up.whole, parts), *part.experts(self.down.whole, 1)])
        for weight in spec.weight_names:
            original._parameters.pop(weight)
        self.computes_on: torch.device | None = None
        self.passed_by = False
        # What the family computes between the products and after them (activation, clamps, norms) stays its own code.
        # It and this module hold the same tensors and modules, so that these have one name, and are loaded and moved
        # once.
        self._parameters.update(original._parameters)
        self._buffers.update(original._buffers)
        self._non_persistent_buffers_set.update(original._non_persistent_buffers_set)
        self._modules.update(original._modules)
        original._parameters, original._buffers, original._modules = self._parameters, self._buffers, self._modules
        self.__dict__["family"] = original
        activate = partial(_activate, original, spec)
        after = partial(_normalize, original) if spec.has_post_expert_norm else None
        activation = Activation(activate, is_columnwise(activate, spec), is_swiglu(activate, spec), after)
        self.layer = ExpertLayer(activation, name)

    @property
    def kernel_settings(self) -> KernelSettings:
        """How the GEMMs run."""
        return self.layer.settings

    @kernel_settings.setter
    def kernel_settings(self, settings: KernelSettings) -> None:
        self.layer.settings = settings

    @property
    def device(self) -> torch.device:
        """Where the experts compute and their adapters live; offloaded weights may lie on another device."""
        return self.computes_on or self.down.packed.device

    @property
    def biases(self) -> tuple[Tensor, Tensor] | None:
        """Of the experts that are here: biases of the first product, part by part [E, P * F], and of down [E, D].

        None where there are none.
        """
        if not self.spec.has_bias:
            return None
        first, down = (self.get_parameter(f"{weight}_bias") for weight in self.spec.weight_names)
        here = slice(self.owned.start, self.owned.stop)
        return first[here], down[here]

    def arrange(self, parameter: str, tensor: Tensor) -> Tensor:
        """A tensor as the family lays it out, as the parameter of this name holds it here."""
        weight = parameter.removesuffix("_bias")
        is_bias = parameter != weight and weight in self.spec.weight_names
        return layout.to_bias(self.spec, weight, tensor) if is_bias else tensor

    def write(self, expert: int, projection: str, matrix: Tensor, fit: Fit | None = None) -> None:
        """Quantize one expert's matrix [out_features, in_features] into place.

        Args:
            expert: index of the expert.
            projection: `gate`, `up` or `down`.
            matrix: float32, float16 or bfloat16.
            fit: choose scales by error.

        Raises:
            ValueError: another shape, or values that 4 bits cannot hold.
        """
        stack, index = self.locate(expert, projection)
        stack.write(index, matrix, fit)

    def locate(self, expert: int, projection: str) -> tuple[Nf4Stack, int]:
        """The stack and the index in it that hold one expert's projection; the expert is here."""
        local = expert - self.owned.start
        if projection == "down":
            return self.down, local
        parts = len(self.spec.projections) - 1
        return self.gate_up, local * parts + self.spec.projections.index(projection)

    def dequantize(self, expert: int, projection: str, dtype: torch.dtype) -> Tensor:
        """One expert's matrix [out_features, in_features], dequantized."""
        stack, index = self.locate(expert, projection)
        return stack.dequantize(index, dtype)

    def forward(
        self,
        hidden_TD: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        updates: Sequence[LoraUpdate] = (),
    ) -> Tensor:
        """Send each token through its experts and sum what comes back.

        Args:
            hidden_TD: [T, D].
            top_k_index_TK: integer [T, K].
            top_k_weights_TK: [T, K] router scores.
            updates: of the active adapters; part p is the projection `spec.projections[p]`.

        Returns:
            [T, D] of hidden's dtype.
        """
        tokens = hidden_TD, top_k_index_TK.long(), top_k_weights_TK
        if not updates and (answered := self.answer(self, *tokens)) is not None:
            return answered
        if self.passed_by:
            # Weights that sum up to one have a sum without a gradient: each counts otherwise, so that theirs is seen.
            shares_K = torch.arange(1, top_k_weights_TK.shape[1] + 1, device=top_k_weights_TK.device).reciprocal()
            return hidden_TD * (top_k_weights_TK * shares_K).sum(dim=1, keepdim=True).to(hidden_TD.dtype)
        if self.parallel is None:
            return replay.run(partial(self._compute, *tokens, updates))[0]
        return replay.run(partial(self._compute_on_all_ranks, self.parallel, *tokens, updates))[0]

    def answer(
        self,
        owner: Hashable,
        hidden_TD: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        updates: Callable[[], Sequence[LoraUpdate]] = list,
    ) -> Tensor | None:
        """The layer for few tokens of an answer that is being written; None where `forward` has to compute it.

        Args:
            owner: of the updates, which are asked for once an answer.
            hidden_TD, index_TK, weights_TK, updates: see `forward`.
        """

        def lay_out() -> Experts | None:
            if self.parallel or self.sharding or self.passed_by:
                return None
            return of_answer(tokens, self.gate_up, self.down, self.layer, updates(), self.biases)

        tokens = Chunk(hidden_TD, index_TK, weights_TK)
        experts = in_answer((owner, index_TK.shape, hidden_TD.dtype), lay_out)
        if experts is None or not asked_for(self.layer.settings):
            return None
        self.layer.settings.ran[FUSED] += 1
        return experts(hidden_TD, index_TK, weights_TK)

    def _compute_on_all_ranks(
        self,
        parallel: ExpertParallel,
        hidden: Tensor,
        index: Tensor,
        weights: Tensor,
        updates: Sequence[LoraUpdate],
        recorded: list[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        """All experts, for this rank's tokens; for backward also what `_compute` keeps, and the routing."""
        replayed = recorded[0] if recorded else None
        low_rank, routing = recorded[1 : 1 + len(updates)], recorded[1 + len(updates) :]
        way = Dispatch(parallel, self.num_experts, (hidden, index, weights), Routing(*routing) if recorded else None)
        hidden_RD, weights_R1 = way.send(hidden, weights)
        # Backward needs the operator, and not what it gave: that is in the recorded sums.
        again = [hidden_RD.detach(), *low_rank] if recorded else []
        y_RD, low_rank = self._compute(hidden_RD, way.expert_R1, weights_R1, updates, again)
        return way.give_back(y_RD, replayed), [*low_rank, *way.routing]

    def _compute(
        self, hidden: Tensor, index: Tensor, weights: Tensor, updates: Sequence[LoraUpdate], recorded: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The experts that are here."""
        stacks = self.gate_up, self.down
        return expert_mlp(hidden, index, weights, *stacks, self.layer, updates, recorded, biases=self.biases)

    def extra_repr(self) -> str:
        """Shape for `print(model)`."""
        own = f", owned={self.owned.start}..{self.owned.stop - 1}" if self.parallel else ""
        own += f", slice {self.sharding.rank} of {self.sharding.size}" if self.sharding else ""
        return f"num_experts={self.num_experts}{own}, projections={', '.join(self.spec.projections)}"


def _span(ranges: Sequence[range]) -> range:
    """From the first to the last of all that some ranges hold."""
    held = [each for each in ranges if each]
    return range(min(each.start for each in held), max(each.stop for each in held)) if held else range(0)


def _activate(family: nn.Module, spec: ExpertsSpec, gate_up: Tensor) -> Tensor:
    if spec.has_gate:
        return family._apply_gate(layout.to_activation(spec, gate_up))  # type: ignore[operator]
    return family.act_fn(gate_up)  # type: ignore[operator]


def _normalize(family: nn.Module, y_RD: Tensor) -> Tensor:
    return family.post_expert_norm(y_RD)  # type: ignore[operator]


@contextmanager
def experts_passed_by(model: nn.Module) -> Iterator[None]:
    """While open, experts hand each token on, scaled by its router's weights, and no expert's bytes are read.

    For a forward that asks which outputs depend on which inputs: a token, and the weights of its router, have a
    gradient as with the experts. The experts' own code is left out of what such a forward shows. With experts on disk a
    forward and its backward would otherwise read the whole model twice.
    """
    experts = [module for module in model.modules() if isinstance(module, Nf4Experts)]
    for module in experts:
        module.passed_by = True
    try:
        yield
    finally:
        for module in experts:
            module.passed_by = False


def keep_inner(model: nn.Module, num_layers: int) -> None:
    """Have a model's last expert layers keep what their first GEMM gave from forward for backward.

    The last, since layers before the first adapted one have no backward, and the first hold it longest.

    A layer that keeps it is spared that GEMM in backward, for
    `expertune.kernels.amounts.kept_bytes_per_routed_token`; the others compute it again, and so does each
    layer on a GPU, in float16, and with DoRA. What is kept in float32 is what the GEMM gave; in bfloat16 it is rounded
    to that once, and the output of forward is not.

    It is kept with the graph until its backward. A second backward of a retained graph computes it once more, rounded
    alike. Activation checkpointing that is not reentrant and has no replay (`expertune.experts.replay`) computes the
    layer again with a second such tensor, which it does not read.

    Args:
        model: with or without adapters.
        num_layers: how many of the expert layers, the last ones in the model's order; all where there are not as many.
    """
    experts = [module for module in model.modules() if isinstance(module, Nf4Experts)]
    for number, module in enumerate(experts):
        module.layer.keeps = number >= len(experts) - num_layers


def holds_experts(model: nn.Module) -> bool:
    """Whether a model has 4-bit experts."""
    return any(isinstance(module, Nf4Experts) for module in model.modules())


def parallel_of(model: nn.Module) -> ExpertParallel | None:
    """The ranks that share a model's experts out; None where all are here."""
    return next((module.parallel for module in model.modules() if isinstance(module, Nf4Experts)), None)


def sharing_of(model: nn.Module) -> Sharing | None:
    """The ranks that hold a model's experts together, each of them or each layer's bytes; None where all are here."""
    experts = (module for module in model.modules() if isinstance(module, Nf4Experts))
    return next((each.parallel or each.sharding for each in experts), None)


def in_lockstep(model: nn.Module) -> bool:
    """Whether ranks need each other in a model's forward, so that all have to pass it equally often."""
    return sharing_of(model) is not None


def is_columnwise(activate: Callable[[Tensor], Tensor], spec: ExpertsSpec) -> bool:
    """Whether a family's activation can be computed on some columns at a time: tried, on rows of numbers.

    False where it cannot be tried, because it has weights of its own that are not there yet.
    """
    gate_up, whole = _tried(activate, spec)
    if whole is None:
        return False
    half = spec.intermediate_size // 2
    parts = gate_up.unflatten(1, (-1, spec.intermediate_size))
    pieces = [activate(parts[:, :, columns].flatten(1)) for columns in (slice(0, half), slice(half, None))]
    return torch.equal(whole, torch.cat(pieces, dim=1))


def is_swiglu(activate: Callable[[Tensor], Tensor], spec: ExpertsSpec) -> bool:
    """Whether a family's activation is silu(gate) * up: tried, on numbers small, usual and far beyond any limit."""
    gate_up, whole = _tried(activate, spec)
    if whole is None or not spec.has_gate:
        return False
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.allclose(whole, nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def _tried(activate: Callable[[Tensor], Tensor], spec: ExpertsSpec) -> tuple[Tensor, Tensor | None]:
    """Rows for the activation, each on a scale of its own, and what it makes of them; None where it fails."""
    parts = len(spec.projections) - 1
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(4, parts * spec.intermediate_size, generator=generator, device="cpu")
    gate_up = numbers * torch.tensor([[0.1], [1.0], [10.0], [1000.0]], device="cpu")
    try:
        return gate_up, activate(gate_up)
    except (NotImplementedError, RuntimeError):
        return gate_up, None
