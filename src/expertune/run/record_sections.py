"""What the sections of a run's record must look like for what is read from them later.

A record that comes with a received run, or that was edited by hand, may hold anything. Only keys that are read are
named here; a section may hold others, and may be missing where a run stopped before it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from expertune.config.messages import what_is_wrong
from expertune.config.yaml_file import shortened
from expertune.errors import CheckpointError

_Count = Annotated[int, Field(ge=0)]
_AtLeastOne = Annotated[int, Field(ge=1)]
_Figure = float | str | None  # text where it is not finite


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Run(_Section):
    status: str = ""
    started: float = 0
    seconds: Annotated[float, Field(ge=0)] = 0
    phases: dict[str, float] = {}
    error: str = ""


class _Kept(_Section):
    sha256: str


# By file; earlier records have the weights' alone.
_Digests = dict[Literal["adapter_config.json", "adapter_model.safetensors", "adapter_live.tensors"], str] | str


class _Init(_Section):
    sha256: _Digests


class _Model(_Section):
    revision: str | None = None
    calibration: _Kept | None = None


class _Rows(_Section):
    format: str
    template: str | None
    sha256: dict[str, str] = {}


class _Data(_Section):
    train: _Rows | None = None
    eval: _Rows | None = None


class _Inputs(_Section):
    rows: dict[str, str] = {}
    init_from: _Digests | None = None


class _Kernels(_Section):
    crossover: _Count = 0
    gemm: Literal["torch", "triton"] = "torch"


class _Placement(_Section):
    places: dict[str, Literal["device", "host", "disk"]] = {}


class _Setting(_Section):
    micro_batch_tokens: _AtLeastOne = 1
    evaluation_tokens: _AtLeastOne = 1
    preflight_tokens: _AtLeastOne = 1
    proof_tokens: _AtLeastOne = 1  # as earlier releases called it
    generation_rows: _AtLeastOne = 1
    kept_layers: _Count = 0
    working_set_bytes: _AtLeastOne = 1


class _Recovery(_Section):
    model_config = ConfigDict(extra="forbid")

    step: _Count
    during: str
    error: str
    change: str
    setting: _Setting = _Setting()


class _MicroBatch(_Section):
    merged: _AtLeastOne = 1


class _Selection(_Section):
    select: Literal["load", "gate"]
    share: Annotated[float, Field(gt=0, le=1)]
    layers: dict[str, list[_Count]]
    experts: dict[str, _AtLeastOne]
    load: dict[str, float]


class _Adapter(_Section):
    sha256: _Digests | None = None
    selection: _Selection | None = None
    init: _Init | None = None
    components: _Kept | None = None


class _Train(_Section):
    steps: _Count = 0
    micro_batch: _MicroBatch = _MicroBatch()
    kept_layers: _Count = 0
    kept_layers_fewest: _Count | None = None
    recoveries: list[_Recovery] = []
    processes: _AtLeastOne = 1
    global_batch: _AtLeastOne = 1
    experts: Literal["replicate", "shard", "parallel"] = "replicate"
    processes_sharing_experts: _AtLeastOne = 1


class _Score(_Section):
    __pydantic_extra__: dict[str, _Figure] = Field(init=False)  # the figures of whichever metric it is

    metric: str = ""
    rows: _Count = 0
    seconds: float = 0
    examples: list[Any] = []


class _Task(_Section):
    before: _Score = _Score()


class _Eval(_Section):
    before: _Figure = None


class _TaskFigure(_Section):
    value: _Figure = None
    stderr: _Figure = None


class _TaskScore(_Section):
    figures: dict[str, _TaskFigure] = {}
    examples: _Count | None = None


class _Tasks(_Section):
    __pydantic_extra__: dict[str, dict[str, _TaskScore]] = Field(init=False)  # by task, and by adapter


# All others are mappings too: a resumed run merges its values into them.
_READ: dict[str, type[_Section]] = {
    "run": _Run,
    "model": _Model,
    "data": _Data,
    "inputs": _Inputs,
    "kernels": _Kernels,
    "placement": _Placement,
    "adapter": _Adapter,
    "train": _Train,
    "task": _Task,
    "eval": _Eval,
    "tasks": _Tasks,
}
_PLAIN = ("config", "versions", "plan", "preflight", "throughput", "memory", "experts")
_Record = create_model(  # type: ignore[call-overload]
    "_Record",
    __base__=_Section,
    **{name: (kind, None) for name, kind in _READ.items()},
    **dict.fromkeys(_PLAIN, (dict[str, Any], None)),
)


def require_sections(path: Path, values: dict[str, Any]) -> None:
    """Check a record's sections against what is read from them.

    Args:
        path: the record, for messages.
        values: its content.

    Raises:
        CheckpointError: a section, or a value of it, is of another type or out of range; names the file and the key.
    """
    try:
        _Record.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        key = shortened(".".join(str(part) for part in problem["loc"]))
        found = "" if problem["type"] == "missing" else f", got {shortened(repr(problem['input']))}"
        raise CheckpointError(
            f"{path}: damaged at {key}: {what_is_wrong(problem)}{found}; take the record as the run wrote it"
        ) from None
