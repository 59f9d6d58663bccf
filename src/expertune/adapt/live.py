"""An adapter on a live model: its layers and factors, and the way between these and the tensors of its file."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from expertune.adapt.factors import MAGNITUDE, PREFIX, Factors, PerExpert
from expertune.adapt.file_layout import sparse_layout, stock_layout
from expertune.adapt.first_factors import WithFirst, first_factors
from expertune.adapt.layout_trial import StockLayout
from expertune.adapt.outgoing import pair_in_file, stack_in_file
from expertune.adapt.scales import fold, unfold
from expertune.adapt.stacks import pad
from expertune.checkpoint.adapter_folder import LIVE_NAME
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import Rank, ResolvedTargets
from expertune.checkpoint.writer import Outgoing, write_tensors
from expertune.config.lora import alpha_of_twice_the_rank
from expertune.errors import CheckpointError, ConfigError
from expertune.experts.layout import fused_projections
from expertune.experts.lora import ExpertsLora, Held, Ranks, projection_of, stack_name
from expertune.kernels.lora import beyond

# Of factors B that lie beside a file; those that end in lora_B are what the file has, to the bit.
_TRAINED_B = "trained_B"


def names_of(model: nn.Module) -> NameMap:
    """The name map that was stored on a model when it got its 4-bit experts, whatever is wrapped around it.

    Raises:
        ConfigError: the model was built by hand.
    """
    names = getattr(base_of(model), "nf4_names", None)
    if not isinstance(names, NameMap):
        raise ConfigError(
            f"{type(model).__name__} holds 4-bit experts but was not loaded by expertune or from an NF4 folder"
        )
    return names


def call_arguments(
    function: Callable[..., Any], model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a library's method by name, defaults included."""
    bound = inspect.signature(function).bind(model, *args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The model with its own modules in the places of PEFT's layers around them, while names are resolved."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    outermost = {name: module for name, module in wrapped.items() if not name.endswith(".base_layer")}
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in outermost]
    for (parent, child), module in zip(places, outermost.values(), strict=True):
        setattr(parent, child, module.get_base_layer())
    try:
        yield
    finally:
        for (parent, child), module in zip(places, outermost.values(), strict=True):
            setattr(parent, child, module)


def live_ranks(targets: ResolvedTargets) -> dict[str, Ranks]:
    """The `expert_ranks` of an `ExpertLoraConfig`."""
    return {
        module: {
            stack_name(projection, group): (max(1, round(rank.rank * factor)), rank.alpha)
            for projection, rank in ranks.items()
            for group, (_, factor) in enumerate(targets.groups.get(module, [(None, 1.0)]))
        }
        for module, ranks in targets.experts.items()
    }


def live_held(targets: ResolvedTargets) -> dict[str, Held]:
    """The `expert_held` of an `ExpertLoraConfig`."""
    return {
        module: {
            stack_name(projection, number): group.experts
            for projection in targets.experts[module]
            for number, group in enumerate(groups)
        }
        for module, groups in targets.groups.items()
    }


class LivePair(NamedTuple):
    """The factors of one module of a live adapter, one expert of a stack by itself.

    Attributes:
        module: the live name of the module.
        projection: of an experts module; None for a linear or a router.
        name: the name on disk of the linear, the router or the one expert.
        a: [r, in], a view into the live parameter.
        b: [out, r], the same.
        scale: what the live model multiplies by.
        magnitude: DoRA's [out], the same; None without.
        expert: which expert of the module; None for a linear or a router.
        first: the factors A and B that it began with, whose product is taken away from what it gives; None where
            nothing is.
    """

    module: str
    projection: str | None
    name: str
    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    expert: int | None = None
    first: tuple[Tensor, Tensor] | None = None

    @property
    def given(self) -> "LivePair":
        """The pair whose product it gives: itself, or one of twice the rank, which is what a file has."""
        if self.first is None:
            return self
        a, b = beyond(self.a.detach(), self.b.detach(), *self.first)
        return self._replace(a=a, b=b, first=None)


class LiveAdapter:
    """An adapter on a live model: what it changes, its factors, and the way between these and its file.

    Args:
        model: the transformers model (not the PeftModel around it) with the adapter attached.
        names: its name map.
        adapter: the adapter's name.
    """

    def __init__(self, model: nn.Module, names: NameMap, adapter: str = "default") -> None:
        self.model, self.names, self.adapter = model, names, adapter

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """Live name -> PEFT's layer, of everything but embeddings that the adapter is on.

        A wrapped parameter keeps its module's name; what PEFT nests inside is the base, never another adapter.
        """
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer) and self.adapter in module.lora_A
        }

    @property
    def embeddings(self) -> dict[str, tuple[str, LoraLayer]]:
        """Name on disk of each embedding that the adapter is on -> its live name, and PEFT's layer."""
        return {
            self.names.on_disk(name): (name, layer)
            for name, layer in self.model.named_modules()
            if isinstance(layer, LoraLayer) and self.adapter in layer.lora_embedding_A
        }

    @property
    def uses_dora(self) -> bool:
        """Whether its layers have magnitudes: all of them, or none."""
        return any(self.adapter in layer.lora_magnitude_vector for layer in self.layers.values())

    def pairs(self) -> Iterator[LivePair]:
        """Its factors, of one expert after the other; of the experts that are here, where ranks share them out."""
        uses_dora = self.uses_dora
        for name, module in self.layers.items():
            a, b = module.lora_A[self.adapter], module.lora_B[self.adapter]
            magnitudes = module.lora_magnitude_vector[self.adapter] if uses_dora else None
            if not isinstance(module, ExpertsLora):
                scale, magnitude = module.scaling[self.adapter], None if magnitudes is None else magnitudes.weight
                first = (a.first, b.first) if isinstance(a, WithFirst) and isinstance(b, WithFirst) else None
                on_disk = self.names.on_disk(name)
                yield LivePair(name, None, on_disk, a.weight, b.weight, scale, magnitude, first=first)
                continue
            for stack in a:
                scale, projection = module.scale(self.adapter, stack), projection_of(stack)
                experts = self.names.experts_on_disk(name, projection)
                here = module.experts_of(self.adapter, stack)
                held = [None] * len(here) if magnitudes is None else magnitudes[stack]
                began = module.first[self.adapter].of(stack) if self.adapter in module.first else None
                pairs = zip(here, a[stack], b[stack], held, strict=True)
                for index, (expert, own_a, own_b, magnitude) in enumerate(pairs):
                    first = None if began is None else (began[0][index], began[1][index])
                    pair = LivePair(name, projection, experts[expert], own_a, own_b, scale, magnitude)
                    yield pair._replace(expert=expert, first=first)

    def elsewhere(self) -> Iterator[str]:
        """Names on disk of the experts whose factors are on other ranks."""
        for name, module in self.layers.items():
            if not isinstance(module, ExpertsLora) or module.base_layer.parallel is None:
                continue
            for stack in module.lora_A[self.adapter]:
                here = module.experts_of(self.adapter, stack)
                for expert, each in enumerate(self.names.experts_on_disk(name, projection_of(stack))):
                    if expert not in here:
                        yield each

    def layout(self, settings: Mapping[str, Any]) -> StockLayout:
        """How its file is laid out, and whether stock PEFT reads it, by the settings of its `Origin`.

        Where first factors are taken away, the file has twice the rank, of all modules alike.
        """
        targets, has_gaps = ResolvedTargets(use_dora=self.uses_dora), False
        is_wider = any(True for _ in first_factors(self.model, self.adapter))

        def in_file(module: LoraLayer, rank: int, alpha: float) -> Rank:
            if not is_wider:
                return Rank(rank, alpha)
            return Rank(2 * rank, alpha_of_twice_the_rank(alpha, module.use_rslora[self.adapter]))

        for name, module in self.layers.items():
            if isinstance(module, ExpertsLora):
                found, held = targets.experts.setdefault(name, {}), module.held[self.adapter]
                for stack, rank in module.ranks[self.adapter].items():
                    # Of experts that differ in rank the largest, up to which the others are filled with zeros.
                    projection, held_rank = projection_of(stack), in_file(module, *rank)
                    found[projection] = max(found.get(projection, held_rank), held_rank)
                adapted = {expert for experts in held.values() for expert in experts}
                has_gaps |= bool(held) and len(adapted) < module.base_layer.num_experts
            else:
                kind = targets.router if isinstance(module, ParamWrapper) else targets.linears
                kind[name] = in_file(module, module.r[self.adapter], module.lora_alpha[self.adapter])
        ranks = settings["r"], settings["rank_pattern"]
        if has_gaps:
            return sparse_layout(self.names, targets, *ranks)
        return stock_layout(self.model, self.names, targets, *ranks)

    def in_file(self, stock: StockLayout) -> list[Outgoing]:
        """The tensors of its file: scales folded into B, ranks filled up with zeros, names as the layout has them.

        Nothing is computed before a tensor's turn to be written comes.
        """
        found: list[Outgoing] = []
        for name, module in self.layers.items():
            for weight, stem in stock.stacks.get(name, {}).items():
                assert isinstance(module, ExpertsLora)
                ranks = stock.expert_ranks[name]
                held = {
                    each: self._stacked(module, each, ranks[each] / stock.r)
                    for each in fused_projections(module.base_layer.spec, weight)
                    if each in ranks
                }
                rank = ranks[next(iter(held))]
                found += stack_in_file(stem, module.base_layer.spec, weight, held, rank)
        for pair in self.pairs():
            if pair.module not in stock.stacks:
                pair = pair.given
                ranks = stock.expert_ranks[pair.module] if pair.projection else stock.ranks
                rank = ranks[pair.projection or pair.module]
                stem = pair.module if pair.module in stock.live_named else pair.name
                found += pair_in_file(stem, pair.a, pair.b, rank, pair.scale * rank / stock.r, pair.magnitude)
        return sorted(found, key=lambda outgoing: outgoing.name)

    def _stacked(self, layer: ExpertsLora, projection: str, factor: float) -> Factors:
        """One projection's factors of all experts, and its scale times a factor; zeros where experts differ in rank."""
        a, b = layer.lora_A[self.adapter], layer.lora_B[self.adapter]
        stacks = [stack for stack in a if projection_of(stack) == projection]
        scale = layer.scale(self.adapter, stacks[0])
        if stacks[0] not in layer.held[self.adapter]:
            return Factors(*layer.given(self.adapter, projection), scale * factor)
        count, rank = layer.base_layer.num_experts, max(a[stack].shape[1] for stack in stacks)
        some_a, some_b = a[stacks[0]], b[stacks[0]]
        whole_a = some_a.new_zeros(count, rank, some_a.shape[2])
        whole_b = some_b.new_zeros(count, some_b.shape[1], rank)
        for stack in stacks:
            experts = list(layer.experts_of(self.adapter, stack))
            whole_a[experts] = pad(a[stack].detach(), rank, dim=1)
            own = b[stack].detach() * (layer.scale(self.adapter, stack) / scale)
            whole_b[experts] = pad(own, rank, dim=2)
        return Factors(whole_a, whole_b, scale * factor)

    @torch.no_grad()
    def write_factors(self, folder: str | Path, stock: StockLayout) -> None:
        """Beside its files, those factors B that do not come back from them to the bit.

        With them a run resumes as if it had not been interrupted, and scores the same when it is opened again. That a
        scale is in B costs a rounding where it is no power of two. Where first factors are taken away, the files have
        the difference of a B to its first one, and each B itself is beside them. Where there are none, nothing is
        written.
        """
        written = {outgoing.name: outgoing.read() for outgoing in self.in_file(stock)}
        plain = PerExpert(stock.config, written, self.names, str(folder))
        held: dict[str, Tensor] = {}
        for pair in self.pairs():
            given = pair.given
            file = _cut_back(plain, given)
            if not torch.equal(unfold(file.b, pair.scale / file.scale, pair.b.dtype), given.b):
                held[f"{pair.name}.lora_B"] = given.b
            if pair.first is not None:
                held[f"{pair.name}.{_TRAINED_B}"] = pair.b
        kept = [Outgoing(name, b.dtype, tuple(b.shape), lambda b=b: b) for name, b in held.items()]  # type: ignore[misc]
        path = Path(folder) / LIVE_NAME
        if kept:
            write_tensors(path, sorted(kept, key=lambda outgoing: outgoing.name))
        else:
            path.unlink(missing_ok=True)

    @torch.no_grad()
    def load(self, plain: PerExpert, factors: Mapping[str, Tensor] | None = None) -> None:
        """Copy a file's content into the live parameters: every tensor, and no other, save for experts elsewhere.

        Whatever the file's layout and scales, the live adapter computes what the file describes: B is divided by the
        scale that the live adapter has beyond the file's, and a rank that was filled up with zeros is cut back. Where
        first factors are taken away, the file is one that this adapter has written.

        Args:
            plain: the file's tensors under per-expert names.
            factors: factors B as they were live (see `write_factors`); used where the file agrees.

        Raises:
            CheckpointError: a tensor is missing, unknown, of another shape, or not finite; nothing has been changed
                then.
        """
        where = plain.where
        live = {pair.name: pair for pair in self.pairs()}
        everywhere = {*live, *self.elsewhere()}
        endings = (".lora_A.weight", ".lora_B.weight", *([MAGNITUDE] if self.uses_dora else []))
        keys = {f"{PREFIX}{name}{ending}" for name in everywhere for ending in endings}
        for what, found in (("missing", keys - plain.tensors.keys()), ("unknown", plain.tensors.keys() - keys)):
            if found:
                raise CheckpointError(f"{where}: {len(found)} {what} adapter tensors, the first is {min(found)}")
        wanted = {name: pair.given for name, pair in live.items()}
        given = {name: _cut_back(plain, pair) for name, pair in wanted.items()}
        for name, pair in wanted.items():
            magnitude = ("magnitude_vector", given[name].magnitude, pair.magnitude)
            pairs = ("A.weight", given[name].a, pair.a), ("B.weight", given[name].b, pair.b), magnitude
            for factor, tensor, parameter in pairs:
                key = f"{PREFIX}{name}.lora_{factor}"
                if tensor is None or parameter is None:
                    continue
                if tensor.shape != parameter.shape:
                    raise CheckpointError(
                        f"{where}: {key} has shape {tuple(tensor.shape)}, expected {tuple(parameter.shape)}"
                    )
                if not torch.isfinite(tensor).all():
                    raise CheckpointError(f"{where}: {key} holds NaN or infinite values")
        del wanted
        for name, pair in live.items():
            if pair.first is not None:
                given[name] = _trained(pair, given[name], (factors or {}).get(f"{name}.{_TRAINED_B}"), where)
        for name, pair in live.items():
            a, b, scale, magnitude_in_file = given[name]
            pair.a.copy_(a)
            if pair.magnitude is not None and magnitude_in_file is not None:
                pair.magnitude.copy_(magnitude_in_file)
            own = (factors or {}).get(f"{name}.lora_B")
            if own is not None and own.shape == b.shape and torch.equal(fold(own, pair.scale / scale), b):
                pair.b.copy_(own)
            else:
                pair.b.copy_(unfold(b, pair.scale / scale, pair.b.dtype))


def _trained(live: LivePair, file: Factors, own: Tensor | None, where: str) -> Factors:
    """A and B of a pair whose first factors are taken away, from what it gave, and B as it was.

    Raises:
        CheckpointError: the file is of other first factors, or B is not beside it.
    """
    assert live.first is not None
    a = file.a[: len(live.a)]
    if own is not None and own.shape == live.b.shape:
        given = live._replace(a=a, b=own).given
        if torch.equal(given.a, file.a) and torch.equal(fold(given.b, live.scale / file.scale), file.b):
            return Factors(a, own, live.scale)
    raise CheckpointError(
        f"{where}: {live.name}: not written by this run, whose adapter began with other factors; take one of its own "
        "checkpoints"
    )


def _cut_back(plain: PerExpert, live: LivePair) -> Factors:
    """What the file has for a live pair, without the zeros that only fill its rank up."""
    a, b = (plain.tensors[f"{PREFIX}{live.name}.lora_{factor}.weight"] for factor in "AB")
    scale = plain.scale(live.name, a.shape[0])
    rank = live.a.shape[0]
    if a.shape[0] == b.shape[-1] > rank and not (a[rank:].any(dim=1) & b[:, rank:].any(dim=0)).any():
        a, b = a[:rank], b[:, :rank]
    return Factors(a, b, scale, plain.tensors.get(f"{PREFIX}{live.name}{MAGNITUDE}"))
