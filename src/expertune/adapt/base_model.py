"""Whether an adapter belongs to the base model that it is put on.

Shapes do not show it: an adapter fits every model of its family and size, and also one with more layers, of
which it then leaves some unchanged. Adapters carry their base's fingerprint; those without one are checked against the
layers that they have tensors for.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from expertune.adapt.files import read_adapter_base, read_adapter_config
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.formats.nf4_folder import CALIBRATED
from expertune.checkpoint.held import Held
from expertune.checkpoint.targets import ResolvedTargets
from expertune.errors import CheckpointError, option

_LAYER = re.compile(r"(.*?\.\d+)\.(.+)")


def require_same_base(
    folder: str | Path,
    base: Fingerprint | None,
    model: str,
    allowed_by: str | None = "set lora.init_from_other_base: true (other_base=True in load_adapter)",
) -> None:
    """Refuse an adapter that was trained on another base model.

    Args:
        folder: the adapter.
        base: what identifies the model that it is to be put on; None where that is not known.
        model: the model's name, for the message.
        allowed_by: what a user does to have it all the same; None where nothing allows it.

    Raises:
        CheckpointError: the bases differ; names the differences, and the base that the adapter names.
    """
    theirs = read_adapter_base(folder)
    if theirs is None or base is None or not (differences := theirs.differences(base)):
        return
    named = read_adapter_config(folder).get("base_model_name_or_path")
    otherwise = f", or {allowed_by} to put it on this one all the same" if allowed_by else ""
    if not theirs.of_source.differences(base):
        elsewhere = f" than {model} holds" if named != model else ""
        raise CheckpointError(
            f"{folder}: this adapter was trained on other 4-bit weights of {named}{elsewhere}: "
            f"{'; '.join(differences)}. "
            f"{_how_held(theirs.held, base.held)}{otherwise}"
        )
    more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise CheckpointError(
        f"{folder}: this adapter was trained on another base model than {model}: {'; '.join(differences[:3])}{more}"
        f". Give the base that it was trained on ({named}){otherwise}"
    )


def note_other_base(folder: str | Path, base: Fingerprint) -> str | None:
    """What a user is told who takes an adapter of another base all the same; None where the bases do not differ.

    Args:
        folder: the adapter.
        base: what identifies the model that it is put on.
    """
    theirs = read_adapter_base(folder)
    differences = theirs.differences(base) if theirs is not None else []
    return f"{folder}: taken on another base than it was trained on: {'; '.join(differences)}" if differences else None


def _how_held(held: Held, now: Held) -> str:
    """What makes the base of an adapter from the same source."""
    different = held.differences(now)
    # What is packed in MXFP4 stays so by itself.
    asked = [
        f"{key}: {'auto' if was == 'mxfp4' else was}" for key, (was, _) in different.items() if key != "calibration"
    ]
    if held.fit != CALIBRATED or not different.keys() & {"fit", "calibration"}:
        return (
            f"Hold it as it was, with {', '.join(asked)} under quantization (in an NF4 folder that is quantized so, as "
            "an argument of expertune.load_model, or in the run file)"
        )
    others = [each for each in asked if each != f"fit: {CALIBRATED}"]
    return (
        "Give the NF4 folder that `expertune quantize --calibration` makes with the calibration.safetensors"
        f"{f' (sha256 {held.calibration[:12]})' if held.calibration else ''} of the run "
        f"that it is of{', with ' + ', '.join(others) if others else ''}"
    )


def require_every_layer(folder: str | Path, wanted: ResolvedTargets, held: ResolvedTargets) -> None:
    """Refuse an adapter that leaves layers of the model out which have what it adapts in others.

    Args:
        folder: the adapter.
        wanted: everything in the model that has the names which the adapter adapts.
        held: what of it the adapter has tensors for.

    Raises:
        CheckpointError: a layer has nothing of it.
    """
    adapted = set(_places(adapted_names(held)))
    kinds = {kind for _, kind in adapted}
    layers = {layer for layer, kind in _places(adapted_names(wanted)) if kind in kinds}
    left = sorted(layers - {layer for layer, _ in adapted}, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])
    if left:
        raise CheckpointError(
            f"{folder}: the adapter has no tensors for {len(left)} of {len(layers)} layers of this model, the first is "
            f"{left[0]}: it was trained on another one. Give the base that it was trained on, or set "
            f"lora.init_from_other_base: true (for a run that is opened, {option('other-base')}) to leave those layers "
            "as they are"
        )


def adapted_names(targets: ResolvedTargets) -> set[str]:
    """What targets are on, by live name, and an expert's projection by that of its module before it."""
    experts = {f"{module}.{projection}" for module, ranks in targets.experts.items() for projection in ranks}
    return {*targets.linears, *targets.router, *experts}


def within_layers_of(adapted: set[str], names: set[str]) -> set[str]:
    """Those of the names that lie in layers where something is adapted, or in no layer, such as an output head's."""
    layers = {layer for layer, _ in _places(adapted)}
    return names - {name for name in names for layer, _ in _places({name}) if layer not in layers}


def _places(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Of each name in a layer that one, and the rest of it."""
    for name in names:
        found = _LAYER.fullmatch(name)
        if found:
            yield found[1], found[2]
