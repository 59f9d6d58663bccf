"""Verification: an export is run in its engine, in a process of its own, and compared with a reference.

The reference is independent of what wrote the export: stock transformers with the base in float32, and scale * B @ A
added to its live parameters (`ExportSource.updates`). Compared are log-probabilities of every token at every position
of a few evaluation examples, of the base alone too: an engine that rounds does so there as well, and may differ twice
as much with the adapter. The adapter's own effect has to be larger, or nothing would be proved. And of an expert that
no compared position is sent to, nothing is: how many are reached is counted in the reference.
"""

import math
import shutil
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import one_hot

from expertune.checkpoint.meta import auto_class
from expertune.errors import ExpertuneError
from expertune.exporting import VERIFICATION
from expertune.exporting.formats import Engine, Format, Options, Verdict
from expertune.exporting.programs import BrokenOffError, ProgramError, run_program
from expertune.exporting.source import ExportSource, Place
from expertune.run.directory import CALIBRATION
from expertune.storage import SCRATCH, write_json

_PROGRAM, _TRAINED, _REFERENCE = "stock.py", "trained.py", "reference"
# An effect this many times the tolerance: half of it, as a wrong scale makes, is then still beyond the tolerance.
_EFFECT = 4
# An engine that differs more than this many times its floor without the adapter computes another model.
_CEILING = 20
# What is less probable counts as this: engines that exponentiate in float32 have nothing left there.
_LEAST = -50.0

# Parts of an export that are written at a time, to find out which disagree.
_BYTES_AT_ONCE = 10**9

Case = Mapping[str, Any]
Answers = dict[str, dict[str, Tensor]]


def verify(source: ExportSource, form: Format, folder: Path, base: Path) -> list[Verdict]:
    """Run an export in each of its engines.

    Args:
        source: what was exported.
        form: its format.
        folder: where it was written.
        base: a 16-bit folder of the base model.
    """
    return [_verify(source, form, engine, base, folder) for engine in form.engines(source, folder, base)]


def write_verification(
    folder: Path,
    form: Format,
    options: Options,
    source: ExportSource,
    verdicts: Sequence[Verdict],
    hub: str | None = None,
) -> dict[str, Any]:
    """Write `verification.json`: what was exported, to which name on the hub, and what came of each engine.

    Returns its content.
    """
    values = {
        "format": form.name,
        "options": asdict(options),
        "adapter": source.adapter_name,
        "base": source.context.config.model,
        **({"hub": hub} if hub else {}),
        "notes": list(form.notes),
        "compared_on": "dequantized" if source.is_packed else options.base,
        "engines": [asdict(verdict) for verdict in verdicts],
    }
    write_json(folder / VERIFICATION, values)
    return values


def _verify(source: ExportSource, form: Format, engine: Engine, base: Path, folder: Path) -> Verdict:
    if engine.missing:
        return Verdict(engine.name, "not verified", engine.missing)
    if engine.verdict is not None:
        return engine.verdict(source, engine)
    if reason := source.why_too_large():
        return Verdict(engine.name, "not verified", reason)
    with TemporaryDirectory(prefix=SCRATCH, dir=folder) as scratch:
        compared = _Compared(source, form, engine, base, Path(scratch))
        try:
            return compared.verdict()
        except ProgramError as error:
            return Verdict(engine.name, "not verified", str(error))


class _Compared:
    """One engine beside the reference."""

    def __init__(self, source: ExportSource, form: Format, engine: Engine, base: Path, scratch: Path) -> None:
        self.source, self.form, self.engine, self.base, self.scratch = source, form, engine, base, scratch
        self.prompts = source.prompts()
        self.positions = list(range(sum(map(len, self.prompts))))
        self.tolerance = engine.floor

    def verdict(self) -> Verdict:
        """Compare base and export; where they disagree, find out which tensors do."""
        updates = {"updates": self._write_updates("updates", self.source)}
        reference_cases: dict[str, Case] = {"base": {}, "exported": updates}
        if self.engine.has_trained and self.engine.reference == "dequantized":
            reference_cases["unrounded"] = updates | {"rounded": None}
        cases = {"base": self.engine.base, "exported": self.engine.exported}
        try:
            reference, answers = self._ask_both(
                reference_cases, {name: case for name, case in cases.items() if case is not None}, self._scored
            )
        except BrokenOffError:
            raise
        except ProgramError as error:
            if self._answer("base" if self.engine.base else f"{_REFERENCE}-exported").is_file():
                return Verdict(self.engine.name, "failed", f"the engine does not take the export: {error}")
            raise
        name, exported = self._engine_name(), answers["exported"]
        base = answers.get("base", reference["base"])
        differences = {
            "base": self._distance(reference["base"], base),
            "exported": self._distance(reference["exported"], exported),
            "effect": self._distance(reference["base"], reference["exported"]),
        }
        self.tolerance = max(2 * differences["base"], self.engine.floor)
        figures: dict[str, Any] = {
            "tolerance": self.tolerance,
            "differences": differences,
            "measure": self.engine.measure,
            "prompts": len(self.prompts),
            "positions": len(exported["logprobs"]),
            "experts": self._reached(reference["exported"]),
            "loss": {"base": _loss(base), "exported": _loss(exported), "reference": _loss(reference["exported"])},
            "examples": len(self._scored),
        }
        if not math.isfinite(differences["base"] + differences["effect"]):
            reason = "log-probabilities of the base, or of base and adapter in the reference, are not finite"
            return Verdict(name, "not verified", reason, {"experts": figures["experts"]})
        if differences["base"] > _CEILING * self.engine.floor:
            reason = (
                f"the engine differs by {differences['base']:.2g} on the base model alone, so that it computes another "
                "model than transformers, whatever the adapter does"
            )
            return Verdict(name, "not verified", reason, figures)
        if not differences["exported"] <= self.tolerance:
            return self._failed(name, figures)
        if differences["effect"] < _EFFECT * self.tolerance:
            reason = (
                f"the adapter changes log-probabilities by {differences['effect']:.2g} at most, too little to be told "
                f"from the engine's own differences of {self.tolerance:.2g}"
            )
            return Verdict(name, "not verified", reason, figures)
        open_questions = [self._not_reached(figures["experts"]), self._split_otherwise(exported, figures)]
        if self.engine.has_trained:
            try:
                trained = self._ask(_TRAINED, {"trained": {"live": True}}, None, self._scored)["trained"]
            except ProgramError as error:
                open_questions.append(f"the model as it was trained was not run: {error}")
            else:
                figures["loss"]["trained"] = _loss(trained)
                differences["trained"] = self._distance(reference.get("unrounded", reference["exported"]), trained)
                if "unrounded" in reference and not differences["trained"] <= self.tolerance:
                    reason = (
                        f"the model as it was trained differs by {differences['trained']:.2g} from the values that its "
                        f"4-bit weights stand for with the adapter added, and {self.tolerance:.2g} are allowed"
                    )
                    return Verdict(name, "failed", reason, figures)
        return Verdict(name, "verified", "; ".join(filter(None, open_questions)) or None, figures)

    def _failed(self, name: str, figures: dict[str, Any]) -> Verdict:
        groups: list[str] = []
        try:
            groups = self._disagreeing()
            where = "; of what is exported anew by itself, nothing disagrees: these files are not as they were written"
        except (ExpertuneError, OSError):
            where = ""  # which tensors it is cannot be said: the parts do not fit on the disk, or the like
        if groups:
            where = f"; these tensors disagree: {', '.join(groups)}"
        reason = (
            f"log-probabilities differ by {figures['differences']['exported']:.2g} from base and adapter in float32, "
            f"and {self.tolerance:.2g} are allowed{where}"
        )
        return Verdict(name, "failed", reason, figures, groups)

    def _reached(self, reference: Mapping[str, Tensor]) -> dict[str, int]:
        """How many of the experts that the adapter changes a compared position is sent to; each layer has its own."""
        modules = list(self.source.factors.experts)
        chosen = [reference[f"routed.{name}"][self.positions] for name in modules if f"routed.{name}" in reference]
        count = sum(self.source.names.specs[name].num_experts for name in modules)
        return {"reached": sum(len(each.unique()) for each in chosen), "of": count}

    @staticmethod
    def _not_reached(experts: Mapping[str, int]) -> str | None:
        missed = experts["of"] - experts["reached"]
        return f"{missed} of {experts['of']} experts of the adapter were not reached by the prompts" if missed else None

    def _split_otherwise(self, exported: Mapping[str, Tensor], figures: dict[str, Any]) -> str | None:
        """Whether the engine makes the same token ids of texts, where it was asked."""
        if "alike" not in exported:
            return None
        alike, count = int(exported["alike"]), len(self.engine.exported["texts"])
        figures["texts"] = {"alike": alike, "of": count}
        return f"{count - alike} of {count} texts are split into other tokens" if alike < count else None

    @property
    def _scored(self) -> list[list[list[int]]]:
        return [[example.input_ids, example.labels] for example in self.source.examples]

    def _disagreeing(self) -> list[str]:
        """The projections whose tensors disagree by themselves, each with its layers where not all of them do."""
        found: list[str] = []
        by_projection: dict[str, list[Place]] = {}
        for place in self.source.places:
            by_projection.setdefault(self._name(place), []).append(place)
        bad = self._that_disagree([set(places) for places in by_projection.values()])
        for (projection, places), is_bad in zip(by_projection.items(), bad, strict=True):
            if is_bad:
                each = self._that_disagree([{place} for place in places])
                wrong = [place for place, is_wrong in zip(places, each, strict=True) if is_wrong]
                everywhere = len(wrong) in (0, len(places))
                found += [projection] if everywhere else [f"{projection} of {place.module}" for place in wrong]
        return found

    def _that_disagree(self, groups: Sequence[Set[Place]]) -> list[bool]:
        """Whether each of the groups disagrees when it alone is exported."""
        found: list[bool] = []
        at_once = max(1, int(_BYTES_AT_ONCE // max(1, self.form.nbytes(self.source))))
        for start in range(0, len(groups), at_once):
            folders, reference, cases = [], {}, {}
            for number, group in enumerate(groups[start : start + at_once], start=start):
                part, folder = self.source.only(group.__contains__), self.scratch / f"part-{number}"
                folder.mkdir()
                self.form.write(part, folder, lambda *_: None)
                engines = self.form.engines(part, folder, self.base)
                cases[str(number)] = next(each for each in engines if each.name == self.engine.name).exported
                reference[str(number)] = {"updates": self._write_updates(f"updates-{number}", part)}
                folders.append(folder)
            try:
                expected, answers = self._ask_both(reference, cases)
                found += [self._distance(expected[name], answers[name]) > self.tolerance for name in cases]
            except ProgramError:
                found += [True] * len(cases)
            for folder in folders:
                shutil.rmtree(folder)
        return found

    def _distance(self, reference: Mapping[str, Tensor], answer: Mapping[str, Tensor]) -> float:
        return _distance(reference, answer, self.engine.measure)

    def _name(self, place: Place) -> str:
        if place.projection:
            return self.source.names.projection_names[place.projection]
        return self.source.names.on_disk(place.module).rpartition(".")[2]

    def _write_updates(self, name: str, source: ExportSource) -> str:
        path = self.scratch / f"{name}.safetensors"
        tensors: dict[str, Tensor] = {}
        for parameter, left, right in source.updates():
            tensors |= {f"{parameter}.left": left.contiguous(), f"{parameter}.right": right.contiguous()}
        tensors |= {f"{parameter}.magnitude": magnitude.contiguous() for parameter, magnitude in source.magnitudes()}
        save_file(tensors, path)
        return str(path)

    def _ask_both(
        self, reference: Mapping[str, Case], cases: Mapping[str, Case], scored: Sequence[Any] = ()
    ) -> tuple[Answers, Answers]:
        """Answers of the reference, and of the engine; in one process where both are the same program."""
        fixed = {"model": str(self.base), "rounded": self.engine.rounded}
        asked = {f"{_REFERENCE}-{name}": fixed | dict(case) for name, case in reference.items()}
        program = _PROGRAM if self.engine.reference == "source" else _TRAINED
        if self.engine.program == program and self.engine.python is None:
            found = self._ask(program, asked | dict(cases), None, scored)
        else:
            found = self._ask(program, asked, None, scored)
            first = found.get(f"{_REFERENCE}-exported")
            if first is not None and self.engine.positions:
                routed = [tensor for key, tensor in first.items() if key.startswith("routed.")]
                self.positions = spread(routed, len(self.positions), self.engine.positions)
            found |= self._ask(self.engine.program, cases, self.engine.python, scored)
        return {name: found[f"{_REFERENCE}-{name}"] for name in reference}, {name: found[name] for name in cases}

    def _ask(self, program: str, cases: Mapping[str, Case], python: str | None, scored: Sequence[Any] = ()) -> Answers:
        """Run a program on the prompts; raises `ProgramError` where it does not answer a case."""
        request: dict[str, Any] = {
            "prompts": self.prompts,
            "positions": self.positions,
            "experts": list(self.source.factors.experts),
            "scored": scored,
            "auto": auto_class(self.source.model.config).__name__,
            "trust": self.source.base.trust_remote_code,
            "cases": cases,
        }
        if program == _TRAINED:  # the only one that takes 4-bit values
            request["base"] = {
                "folder": str(self.source.base.folder),
                "adapter": self.source.adapter.where,
                "calibration": str(self.source.context.output_dir / CALIBRATION),
                "quantization": self.source.as_trained.model_dump(mode="json", exclude_unset=True),
            }
        what = Path(program).stem
        run_program(
            program, request, self.scratch / "request.json", what, self.source.num_weights, python or sys.executable
        )
        return {name: load_file(self._answer(name)) for name in cases}

    def _answer(self, case: str) -> Path:
        return self.scratch / f"{case}.safetensors"

    def _engine_name(self) -> str:
        with safe_open(self._answer("exported"), framework="pt") as file:
            versions = (file.metadata() or {}).get("engine")
        return f"{self.engine.name} ({versions})" if versions else self.engine.name


def spread(routed: Sequence[Tensor], total: int, count: int) -> list[int]:
    """Positions that reach as many experts as they can, and where these are few, others all over.

    Args:
        routed: of each layer the experts of every position [total, k].
        total: how many positions there are.
        count: how many to choose at most.
    """
    left = torch.cat([torch.zeros(total, 1), *(one_hot(each).amax(1).float() for each in routed)], dim=1)
    chosen: list[int] = []
    while left.any() and len(chosen) < count:
        best = int(left.sum(1).argmax())
        chosen.append(best)
        left[:, left[best] > 0] = 0
    others = torch.linspace(0, total - 1, max(0, count // 2 - len(chosen))).round().long().tolist()
    return sorted({*chosen, *others})


def _distance(reference: Mapping[str, Tensor], answer: Mapping[str, Tensor], measure: str) -> float:
    """The largest or mean difference of two log-probabilities, at the positions that the engine has answered.

    An engine may answer some positions only, `positions` [P], and some tokens only, `tokens` [V'].
    """
    expected, found = reference["logprobs"], answer["logprobs"]
    if "positions" in answer:
        expected = expected[answer["positions"]]
    if "tokens" in answer:
        expected = expected[:, answer["tokens"]]
    if expected.shape != found.shape:
        raise ProgramError(f"it answered {tuple(found.shape)} log-probabilities for {tuple(expected.shape)}")
    differences = (expected.clamp(min=_LEAST) - found.clamp(min=_LEAST)).abs()
    if not differences.isfinite().all():
        return float("inf")
    return float(differences.max() if measure == "max" else differences.mean())


def _loss(answer: Mapping[str, Tensor]) -> float | None:
    """Nats per token of the scored examples; None where the engine takes none."""
    if "loss" not in answer or not answer["loss"][1]:
        return None
    return float(answer["loss"][0] / answer["loss"][1])
