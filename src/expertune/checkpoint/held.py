"""Which of the 4-bit bases of one source a base is, as adapters and records keep it beside the fingerprint.

One source has many: which linears stay in 16 bits, what the experts' codes stand for, how scales are chosen, and by
which calibration sets them apart. What follows from a difference depends on what is done:

- An adapter that is loaded, continued or resumed computes beside these bytes. Any difference is an error.
- An export to 16-bit weights takes none of these bytes: PEFT, vLLM, llama.cpp and `merged` put the adapter on the
  source. There `Held` is not compared, only the source. An export of the 4-bit values (`--base dequantized`) takes all
  of them, and so does that of a correction (`lora.init`) over a 4-bit checkpoint of others (bitsandbytes, MXFP4): a
  difference is an error.
- What one side does not know is not compared: adapters and records of earlier releases say nothing of `layers`,
  `scheme` and `calibration`.
- Whether scales are held in 8 bits or in float32 is in none of it. The codes are the same, and the values nearly so.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from expertune.checkpoint.formats.nf4_folder import ABSMAX, CALIBRATED, FITS
from expertune.checkpoint.mixed import as_layers
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.recipe import Recipe, linears_to_quantize
from expertune.config import QuantizationConfig
from expertune.config.yaml_file import shortened
from expertune.errors import CheckpointError
from expertune.kernels.nf4 import Scheme

# What `as_layers` writes, and no other regular expression: the matches of one that somebody else has written may take
# for ever, and so may very many.
_NAME = r"[^\\^$*+?|(){}\[\]]+"
_LAYERS = re.compile(rf"{_NAME}(?:(?:\(\d+(?:\|\d+)*\)|\\d\+){_NAME})?")
_MOST_LAYERS = 4096


@dataclass(frozen=True)
class Held:
    """Which of the 4-bit bases of a source it is. None is always what is not known.

    Attributes:
        scheme: what the experts' codes stand for: `nf4` or `mxfp4`.
        layers: the linears that stay in 16 bits, as a value of `quantization.layers`, however that was written.
        fit: how the scales of 4-bit weights were chosen (`quantization.fit`).
        calibration: sha256 of the file of mean squares that they were chosen by; None also where they were not.
    """

    scheme: str | None = None
    layers: Mapping[str, int] | None = None
    fit: str | None = None
    calibration: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys that `from_json` reads; a fit is that by the largest magnitude where it is not there."""
        known = {key: value for key, value in vars(self).items() if value is not None and key != "fit"}
        return known if self.fit == ABSMAX else known | {"fit": self.fit}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: object) -> "Held":
        """What was kept, and may have been changed since: adapters and runs are received from others.

        Args:
            values: by key; what has none is not known, but that without `fit` scales are by the largest magnitude.
            where: the file, and the place in it, for messages.

        Raises:
            CheckpointError: a value is none that this release writes; names the file and the key.
        """
        values = {"fit": ABSMAX} | {key: values[key] for key in _SHOWN if key in values}
        problems = {key: _PROBLEMS[key](value) for key, value in values.items() if value is not None}
        if values.get("calibration") and values["fit"] != CALIBRATED:
            problems["calibration"] = f"scales by a calibration have the fit {CALIBRATED}"
        for key, problem in problems.items():
            if problem:
                raise CheckpointError(
                    f"{where}: damaged at {key}: {problem}; take the file as it was written, with the release of "
                    "Expertune that wrote it or a later one"
                )
        return cls(**values)

    def completed(self, asked: QuantizationConfig) -> QuantizationConfig:
        """A run file's section with what only the run's NF4 folder said, for what that folder was made of."""
        said = {"fit": self.fit, "layers": self.layers}
        further = {key: value for key, value in said.items() if value and key not in asked.model_fields_set}
        return asked.model_copy(update=further)

    def differences(self, other: "Held") -> dict[str, tuple[str, str]]:
        """What both know and differs: by key of the run file's `quantization`, or `calibration`, was and is."""
        found = {}
        for key, shown in _SHOWN.items():
            was, now = getattr(self, key), getattr(other, key)
            if was is not None and now is not None and was != now:
                found[key] = shown(was), shown(now)
        return found


def _show_layers(layers: Mapping[str, int]) -> str:
    """As a run file has it."""
    return "{" + ", ".join(f"{name}: {bits}" for name, bits in layers.items()) + "}"


_SHOWN: dict[str, Callable[[Any], str]] = {
    "scheme": str,
    "layers": _show_layers,
    "fit": str,
    "calibration": lambda digest: str(digest)[:12],
}


def _one_of(known: Collection[str]) -> Callable[[Any], str | None]:
    return lambda value: None if value in known else f"{shortened(repr(value), 60)} is none of {', '.join(known)}"


def _layers_problem(value: Any) -> str | None:
    if not isinstance(value, dict) or len(value) > _MOST_LAYERS:
        return "no mapping of linears to 16"
    wrong = next((key for key, bits in value.items() if bits != 16 or not _LAYERS.fullmatch(key)), None)
    return None if wrong is None else f"{shortened(repr(wrong), 60)} is not the name of linears that stay in 16 bits"


def _digest_problem(value: Any) -> str | None:
    return None if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else "no sha256"


# By key, what is wrong with a value that was kept; None where nothing is.
_PROBLEMS: dict[str, Callable[[Any], str | None]] = {
    "scheme": _one_of(get_args(Scheme)),
    "layers": _layers_problem,
    "fit": _one_of(FITS),
    "calibration": _digest_problem,
}


def held_by(recipe: Recipe, model: nn.Module, names: NameMap, calibration: str | None = None) -> Held:
    """Which base a recipe makes of a model, or has made.

    Args:
        recipe: how the weights are held.
        model: the model, with experts and linears swapped or not.
        names: its name map.
        calibration: sha256 of what scales were chosen by; None where that is not known, or they were chosen without.
    """
    linears = linears_to_quantize(model, names.specs)
    layers = as_layers([name for name in linears if name not in recipe.linears], linears, names)
    return Held(recipe.scheme, layers, recipe.fit, calibration if recipe.fit == CALIBRATED else None)
