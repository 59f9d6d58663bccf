"""ExportSource: a run's adapter and the base model that it was trained on, without the model's weights."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from expertune.adapt.factors import AdapterFactors, Factors, stacked
from expertune.adapt.files import AdapterFile, read_adapter_base
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.formats.nf4_folder import CALIBRATED, Nf4Folder, is_nf4_folder, read_nf4_folder
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.moments import Moments
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.reader import CheckpointIndex
from expertune.checkpoint.recipe import Recipe, read_recipe, recipe_of_folder
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import QuantizationConfig
from expertune.data import TokenizedExample, prepare_examples, settled
from expertune.experts import layout
from expertune.exporting.magnitudes import NONE
from expertune.kernels.limits import available_memory
from expertune.run.base_model import kept_moments
from expertune.run.context import RunContext
from expertune.text import format_size

# Tokens of a prompt; random ones for each expert of a layer, and in all.
_LENGTH, _PER_EXPERT, _LEAST, _MOST = 48, 4, 96, 768


class Place(NamedTuple):
    """What an adapter changes.

    Attributes:
        module: live name of a linear, a router or an experts module.
        projection: of an experts module `gate`, `up` or `down`; None otherwise.
    """

    module: str
    projection: str | None = None


@dataclass(frozen=True)
class ExportSource:
    """What is exported.

    Attributes:
        context: the run: its run file, its record, where its messages go.
        adapter: the files of the adapter.
        base: where the base model lies.
        index: headers of the base model's tensors; of an NF4 folder these have live names.
        model: the base model on the meta device: config, shapes, names.
        names: its name map.
        fingerprint: what identifies its weights; the adapter has been held to it.
        factors: A, B and scale of everything that the adapter changes, by live name; views of its file.
    """

    context: RunContext
    adapter: AdapterFile
    base: ModelSource
    index: CheckpointIndex
    model: PreTrainedModel
    names: NameMap
    fingerprint: Fingerprint
    factors: AdapterFactors

    @property
    def adapter_name(self) -> str:
        """`adapter`, or `checkpoint-N`."""
        return Path(self.adapter.where).name

    @cached_property
    def recipe(self) -> Recipe:
        """What of the base the run held in 4 bits, and how."""
        stored = read_nf4_folder(self.base.folder) if is_nf4_folder(self.base.folder) else None
        return recipe_of(stored or self.index, self.model, self.names, self.context.config.quantization)

    @property
    def as_trained(self) -> QuantizationConfig:
        """How the run held its base: also what an NF4 folder of its own said, and its run file need not name."""
        asked, trained_on = self.context.config.quantization, read_adapter_base(self.adapter.where)
        return asked if trained_on is None or self.is_packed else trained_on.held.completed(asked)

    @property
    def importance(self) -> Moments | None:
        """What the scales of the run's 4-bit weights were chosen by, where that was a calibration."""
        is_calibrated = self.context.config.quantization.fit == CALIBRATED and not is_nf4_folder(self.base.folder)
        return kept_moments(self.context) if is_calibrated else None

    @cached_property
    def is_packed(self) -> bool:
        """Whether the base is in 4 bits on the disk too, so that there are no 16-bit weights of it here."""
        return is_nf4_folder(self.base.folder) or any(piece.format for piece in self.recipe.pieces)

    @cached_property
    def by_name(self) -> dict[str, Factors]:
        """A [r, in], B [out, r] and scale by name on disk (without `.weight`), of each expert by itself; views.

        Families whose experts are stacked on disk have `...experts.3.gate_proj` and the like here.
        """
        found = {self.names.on_disk(name): pair for name, pair in self.factors.linears.items()}
        for module, projections in self.factors.experts.items():
            for projection, pairs in projections.items():
                found |= zip(self.names.experts_on_disk(module, projection), pairs, strict=True)
        return found

    @property
    def max_rank(self) -> int:
        """The largest rank of any projection."""
        return max(len(self._some(place).a) for place in self.places)

    @property
    def places(self) -> list[Place]:
        """Everything that the adapter changes."""
        experts = self.factors.experts.items()
        return [
            *(Place(name) for name in self.factors.linears),
            *(Place(module, projection) for module, projections in experts for projection in projections),
        ]

    def pair(self, place: Place) -> Factors:
        """The factors of a place; of a projection its experts stacked."""
        if place.projection is None:
            return self.factors.linears[place.module]
        return stacked(self.factors.experts[place.module][place.projection])

    def _some(self, place: Place) -> Factors:
        """The factors of a place; of a projection those of one expert, whose rank and scale all have."""
        if place.projection is None:
            return self.factors.linears[place.module]
        return self.factors.experts[place.module][place.projection][0]

    @cached_property
    def common_scale(self) -> float:
        """The scale that most places have: for formats with one for all, those of others are folded into B."""
        return Counter(self._some(place).scale for place in self.places).most_common(1)[0][0]

    def only(self, belongs: Callable[[Place], bool]) -> "ExportSource":
        """The same adapter with zeros for B everywhere else: what `belongs` is false of changes nothing."""

        def kept(place: Place, pair: Factors) -> Factors:
            return pair if belongs(place) else pair._replace(b=torch.zeros_like(pair.b), magnitude=None)

        linears = {name: kept(Place(name), pair) for name, pair in self.factors.linears.items()}
        experts = {
            module: {each: [kept(Place(module, each), pair) for pair in pairs] for each, pairs in projections.items()}
            for module, projections in self.factors.experts.items()
        }
        part = replace(self, factors=AdapterFactors(experts, linears))
        same = "tokenizer", "plain_tokens", "examples", "recipe", "is_packed"  # what may have been read already
        part.__dict__.update({name: self.__dict__[name] for name in same if name in self.__dict__})
        return part

    @cached_property
    def changed(self) -> list[str]:
        """Live names of the parameters that the adapter changes."""
        found = [f"{name}.weight" for name in self.factors.linears]
        for module, held in self.factors.experts.items():
            spec = self.names.specs[module]
            stacks = {weight: layout.fused_projections(spec, weight) for weight in spec.weight_names}
            found += [f"{module}.{weight}" for weight, each in stacks.items() if held.keys() & set(each)]
        return found

    def updates(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """What the adapter adds to the live model: name of a parameter, left and right; their product is added.

        Of a linear the product is [out, in]; of a stack of experts it is laid out as the family's own parameter, the
        projections that it does not adapt with zeros. Nothing of any export format goes into this.
        """
        for name in self.changed:
            module, _, weight = name.rpartition(".")
            yield (
                name,
                *(self.linear_update(module) if module in self.factors.linears else self.stack_update(module, weight)),
            )

    def linear_update(self, name: str) -> tuple[Tensor, Tensor]:
        """Left [out, r] and right [r, in] of a linear or a router, float32."""
        a, b, scale, _ = self.factors.linears[name]
        return b.float() * scale, a.float()

    def stack_update(self, module: str, weight: str, experts: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Left and right of some experts of a stack that the adapter changes, as the family lays it out."""
        spec, held = self.names.specs[module], self.factors.experts[module]
        projections = layout.fused_projections(spec, weight)
        adapted = {each: stacked(held[each][experts]) for each in projections if each in held}
        right = torch.cat([pair.a.float() for pair in adapted.values()], dim=1)
        count, rank, outputs = right.shape[0], right.shape[1], spec.shape(projections[0])[0]
        parts, start = [], 0
        for each in projections:
            part = right.new_zeros(outputs, count, rank)
            if each in adapted:
                b = adapted[each].b.float() * adapted[each].scale
                part[:, :, start : start + b.shape[2]] = b.transpose(0, 1)
                start += b.shape[2]
            parts.append(part)
        left = layout.join_rows(spec, weight, parts).transpose(0, 1)
        return (right.mT, left.mT) if spec.is_transposed else (left, right)

    @property
    def uses_dora(self) -> bool:
        """Whether the adapter has magnitudes."""
        return bool(self.adapter.config.get("use_dora"))

    def magnitudes(self) -> Iterator[tuple[str, Tensor]]:
        """DoRA's, of each parameter that has some: laid out as the parameter, but 1 wide along its input features."""
        for name in self.changed if self.uses_dora else ():
            module, _, weight = name.rpartition(".")
            if module in self.factors.linears:
                if (magnitude := self.factors.linears[module].magnitude) is not None:
                    yield name, magnitude.float().unsqueeze(1)
            else:
                found = self.stack_magnitudes(module, weight)
                yield name, found.unsqueeze(1 if self.names.specs[module].is_transposed else 2)

    def stack_magnitudes(self, module: str, weight: str, experts: slice = slice(None)) -> Tensor:
        """Magnitudes [E, out] of some experts of a stack, as its features are ordered; NONE for those without."""
        spec, held = self.names.specs[module], self.factors.experts[module]
        count = len(range(*experts.indices(spec.num_experts)))
        parts = []
        for each in layout.fused_projections(spec, weight):
            given = stacked(held[each][experts]).magnitude if each in held else None
            none = torch.full((count, spec.shape(each)[0]), NONE)
            parts.append((none if given is None else given.float()).T)
        return layout.join_rows(spec, weight, parts).T

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return load_tokenizer(self.base.folder, self.base.trust_remote_code)

    @cached_property
    def examples(self) -> list[TokenizedExample]:
        """The run's evaluation examples; its training examples where it has none of these. At most 64."""
        config, data = self.context.config, self.context.record["data"]
        which = "train" if config.data.eval is None else "eval"
        settled_data = settled(config.data, data[which])
        found = prepare_examples(settled_data, which, self.tokenizer, objective=config.objective)  # type: ignore[arg-type]
        return [found.examples[index] for index in range(min(len(found.examples), 64))]

    @cached_property
    def plain_tokens(self) -> list[int]:
        """Ids of tokens that are parts of text: none that marks a turn of a chat, an image or the like."""
        count = self.model.get_input_embeddings().weight.shape[0]
        found = set(self.tokenizer.get_vocab().values()) - self.tokenizer.added_tokens_decoder.keys()
        return sorted(each for each in found if each < count)

    def prompts(self) -> list[list[int]]:
        """Token ids on which engines are compared.

        Starts and ends of eight examples, spread over all; and random tokens, the more of them the more experts there
        are, so that most experts are routed to by some.
        """
        examples, count = self.examples, min(8, len(self.examples))
        chosen = [examples[index * len(examples) // count].input_ids for index in range(count)]
        texts = [ids[-_LENGTH:] if index % 2 else ids[:_LENGTH] for index, ids in enumerate(chosen)]
        experts = max((self.names.specs[module].num_experts for module in self.factors.experts), default=0)
        tokens = min(max(_LEAST, _PER_EXPERT * experts), _MOST)
        drawn = random.Random(0).choices(self.plain_tokens, k=tokens)
        return [*texts, *(drawn[start : start + _LENGTH] for start in range(0, tokens, _LENGTH))]

    @property
    def num_weights(self) -> int:
        """Of the base model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def why_too_large(self) -> str | None:
        """Why the model cannot be loaded for the reference; None where it can."""
        # A copy of what is changed, to go back to, and what is added to one stack.
        needed = 4 * (2 * self.num_weights + max(parameter.numel() for parameter in self.model.parameters()))
        available = available_memory()
        if needed > available:
            needs, has = format_size(needed), format_size(available)
            return f"the comparison needs {needs} of memory, in float32, and {has} are available"
        return None


def recipe_of(
    base: Nf4Folder | CheckpointIndex, described: PreTrainedModel, names: NameMap, asked: QuantizationConfig
) -> Recipe:
    """What of a base is in 4 bits, or is to be, and how."""
    if isinstance(base, Nf4Folder):
        return recipe_of_folder(base, described, names, asked)
    return read_recipe(described, names, base.tensors, asked, base.folder)
