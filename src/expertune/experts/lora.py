"""LoRA on every expert, as a tuner layer of PEFT: separate A and B for each projection of each expert.

PEFT's own layer for stacked experts (`ParamWrapper`) refuses dropout, and fuses gate and up into one adapter of twice
the rank. This one keeps w1, w2 and w3 apart, as a model of separate linears would, and holds the factors stacked so
that one grouped product serves all experts. Some experts of a layer may have factors and others none, and experts may
differ in rank: those of one rank are stacked together.

Shape suffixes: E experts, r rank.
"""

import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from expertune.errors import ConfigError, ExportError
from expertune.experts.dora import Norms, gain
from expertune.experts.module import Nf4Experts
from expertune.kernels.lora import LoraUpdate, beyond, slots_of

NO_MERGE = (
    "4-bit experts cannot absorb an adapter in place: rounding the sum to 4 bits again would lose most of the "
    "adapter. Keep the adapter beside the base, or merge into 16-bit weights. A trainer that generates with vLLM "
    "merges before each generation: leave its `use_vllm` off"
)

# Rank and alpha of each stack of factors: {"gate": (8, 16.0), ...}. Where experts differ in rank, a projection has
# several stacks, named by `stack_name`.
Ranks = dict[str, tuple[int, float]]

Stack = tuple[str, str]
"""An adapter's name and a stack of its factors."""

# The experts of each stack that does not hold all of them, in ascending order.
Held = dict[str, tuple[int, ...]]


def stack_name(projection: str, group: int) -> str:
    """The name of the factors that a projection has for one of its groups of experts."""
    return f"{projection}@{group}" if group else projection


def projection_of(stack: str) -> str:
    """The projection whose factors a stack holds."""
    return stack.partition("@")[0]


class ExpertLoraConfig(LoraConfig):
    """A LoraConfig that also says, for each experts module, which projections are adapted and how.

    `expert_ranks` maps an experts module's dotted name to its `Ranks`, `expert_held` to its `Held`. They belong to the
    live model and are not written to `adapter_config.json`, which names the projections as the checkpoint does.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expert_ranks: dict[str, Ranks] = {}
        self.expert_held: dict[str, Held] = {}
        self._register_custom_module({Nf4Experts: ExpertsLora})


class FirstFactors(nn.Module):
    """The factors that an adapter of a layer began with, which no step changes and no file of PEFT's holds."""

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        for stack, pair in factors.items():
            for name, factor in zip("AB", pair, strict=True):
                self.register_buffer(f"{stack}_{name}", factor.detach().clone(), persistent=False)

    def of(self, stack: str) -> tuple[Tensor, Tensor]:
        """A [E, r, in_features] and B [E, out_features, r] of a stack."""
        return self.get_buffer(f"{stack}_A"), self.get_buffer(f"{stack}_B")


class ExpertsLora(nn.Module, LoraLayer):
    """The adapters of one `Nf4Experts`.

    Parameters of adapter `name` and projection `p`: `lora_A[name][p]` [E, r, in_features] and `lora_B[name][p]`
    [E, out_features, r], of the experts that are here, or of those that `held[name]` lists for `p`; A starts as PEFT's
    does (Kaiming uniform), B at zero. With `use_dora` there is `lora_magnitude_vector[name][p]` [E, out_features] too,
    which starts at the norms. What an adapter began with may be taken away from what it gives (`keep_first`).

    Args:
        base_layer: the experts module to adapt.
        adapter_name: name of the first adapter.
        config: an `ExpertLoraConfig`.
        r: unused; ranks come from `config.expert_ranks`.
        lora_alpha: unused, likewise.
        target_name: dotted name of the module, the key into `config.expert_ranks`.
        **kwargs: whatever else PEFT hands to every tuner layer.
    """

    # Ranks and scales per adapter and projection; `scaling` is a factor on all of them, as PEFT's users set it.
    other_param_names = (*LoraLayer.other_param_names, "ranks", "held", "first")

    # What PEFT's untyped base class brings.
    base_layer: Nf4Experts
    lora_A: MutableMapping[str, nn.ParameterDict]
    lora_B: MutableMapping[str, nn.ParameterDict]
    lora_magnitude_vector: MutableMapping[str, nn.ParameterDict]
    lora_dropout: nn.ModuleDict
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    use_dora: dict[str, bool]
    use_rslora: dict[str, bool]
    active_adapters: list[str]
    disable_adapters: bool
    set_adapter: Callable[..., None]

    def __init__(
        self,
        base_layer: Nf4Experts,
        adapter_name: str,
        config: ExpertLoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        target_name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.ranks: dict[str, Ranks] = {}
        self.norms = Norms()
        self.held: dict[str, Held] = {}
        self.first: MutableMapping[str, FirstFactors] = nn.ModuleDict()  # type: ignore[assignment]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config, target_name=target_name)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        spec = self.base_layer.spec
        return spec.hidden_size, spec.hidden_size

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: ExpertLoraConfig, **kwargs: Any
    ) -> None:
        """Create the factors of one more adapter (called by PEFT)."""
        experts = self.base_layer
        ranks = config.expert_ranks[kwargs["target_name"]]
        held = config.expert_held.get(kwargs["target_name"], {})
        device = experts.device
        factors_a, factors_b = {}, {}
        for stack, (rank, _) in ranks.items():
            rows, columns = experts.spec.shape(projection_of(stack))
            count = len(held[stack]) if stack in held else experts.num_experts
            factor_a = torch.empty(count, rank, columns, dtype=torch.float32, device=device)
            factor_b = torch.zeros(count, rows, rank, dtype=torch.float32, device=device)
            # Drawn for all experts, wherever they are: a run starts from the same values on any number of ranks.
            _initialize(factor_a, factor_b, config.init_lora_weights)
            factors_a[stack], factors_b[stack] = map(self._own, (factor_a, factor_b))
        self.lora_A[adapter_name] = nn.ParameterDict(factors_a)
        self.lora_B[adapter_name] = nn.ParameterDict(factors_b)
        dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout > 0 else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        self.ranks[adapter_name], self.held[adapter_name] = ranks, held
        self.r[adapter_name] = config.r
        # An alpha by which PEFT's set_scale and unscale_layer come to a factor of one.
        self.lora_alpha[adapter_name] = math.sqrt(config.r) if config.use_rslora else config.r
        self.scaling[adapter_name] = 1.0
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        if config.use_dora:
            self.lora_magnitude_vector[adapter_name] = nn.ParameterDict(self._first_magnitudes(adapter_name))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _first_magnitudes(self, adapter_name: str) -> dict[str, Tensor]:
        """DoRA's magnitudes [E, out], with which a new adapter computes what it would without them."""
        updates = self._updates([adapter_name])
        if self.base_layer.device.type == "meta":
            return {stack: update.b[:, :, 0].detach().clone() for (_, stack), update in updates.items()}
        norms = self.norms.of(self.base_layer, updates)
        return {stack: nn.Parameter(norms[adapter_name, stack].clone()) for _, stack in updates}

    def keep_first(self, adapter_name: str) -> None:
        """From here on, take the product of an adapter's factors as they are now away from what it adds."""
        a, b = self.lora_A[adapter_name], self.lora_B[adapter_name]
        self.first[adapter_name] = FirstFactors({stack: (a[stack], b[stack]) for stack in a})

    def _own(self, factor: Tensor) -> nn.Parameter:
        """The part of a factor of all experts that belongs to those that are here."""
        experts = self.base_layer
        if experts.parallel:
            factor = factor[experts.owned.start : experts.owned.stop].clone()
        return nn.Parameter(factor)

    def experts_of(self, adapter_name: str, stack: str) -> Sequence[int]:
        """The experts that a stack of factors holds, in its order.

        Of all experts those that are here, or all of them while `factors_of_all` is open.
        """
        if stack in self.held[adapter_name]:
            return self.held[adapter_name][stack]
        experts, factor = self.base_layer, self.lora_A[adapter_name][stack]
        return range(experts.num_experts) if factor.shape[0] == experts.num_experts else experts.owned

    def scale(self, adapter_name: str, stack: str) -> float:
        """The factor of one stack's updates: alpha / r (alpha / sqrt(r) with rsLoRA), times PEFT's scaling."""
        rank, alpha = self.ranks[adapter_name][stack]
        own = alpha / math.sqrt(rank) if self.use_rslora[adapter_name] else alpha / rank
        return own * self.scaling[adapter_name]

    def forward(
        self,
        hidden_TD: Tensor,
        top_k_index_TK: Tensor,
        top_k_weights_TK: Tensor,
        adapter_names: Sequence[str] | None = None,
    ) -> Tensor:
        """The experts with the active adapters, or with those that are named; see `Nf4Experts.forward`.

        Args:
            hidden_TD: [T, D]; as for the rest, `Nf4Experts.forward`.
            top_k_index_TK: [T, K].
            top_k_weights_TK: [T, K].
            adapter_names: of a batch of as many sequences of one length, the adapter of each; `__base__` means none.
                PEFT hands them over.

        Raises:
            ValueError: the tokens are no batch of as many sequences as there are names.
        """
        if adapter_names is not None:
            return self._mixed(hidden_TD, top_k_index_TK, top_k_weights_TK, adapter_names)
        active = [] if self.disable_adapters else self.active_adapters
        tokens = hidden_TD, top_k_index_TK.long(), top_k_weights_TK
        answered = self.base_layer.answer((self, *active), *tokens, lambda: self._given_by(active))
        return self._with(active, *tokens) if answered is None else answered

    def _mixed(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, adapter_names: Sequence[str]) -> Tensor:
        length, rest = divmod(hidden_TD.shape[0], len(adapter_names))
        if rest:
            raise ValueError(
                f"adapter_names has {len(adapter_names)} names, but the experts were given {hidden_TD.shape[0]} "
                "tokens, which are no batch of that many sequences; pass one name for each sequence"
            )
        out_TD = torch.empty_like(hidden_TD)
        for name in dict.fromkeys(adapter_names):
            of_name = torch.tensor([each == name for each in adapter_names], device=hidden_TD.device)
            tokens = of_name.repeat_interleave(length).nonzero()[:, 0]
            out_TD[tokens] = self._with([name], hidden_TD[tokens], index_TK[tokens], weights_TK[tokens])
        return out_TD

    def _with(self, names: Sequence[str], hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The experts with the adapters of these names, as far as this layer has them."""
        return self.base_layer(hidden_TD, index_TK, weights_TK, self._given_by(names))

    def _given_by(self, names: Sequence[str]) -> list[LoraUpdate]:
        """The updates that adapters of these names give, as far as this layer has them."""
        return list(self._scaled(self._updates([name for name in names if name in self.lora_A])).values())

    def _updates(self, active: Sequence[str]) -> dict[Stack, LoraUpdate]:
        """The updates of adapters, without DoRA's gains."""
        return {
            (name, stack): LoraUpdate(
                self.base_layer.spec.projections.index(projection),
                *self.given(name, stack),
                self.scale(name, stack),
                self._dropout(name),
                slots=self._slots(name, stack),
            )
            for name in active
            for projection in self.base_layer.spec.projections
            for stack in self.ranks[name]
            if projection_of(stack) == projection
        }

    def given(self, adapter_name: str, stack: str) -> tuple[Tensor, Tensor]:
        """A and B of the update that a stack gives; differentiable in the stack's own."""
        a, b = self.lora_A[adapter_name][stack], self.lora_B[adapter_name][stack]
        return beyond(a, b, *self.first[adapter_name].of(stack)) if adapter_name in self.first else (a, b)

    def _scaled(self, updates: dict[Stack, LoraUpdate]) -> dict[Stack, LoraUpdate]:
        """With the gains of those that are DoRA's."""
        dora = {stack: update for stack, update in updates.items() if self.use_dora[stack[0]]}
        if not dora:
            return updates
        if len({name for name, _ in updates}) > 1:
            raise ConfigError(
                "several adapters are active, one of them with use_dora, which scales what all of them give; activate "
                "one at a time with set_adapter"
            )
        norms = self.norms.of(self.base_layer, dora)
        gains = {(name, key): gain(self.lora_magnitude_vector[name][key], norms[name, key]) for name, key in dora}
        return updates | {stack: replace(update, gain=gains[stack]) for stack, update in dora.items()}

    def _slots(self, adapter_name: str, stack: str) -> Tensor | None:
        held = self.held[adapter_name].get(stack)
        return None if held is None else slots_of(held, self.base_layer.num_experts, self.base_layer.device)

    def _dropout(self, adapter_name: str) -> float:
        dropout = self.lora_dropout[adapter_name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: rounding W + BA to 4 bits again would lose most of BA.

        Raises:
            ExportError: always.
        """
        raise ExportError(NO_MERGE)

    def unmerge(self) -> None:
        """Nothing to do: nothing is ever merged."""

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's method, which looks for a `weight` to learn the device from."""
        for factors in (self.lora_A, self.lora_B, self.lora_magnitude_vector):
            if adapter_name in factors and not any(factor.is_meta for factor in factors[adapter_name].values()):
                factors[adapter_name].to(device or self.base_layer.down.packed.device)

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def own_factors(model: nn.Module) -> dict[Nf4Experts, list[nn.Parameter]]:
    """Factors of experts that other ranks do not have, by the experts; empty where all ranks have all experts."""
    return {
        layer.base_layer: [factor for factors in _factors_of(layer) for factor in factors.values()]
        for layer in _shared_out(model)
    }


@contextmanager
def factors_of_all(model: nn.Module, here: bool) -> Iterator[None]:
    """While open, a model has the factors of all experts where `here` holds, on the host; all ranks call this.

    Factors are gathered one at a time, so that a device never holds more than one beside its own.
    """
    own: list[tuple[nn.ParameterDict, str, nn.Parameter]] = []
    try:
        for layer in _shared_out(model):
            experts = layer.base_layer
            for factors in _factors_of(layer):
                for projection, factor in list(factors.items()):
                    assert experts.parallel is not None
                    whole = experts.parallel.whole(factor, experts.num_experts)
                    if here:
                        own.append((factors, projection, factor))
                        factors[projection] = nn.Parameter(whole.cpu(), requires_grad=factor.requires_grad)
        yield
    finally:
        for factors, projection, factor in own:
            factors[projection] = factor


@contextmanager
def norms_looked_at_once(model: nn.Module) -> Iterator[None]:
    """While open, nothing trains the model, and DoRA's norms are looked up without reading all factors each time."""
    with ExitStack() as layers:
        for layer in model.modules():
            if isinstance(layer, ExpertsLora):
                layers.enter_context(layer.norms.looked_at_once())
        yield


def _shared_out(model: nn.Module) -> Iterator[ExpertsLora]:
    return (each for each in model.modules() if isinstance(each, ExpertsLora) and each.base_layer.parallel)


def _factors_of(layer: ExpertsLora) -> Iterator[nn.ParameterDict]:
    return chain(layer.lora_A.values(), layer.lora_B.values(), layer.lora_magnitude_vector.values())


def _initialize(factor_a: Tensor, factor_b: Tensor, how: bool | str) -> None:
    """A and B as PEFT's `init_lora_weights` has them: True (Kaiming), `gaussian`, or False (B is random too)."""
    if how == "gaussian":
        factor_a.normal_(std=1 / factor_a.shape[1])
        return
    for factor in (factor_a,) if how is True else (factor_a, factor_b):
        bound = 1 / math.sqrt(factor.shape[2])
        factor.uniform_(-bound, bound)
