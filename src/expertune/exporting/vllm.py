"""Adapters for vLLM: names and layout as its model of the family has them, one rank that it allows, one scale.

vLLM's classes say whether a family's experts are single matrices or stacks, and what they are called; where vLLM is
installed they are asked. It passes over adapters of modules that it has no adapter layer for, and stops at an expert
that lacks one of its projections: what it made of each tensor is therefore read back and compared.

Read from vLLM 0.32. Shape suffixes: E experts, r rank.
"""

import json
import math
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from expertune.adapt.factors import PREFIX, Factors, stacked
from expertune.adapt.files import Origin, stock_config, write_adapter
from expertune.adapt.layout_trial import StockLayout
from expertune.adapt.outgoing import pair_in_file, stack_in_file
from expertune.adapt.patterns import leaves
from expertune.checkpoint.json_file import read_mapping
from expertune.checkpoint.writer import Outgoing
from expertune.errors import ExportError
from expertune.experts import layout
from expertune.exporting.formats import Engine, Format, Options, Progress, Verdict
from expertune.exporting.programs import BrokenOffError, ProgramError, run_program
from expertune.exporting.source import ExportSource, Place
from expertune.storage import write_json

_PROGRAM = "vllm_loader.py"
VLLM_PYTHON = "EXPERTUNE_VLLM_PYTHON"
"""Names the interpreter of an environment with vLLM, which needs another transformers than Expertune does."""

_INSTALL = f"pip install vllm in an environment of its own, and set {VLLM_PYTHON} to its python"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` may be (`MaxLoRARanks`)."""
_ORDER = ("gate", "down", "up")
"""Which projections are w1, w2 and w3."""
_TOLERANCE = 1e-5


class VllmAdapter(Format):
    """`vllm`: `adapter_model.safetensors` and `adapter_config.json`."""

    name = "vllm"

    def __init__(self) -> None:
        self._stacked = False
        self._leaves: dict[str, str] = {}

    def require(self, source: ExportSource) -> None:
        """Refuse a rank that is too large, and a family that vLLM takes no adapters for."""
        self._leaves = dict(source.names.projection_names)
        if vllm_python() is None:
            self._stacked = _is_stacked_on_disk(source)
        else:
            described = _ask(source, {})
            self._stacked = described["stacked"]
            known = list(dict.fromkeys(name.rpartition(".")[2] for name in described["experts"]))
            if source.factors.experts and len(known) > len(self._leaves):
                raise ExportError(
                    "--to vllm: vLLM has no model of this family of its own, and with transformers' it looks for an "
                    f"adapter of each expert under {', '.join(known)} at once, so that it takes none; export the "
                    "merged model with --to merged"
                )
            names = known[: len(self._leaves)]
            if names and set(names) != set(self._leaves.values()):
                self._leaves = dict(zip(_ORDER, names, strict=False))
        if (rank := self._needed_rank(source)) > _RANKS[-1]:
            raise ExportError(f"--to vllm: the adapter has rank {rank}, and vLLM takes {_RANKS[-1]} at most")

    def nbytes(self, source: ExportSource) -> int:
        """Bytes of the tensors."""
        return sum(outgoing.nbytes for outgoing in self._tensors(source))

    def write(self, source: ExportSource, folder: Path, progress: Progress) -> None:
        """Write the adapter's two files."""
        tensors = sorted(self._tensors(source), key=lambda outgoing: outgoing.name)
        rank, given = self._rank(source), source.adapter.config
        modules = [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in (each.name for each in tensors)]
        targets = leaves(name for name in modules if not name.endswith((".lora_B.weight", ".base_layer", ".experts")))
        base = given.get("base_model_name_or_path") or source.context.config.model
        config = stock_config(Origin(base, given.get("revision"), {}), StockLayout(r=rank, target_modules=targets))
        scale = source.common_scale
        write_adapter(folder, tensors, config | {"lora_alpha": _whole(rank * scale)}, source.fingerprint)

    def engines(self, source: ExportSource, folder: Path, base: Path) -> list[Engine]:
        """vLLM's loader, whose tensors are compared: its kernels for experts run on GPUs alone."""
        case = {"adapter": str(folder), "rank": self._rank(source)}
        missing = None if vllm_python() else _INSTALL
        return [Engine("vLLM's loader", _PROGRAM, {}, case, missing=missing, verdict=self._verdict)]

    def _verdict(self, source: ExportSource, engine: Engine) -> Verdict:
        """Compare what vLLM would multiply by with the adapter's own factors, on random inputs."""
        names = [source.names.on_disk(each) for each in [*source.factors.linears, *source.factors.experts]]
        for module, projections in source.factors.experts.items():
            names += [name for each in projections for name in self._experts(source, module, each)]
        with TemporaryDirectory(prefix="expertune-vllm-") as scratch:
            try:
                _ask(source, {**engine.exported, "names": names}, Path(scratch))
            except ProgramError as error:
                verdict = "not verified" if isinstance(error, BrokenOffError) else "failed"
                return Verdict(engine.name, verdict, str(error).partition(": ")[2])
            with safe_open(Path(scratch) / "loaded.safetensors", framework="pt") as file:
                name = f"{engine.name} ({file.metadata()['engine']})"
                loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        differences = {place: self._difference(source, place, loaded) for place in source.places}
        bad = [place for place, difference in differences.items() if not difference <= _TOLERANCE]
        figures = {"relative_tolerance": _TOLERANCE, "relative_difference": max(differences.values())}
        if not bad:
            return Verdict(name, "verified", None, figures)
        groups = list(dict.fromkeys(_name(source, place) for place in bad))
        reason = f"{len(bad)} of {len(differences)} of its layers multiply by something else: {', '.join(groups)}"
        return Verdict(name, "failed", reason, figures, groups)

    def _needed_rank(self, source: ExportSource) -> int:
        """Of stacks gate and up share one A, and each has its own part of the rank."""
        ranks = [source.max_rank]
        if self._stacked:
            for projections in source.factors.experts.values():
                parts = [len(pairs[0].a) for name, pairs in projections.items() if name != "down"]
                ranks.append(2 * max(parts, default=0))
        return max(ranks)

    def _rank(self, source: ExportSource) -> int:
        needed = self._needed_rank(source)
        return next(rank for rank in _RANKS if rank >= needed)

    def _tensors(self, source: ExportSource) -> Iterator[Outgoing]:
        rank = self._rank(source)
        for name, pair in source.factors.linears.items():
            yield from pair_in_file(source.names.on_disk(name), pair.a, pair.b, rank, pair.scale / source.common_scale)
        for module, held in source.factors.experts.items():
            spec, stem = source.names.specs[module], source.names.on_disk(module)
            if self._stacked:
                for weight, ending in zip(spec.weight_names, (".base_layer", ""), strict=True):
                    stacks = self._stacks(source, module, weight)
                    yield from stack_in_file(f"{stem}{ending}", spec, weight, stacks, rank)
                continue
            some = next(iter(held.values()))[0]
            for projection in spec.projections:
                outputs, inputs = spec.shape(projection)
                # An expert without one of its projections is an error to vLLM.
                nothing = Factors(some.a.new_zeros(1, inputs), some.b.new_zeros(outputs, 1), source.common_scale)
                pairs = held.get(projection) or [nothing] * spec.num_experts
                for name, (a, b, scale, _) in zip(self._experts(source, module, projection), pairs, strict=True):
                    yield from pair_in_file(name, a, b, rank, scale / source.common_scale)

    @staticmethod
    def _stacks(source: ExportSource, module: str, weight: str) -> dict[str, Factors]:
        """The factors of a stack's projections, with what goes into B; some of rank 0 where it has none."""
        spec, held = source.names.specs[module], source.factors.experts[module]
        projections = layout.fused_projections(spec, weight)
        found = {each: stacked(held[each]) for each in projections if each in held}
        if found:
            return {each: pair._replace(scale=pair.scale / source.common_scale) for each, pair in found.items()}
        (outputs, inputs), (some, *_) = spec.shape(projections[0]), next(iter(held.values()))
        count = spec.num_experts
        return {projections[0]: Factors(some.a.new_zeros(count, 0, inputs), some.b.new_zeros(count, outputs, 0), 1.0)}

    def _experts(self, source: ExportSource, module: str, projection: str) -> list[str]:
        stem, count = source.names.on_disk(module), source.names.specs[module].num_experts
        return [f"{stem}.{expert}.{self._leaves[projection]}" for expert in range(count)]

    def _expert_factors(
        self, source: ExportSource, place: Place, loaded: dict[str, Tensor]
    ) -> list[tuple[Tensor, Tensor] | None]:
        assert place.projection is not None
        module, spec = source.names.on_disk(place.module), source.names.specs[place.module]
        weight = next(each for each in spec.weight_names if place.projection in layout.fused_projections(spec, each))
        stack = _factors(loaded, f"{module}.{'w2' if weight == spec.weight_names[1] else 'w13'}")
        if stack is None:
            return [_factors(loaded, name) for name in self._experts(source, place.module, place.projection)]
        part = layout.fused_projections(spec, weight).index(place.projection)
        return [(a, layout.split_rows(spec, weight, b)[part]) for a, b in zip(*stack, strict=True)]

    def _difference(self, source: ExportSource, place: Place, loaded: dict[str, Tensor]) -> float:
        """How far what vLLM adds to random inputs is from scale * B @ A, by its size; 1 where vLLM has
        nothing, or no numbers."""
        a, b, scale, _ = source.pair(place)
        if place.projection is None:
            theirs = _factors(loaded, source.names.on_disk(place.module))
            pairs = [(a, b, theirs)]
        else:
            pairs = [(a[i], b[i], each) for i, each in enumerate(self._expert_factors(source, place, loaded))]
        found = 0.0
        for own_a, own_b, theirs in pairs:
            if theirs is None or theirs[0].shape[1] != own_a.shape[1] or theirs[1].shape[0] != own_b.shape[0]:
                return 1.0
            inputs = torch.randn(own_a.shape[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            expected = scale * (own_b.double() @ (own_a.double() @ inputs))
            difference = theirs[1].double() @ (theirs[0].double() @ inputs) - expected
            relative = float(difference.norm() / expected.norm().clamp_min(1e-12))
            found = max(found, relative if math.isfinite(relative) else 1.0)
        return found


def make(name: str, options: Options) -> VllmAdapter:
    """The format of this name."""
    return VllmAdapter()


def vllm_python() -> str | None:
    """The interpreter that has vLLM; None where there is none."""
    return os.environ.get(VLLM_PYTHON) or (sys.executable if find_spec("vllm") else None)


def _ask(source: ExportSource, request: dict[str, Any], scratch: Path | None = None) -> dict[str, Any]:
    """What vLLM says of a family, and what it makes of an adapter."""
    with TemporaryDirectory(prefix="expertune-vllm-") as folder:
        config = read_mapping(source.base.folder / "config.json")
        config.pop("quantization_config", None)
        (Path(folder) / "model").mkdir()
        write_json(Path(folder) / "model" / "config.json", config)
        path = (scratch or Path(folder)) / "request.json"
        python = vllm_python() or sys.executable
        request = {"config": f"{folder}/model", **request}
        run_program(_PROGRAM, request, path, "--to vllm: vLLM refuses", source.num_weights, python)
        found: dict[str, Any] = json.loads(path.with_name("described.json").read_text(encoding="utf-8"))
        return found


def _is_stacked_on_disk(source: ExportSource) -> bool:
    """Whether the family's checkpoints hold stacks under the names of the live model, as those do that vLLM stacks."""
    module, spec = next(iter(source.names.specs.items()))
    if source.names.locate(f"{source.names.expert_on_disk(module, 0, 'down')}.weight").projection:
        return False
    weight = spec.weight_names[0]
    return source.names.on_disk(f"{module}.{weight}") == f"{source.names.on_disk(module)}.{weight}"


def _factors(loaded: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor] | None:
    return (loaded[f"{name}.A"], loaded[f"{name}.B"]) if f"{name}.A" in loaded else None


def _name(source: ExportSource, place: Place) -> str:
    if place.projection:
        return source.names.projection_names[place.projection]
    return source.names.on_disk(place.module).rpartition(".")[2]


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value
