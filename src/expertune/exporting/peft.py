"""Adapters for PEFT: under per-expert names, or as PEFT itself holds stacked experts; scales folded into B."""

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from expertune.adapt.factors import stacked
from expertune.adapt.file_layout import fused_layout, stock_layout
from expertune.adapt.files import Origin, stock_config, write_adapter
from expertune.adapt.layout_trial import StockLayout
from expertune.adapt.outgoing import pair_in_file, stack_in_file
from expertune.checkpoint.linears import is_linear
from expertune.checkpoint.targets import Rank, ResolvedTargets
from expertune.checkpoint.writer import Outgoing
from expertune.errors import ExportError
from expertune.experts.layout import fused_projections
from expertune.exporting.formats import Engine, Format, Options, Progress
from expertune.exporting.source import ExportSource

LEGACY_PYTHON = "EXPERTUNE_LEGACY_PYTHON"
"""Names an interpreter that has PEFT on transformers 4, to verify there as well."""


class PeftAdapter(Format):
    """`peft` and `peft-fused`."""

    takes_dora = True

    def __init__(self, name: str) -> None:
        self.name = name

    @cached_property
    def is_fused(self) -> bool:
        """Whether stacks of experts are one tensor each."""
        return self.name == "peft-fused"

    def require(self, source: ExportSource) -> None:
        """Refuse what stock PEFT does not read in this layout."""
        layout = self._layout(source)
        other = "peft" if self.is_fused else "peft-fused"
        if self.is_fused and not source.factors.experts:
            raise ExportError("--to peft-fused: the adapter changes no experts; export it with --to peft")
        if source.uses_dora and source.factors.experts:
            raise ExportError(
                f"--to {self.name}: PEFT has no DoRA on stacked experts, as which it holds this model's; export base "
                "and adapter as one model with --to merged"
            )
        if layout.refusal or bool(layout.stacks) != self.is_fused:
            reason = layout.refusal or "PEFT has no per-expert names for this family"
            raise ExportError(f"--to {self.name}: stock PEFT does not read it: {reason}; try --to {other}")

    def nbytes(self, source: ExportSource) -> int:
        """Bytes of the tensors."""
        return sum(outgoing.nbytes for outgoing in self._tensors(source, self._layout(source)))

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Write the adapter's two files."""
        layout, config = self._layout(source), source.adapter.config
        base = config.get("base_model_name_or_path") or source.context.config.model
        origin = Origin(base, config.get("revision"), {})
        tensors = sorted(self._tensors(source, layout), key=lambda outgoing: outgoing.name)
        write_adapter(folder, tensors, stock_config(origin, layout), source.fingerprint)

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """Stock PEFT here, and for per-expert names on transformers 4 where there is such an interpreter."""
        alone, exported = {"model": str(base)}, {"model": str(base), "adapter": str(folder)}
        found = [Engine("PEFT", "stock.py", alone, exported)]
        if not self.is_fused:
            python = os.environ.get(LEGACY_PYTHON)
            missing = None if python else f"set {LEGACY_PYTHON} to the python of an environment with transformers 4"
            found.append(Engine("PEFT on transformers 4", "stock.py", alone, exported, missing=missing, python=python))
        return found

    def _layout(self, source: ExportSource) -> StockLayout:
        """One rank for everything, so that no pattern is needed, and lora_alpha = r."""
        r = source.max_rank
        targets, rank = ResolvedTargets(use_dora=source.uses_dora), Rank(r, r)
        for name in source.factors.linears:
            kind = targets.linears if is_linear(source.model.get_submodule(name)) else targets.router
            kind[name] = rank
        for module, projections in source.factors.experts.items():
            targets.experts[module] = dict.fromkeys(projections, rank)
        find = fused_layout if self.is_fused else stock_layout
        return find(source.model, source.names, targets, r, {})

    def _tensors(self, source: ExportSource, layout: StockLayout) -> Iterator[Outgoing]:
        for name, pair in source.factors.linears.items():
            stem = name if name in layout.live_named else source.names.on_disk(name)
            rank = layout.ranks[name]
            yield from pair_in_file(stem, pair.a, pair.b, rank, pair.scale * rank / layout.r, pair.magnitude)
        for module, projections in source.factors.experts.items():
            spec, ranks = source.names.specs[module], layout.expert_ranks[module]
            for weight, stem in layout.stacks.get(module, {}).items():
                each = {name: projections[name] for name in fused_projections(spec, weight) if name in projections}
                rank = ranks[next(iter(each))]
                held = {name: stacked(pairs) for name, pairs in each.items()}
                held = {name: pair._replace(scale=pair.scale * rank / layout.r) for name, pair in held.items()}
                yield from stack_in_file(stem, spec, weight, held, rank)
            for projection, pairs in projections.items() if module not in layout.stacks else ():
                rank, names = ranks[projection], source.names.experts_on_disk(module, projection)
                for name, (a, b, scale, magnitude) in zip(names, pairs, strict=True):
                    yield from pair_in_file(name, a, b, rank, scale * rank / layout.r, magnitude)


def make(name: str, options: Options) -> PeftAdapter:
    """The format of this name."""
    return PeftAdapter(name)
