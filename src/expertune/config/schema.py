"""The schema of a run file: one YAML file describes a run.

Nothing here imports torch or transformers, so that `--help` and a typing mistake answer at once.
"""

import dataclasses
import math
import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic 2.10 has it here alone

from expertune.config.messages import describe, unknown_name
from expertune.config.secrets import without_secrets
from expertune.errors import ConfigError, option
from expertune.evaluation.metrics import METRICS

# Optimizers that make the groups of parameters themselves, by parts of their names.
_OWN_GROUPS = ("galore", "apollo", "lomo")

_MAX_PATH, _MAX_PATH_PART = 4096, 255  # of Linux, and no more than elsewhere

_Answers = Literal["dolly", "alpaca", "prompt-completion", "prompt-completion-messages", "messages", "sharegpt", "text"]
_Preferences = Literal["preference", "preference-messages", "unpaired-preference", "unpaired-preference-messages"]
DataFormat = Literal["auto", _Answers, _Preferences, "prompt-only", "prompt-only-messages"]


ObjectiveName = Literal["sft", "dpo", "kto", "orpo", "grpo"]

# Given by whoever starts a command, never by a file.
TRUST_KEY = "trust_remote_code"


class Section(BaseModel):
    """A part of the run file. Unknown keys are refused: a misspelled key must never read as its default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _as_it_is_meant(cls, values: Any) -> Any:
        """A section without keys is an empty one; pydantic would read `r: yes` as 1."""
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name, value in values.items():
            annotation = cls.model_fields[name].annotation if name in cls.model_fields else Any
            if value is None and _is_mapping(annotation):
                values[name] = {}
            inside = value.values() if isinstance(value, dict) else [value]
            if not _takes_bool(annotation) and any(isinstance(each, bool) for each in inside):
                raise ValueError(f"{name}: a number or text is wanted, not true or false (yes, no, on, off)")
        return values

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise ConfigError(
                f"{type(self).__name__}: {name} cannot be set, because a config stays as it was checked; make another "
                "with expertune.load_config(config, ['section.key=value'])"
            )
        super().__setattr__(name, value)

    def __repr_args__(self) -> Iterable[tuple[str, Any]]:
        """What was set, without secrets: as short as the run file."""
        set_here: dict[str, Any] = without_secrets(self.model_dump(exclude_unset=True))
        return set_here.items()


def _is_a_path(value: str) -> str:
    """No text that no file system could hold, and no empty one, which would mean the working directory."""
    if not value.strip():
        raise ValueError("an empty name; give one, or remove the key")
    if value.startswith("~") and os.path.expanduser(value) == value:  # noqa: PTH111 - Path's own raises
        raise ValueError("there is no such user, whose home this would name")
    if len(value) > _MAX_PATH or any(len(part.encode()) > _MAX_PATH_PART for part in value.split("/")):
        raise ValueError(f"a path or name that is too long ({len(value)} characters)")
    return value


def _as_text(value: Any) -> Any:
    """A Path of a Python program as a run file would have it."""
    return str(value) if isinstance(value, PurePath) else value


PathText = Annotated[str, BeforeValidator(_as_text), AfterValidator(_is_a_path)]


def _are_sources(value: Any) -> str | list[str]:
    value = [_as_text(each) for each in value] if isinstance(value, list) else _as_text(value)
    several = value if isinstance(value, list) else [value]
    if not several or not all(isinstance(each, str) for each in several):
        raise ValueError("wanted is a path, a glob, the name of a hub dataset, or a list of these")
    for each in several:
        _is_a_path(each)
    return value


Sources = Annotated[str | list[str], BeforeValidator(_are_sources)]


def _is_a_size(value: str | int) -> str | int:
    try:
        parse_size(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return value


Size = Annotated[str | int, AfterValidator(_is_a_size)]


class DataConfig(Section):
    """Where the examples come from and how they become token sequences.

    Attributes:
        train: path, glob or hub name of the training examples, with an optional `[a:b]` slice of each file, e.g.
            `rows.jsonl[0:800]`; or a list of these.
        eval: the same for evaluation examples; None means no evaluation.
        format: layout of an example; `auto` recognizes it from the first example's columns and the run's objective.
        columns: renames before the layout is read: our column name -> the file's, e.g. `{prompt: ref, completion: mr}`.
        template: name of a template that ships with Expertune, path of a Jinja file, `chat` for the tokenizer's own
            chat template, or None for the layout's default.
        parse_special_tokens: special tokens that the examples' own text spells out (`</s>`) become special tokens. Off,
            they are text, and only the template writes special tokens.
        max_length: tokens of an example after which it is cut.
        train_on: `completion` takes the loss on the answer only, `all` on the prompt as well (padding never).
        packing: `padding-free` concatenates a micro-batch's sequences; `packed` fills sequences of `max_length` tokens
            in advance; `padded` pads every sequence on the left to `max_length`. Attention never crosses examples.
        merge_accumulation: run a step's accumulated micro-batches as one, or as few, where the plan's memory allows it
            and the step stays the same; not with `padded`.
        on_error: `stop` refuses the run at a bad example; `skip` drops bad examples and counts them.
    """

    train: Sources
    eval: Sources | None = None
    format: DataFormat = "auto"
    columns: dict[str, str] = {}
    template: PathText | None = None
    parse_special_tokens: bool = False
    max_length: int = Field(default=1024, ge=8)
    train_on: Literal["completion", "all"] = "completion"
    packing: Literal["padding-free", "packed", "padded"] = "padding-free"
    merge_accumulation: bool = True
    on_error: Literal["stop", "skip"] = "stop"


class QuantizationConfig(Section):
    """How the frozen weights are held.

    Attributes:
        scheme: `nf4`, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, section 3). `auto` is the same, but that
            experts which the checkpoint holds in MXFP4 stay as they are; `nf4` dequantizes and quantizes these again.
        double_quantization: absmax values are themselves held in 8 bits (QLoRA, section 3, "Double Quantization").
        fit: how a block's scale is chosen when 16-bit weights are quantized: `absmax` by the largest magnitude, as
            bitsandbytes does; `mse` by the least squared error, in the same layout; `calibrated` by the same, each
            input feature weighted by its mean square in a sample of the training examples.
        calibration_tokens: tokens of that sample, which `lora.init: qera` takes too.
        layers: bits of the decoder's linears, 4 or 16, by `attention`, a projection's name, or a regular expression
            over the end of a module's name on disk; the first that fits decides. Experts are always in 4 bits.
        block_size: weights that share one absmax value.
        compute_dtype: dtype of the matrix products; `auto` is bfloat16 where the device multiplies it faster.
    """

    scheme: Literal["auto", "nf4"] = "auto"
    double_quantization: bool = True
    fit: Literal["absmax", "mse", "calibrated"] = "absmax"
    calibration_tokens: int = Field(default=8192, ge=256)
    layers: dict[str, Literal[4, 16]] = {}
    block_size: Literal[64] = 64
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class KernelsConfig(Section):
    """How products of 4-bit weights run.

    Attributes:
        route: `fused` dequantizes inside the GEMM, `dequant_gemm` dequantizes first and multiplies the result;
            `auto` takes the faster by tokens per expert, against a crossover that is measured once per machine.
        working_set: most bytes that an expert layer takes between its products, whatever the batch is; `auto` is
            512MiB on a CPU and 2GiB on a GPU.
    """

    route: Literal["auto", "fused", "dequant_gemm"] = "auto"
    working_set: Literal["auto"] | Size = "auto"

    @property
    def working_set_bytes(self) -> int | None:
        """The size in bytes; None where the device decides."""
        return None if self.working_set == "auto" else parse_size(self.working_set)


class ExpertsSection(Section):
    """Experts of each layer that have an adapter, where not all have one (Wang et al. 2024, ESFT).

    Attributes:
        select: what a pass over training examples scores them by: `load`, the share of a layer's tokens that each gets;
            `gate`, that of the router's weights.
        share: the experts with the highest scores are taken, as few as have this share together.
        layers: the experts by their layer's name, the highest score first; given, no pass is made.
    """

    select: Literal["load", "gate"] = "load"
    share: float = Field(gt=0, le=1)
    layers: dict[str, list[NonNegativeInt]] = {}


class LoraSection(Section):
    """The adapter.

    Attributes:
        r: rank of every factor that `rank_pattern` does not name.
        alpha: scale; the update is multiplied by alpha / r (alpha / sqrt(r) with `use_rslora`).
        dropout: probability on the adapter's input while training; works on experts too.
        targets: the checkpoint's own projection names (`q_proj`, `w1`, `gate_proj`) and the aliases `attention`,
            `experts`, `router`, `lm_head`.
        rank_pattern: projection name (or a regular expression over module names) -> rank.
        alpha_pattern: the same for alpha.
        rslora: rank-stabilized scale (Kalajdzievski 2023); PEFT's name, `use_rslora`, is read too.
        use_dora: each output feature has a magnitude of its own beside the direction that A and B change (Liu et al.
            2024); not on routers.
        dtype: dtype of the adapter's own weights.
        loraplus_lr_ratio: learning rate of factors B over that of A, which is `training.learning_rate` (LoRA+, Hayou et
            al. 2024); None means that they have the same.
        experts: which experts of each layer have an adapter; None means all.
        expert_rank: `scaled` divides the experts' rank by the number of experts per token; `load` gives twice the rank
            to the busiest quarter of a layer's experts and half of it to the idlest half. None leaves it at `r`.
        init: first values of the factors: `default` begins as the 4-bit base; `loftq` as the best correction, of the
            adapter's rank, of what 4 bits lost of each matrix (Li et al. 2023); `qera` as the best for the layers'
            outputs, by a sample of the training examples (Zhang et al. 2024). Needs the 16-bit checkpoint.
        init_from: folder of an existing PEFT adapter to start from.
        init_from_other_base: take it though it was trained on another base model, and leave layers that it has nothing
            for as they are.
    """

    r: int = Field(default=8, ge=1)
    alpha: float = Field(default=16, gt=0)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: list[str] = Field(default=["attention", "experts"], min_length=1)
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, PositiveFloat] = {}
    rslora: bool = False
    use_dora: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    loraplus_lr_ratio: float | None = Field(default=None, ge=1)
    experts: ExpertsSection | None = None
    expert_rank: Literal["scaled", "load"] | None = None
    init: Literal["default", "loftq", "qera"] = "default"
    init_from: PathText | None = None
    init_from_other_base: bool = False

    @property
    def begins_as_base(self) -> bool:
        """Whether an adapter that has not been trained changes nothing, so that its base is where it begins."""
        return self.init_from is None and self.init == "default"

    @model_validator(mode="after")
    def _one_beginning(self) -> "LoraSection":
        if self.init_from is not None and self.init != "default":
            raise ValueError(f"init: {self.init} and init_from are two beginnings; remove one of them")
        if self.init != "default" and (self.use_dora or self.selects):
            other = (
                "use_dora scales what they give"
                if self.use_dora
                else "lora.experts or lora.expert_rank: load changes some of them"
            )
            raise ValueError(f"init: {self.init} corrects all 4-bit matrices, and {other}; remove one of the two")
        return self

    @model_validator(mode="before")
    @classmethod
    def _rslora_by_the_name_of_peft(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "use_rslora" not in values:
            return values
        if "rslora" in values:
            raise ValueError("use_rslora: rslora is the same key; remove one of them")
        return {"rslora" if key == "use_rslora" else key: value for key, value in values.items()}

    @model_validator(mode="after")
    def _dora_is_of_matrices(self) -> "LoraSection":
        if self.use_dora and "router" in self.targets:
            raise ValueError("use_dora: PEFT has no DoRA on routers; leave router out of lora.targets")
        return self

    @field_validator("targets", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _what_experts_differ_in_can_be(self) -> "LoraSection":
        if self.use_dora and self.selects:
            raise ValueError(
                "use_dora gives all experts magnitudes, and lora.experts or lora.expert_rank: load gives some of them "
                "another adapter than the rest; remove one of the two"
            )
        if self.expert_rank == "load" and self.r % 2:
            raise ValueError(f"expert_rank: load gives some experts half of lora.r, which is {self.r}; set an even one")
        return self

    @property
    def selects(self) -> bool:
        """Whether experts differ: some have no adapter, or another rank."""
        return self.experts is not None or self.expert_rank == "load"


def _is_a_coefficient(value: Any) -> Any:
    if value != "auto" and not (isinstance(value, int | float) and 0 <= value < math.inf):
        raise ValueError("wanted is auto, or a number of at least 0")
    return value


Coefficient = Annotated[Literal["auto"] | float, BeforeValidator(_is_a_coefficient)]


class RouterSection(Section):
    """Auxiliary losses of the routers, over all tokens of an optimizer step that are no padding.

    Attributes:
        aux_loss: coefficient of the load-balancing loss; `auto` is the model's own `router_aux_loss_coef` where its
            config has it trained with the loss (`output_router_logits`), and 0 otherwise.
        z_loss: coefficient of the router z-loss (ST-MoE, Zoph et al. 2022).
    """

    aux_loss: Coefficient = "auto"
    z_loss: float = Field(default=0.0, ge=0)


class TaskConfig(Section):
    """What the model is scored on by generating answers to evaluation examples, before and after training.

    Attributes:
        metric: a registered metric (`expertune.evaluation.metrics`): `slot-f1` for meaning representations such as
            ViGGO's, `exact-match` for any text; or None.
        rows: how many evaluation examples are answered; None means all of them.
        max_new_tokens: the longest answer.
        batch_size: examples answered at once.
    """

    metric: str | None = None
    rows: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)

    @field_validator("metric")
    @classmethod
    def _is_registered(cls, value: str | None, info: ValidationInfo) -> str | None:
        """A run that is opened needs its metric only to be scored; see `expertune.run.evaluation.evaluate`."""
        if value is not None and value not in METRICS and not (info.context or {}).get("opened"):
            raise unknown_name("no metric of this name is registered", METRICS)
        return value


class RewardConfig(Section):
    """A reward of `objective: grpo`; a name alone is one of weight 1.

    Attributes:
        function: a shipped one, which compares with the example's own answer: `slot-f1` or `exact-match`. Or code,
            which whoever starts the command has to allow: `module:function`, or `file.py:function`.
        weight: what its numbers are multiplied by.
    """

    function: str
    weight: float = Field(default=1.0, allow_inf_nan=False)

    @property
    def is_code(self) -> bool:
        """Whether it is imported."""
        return ":" in self.function

    @field_validator("function")
    @classmethod
    def _is_named(cls, value: str) -> str:
        where, colon, name = value.rpartition(":")
        shipped = [key for key, each in METRICS.items() if each.per_answer and each.figures[0].higher_is_better]
        if colon and not (where.strip() and name.isidentifier()):
            raise ValueError("write code as module:function, or file.py:function")
        if not colon and value not in shipped:
            raise unknown_name("no reward of this name is shipped, and code is written as module:function", shipped)
        return value


def _named_rewards(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    return [{"function": each} if isinstance(each, str) else each for each in values]


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a config was read from, with notes on it; configs of the same keys are equal wherever that was."""

    name: str = dataclasses.field(default="config", compare=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)


class DistributedConfig(Section):
    """How the experts of a run on several processes are held; one process holds all of them anyway.

    Attributes:
        experts: `replicate`: each process holds all of them. `shard`: each holds a slice of every layer's frozen bytes,
            and a layer is gathered for its use. `parallel`: they are shared out, with their adapters and optimizer
            states, and tokens travel. `auto`: the plan chooses.
        expert_parallel_size: with `parallel`, how many processes share them out; null means all. The processes are a
            multiple of it.
    """

    experts: Literal["auto", "replicate", "shard", "parallel"] = "auto"
    expert_parallel_size: int | None = Field(default=None, ge=1)


class RunConfig(Section):
    """A whole run.

    Attributes:
        model: local folder or hub id of the base model.
        revision: branch, tag or commit of a hub model; the record keeps the commit it resolved to.
        objective: what is minimized. `sft`: cross entropy of the answers. `dpo`, `orpo`: a loss over pairs of a chosen
            and a rejected answer. `kto`: one over answers that are labeled desirable or not. `grpo`: rewards of answers
            that the model writes. All but `sft` are TRL's.
        rewards: of `grpo`: what answers are rewarded with, a function or several with their weights.
        training: TrainingArguments by their own names; with another objective than `sft` TRL's arguments too.
        loss: `auto` takes the loss a chunk of tokens at a time, without the logits of all, where that is the model's
            own loss; `full` always leaves it to the model.
        placement: where frozen expert bytes lie until they are used: in the `device`'s memory, in the `host`'s
            (pinned, for a GPU), or on `disk`, mapped from an NF4 folder; `auto` decides by the plan, layer by layer.
        offload_activations: activations that forward keeps for backward lie in the host's memory.
        memory_budget: most bytes a run may plan for, e.g. `24GB`; None means what the device has.
        output_dir: the run directory.
    """

    model: PathText
    revision: str | None = None
    objective: ObjectiveName = "sft"
    rewards: Annotated[list[RewardConfig], BeforeValidator(_named_rewards)] = []
    data: DataConfig
    quantization: QuantizationConfig = QuantizationConfig()
    kernels: KernelsConfig = KernelsConfig()
    lora: LoraSection = LoraSection()
    router: RouterSection = RouterSection()
    training: dict[str, Any] = {}
    loss: Literal["auto", "full"] = "auto"
    task: TaskConfig = TaskConfig()
    placement: Literal["auto", "device", "host", "disk"] = "auto"
    offload_activations: bool = False
    distributed: DistributedConfig = DistributedConfig()
    memory_budget: Size | None = None
    output_dir: PathText
    _origin: Origin = PrivateAttr(default=Origin())

    @property
    def is_calibrated(self) -> bool:
        """Whether a sample of the training examples decides the base's bytes or the adapter's first values."""
        return self.quantization.fit == "calibrated" or self.lora.init == "qera"

    @property
    def where(self) -> str:
        """What errors name: the file that the keys were read from, or `config`."""
        return self._origin.name

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for each value that was read under an earlier name."""
        return self._origin.notes

    @model_validator(mode="before")
    @classmethod
    def _code_is_trusted_by_the_caller(cls, values: Any) -> Any:
        """`false` is what always holds; anything else would let a file that was received run code."""
        if not isinstance(values, dict) or TRUST_KEY not in values:
            return values
        if values[TRUST_KEY] is not False:
            raise ValueError(
                f"{TRUST_KEY} is no key of a run file, which may come from others; if you have read the Python that "
                "ships with the model and trust it, remove the key and give " + option("trust-remote-code")
            )
        return {key: value for key, value in values.items() if key != TRUST_KEY}

    @model_validator(mode="after")
    def _task_needs_eval_examples(self) -> "RunConfig":
        if self.task.metric and not self.data.eval:
            raise ValueError("task.metric needs data.eval: the metric is taken on evaluation examples")
        return self

    @model_validator(mode="after")
    def _objective_has_its_rewards(self) -> "RunConfig":
        if self.objective == "grpo" and not self.rewards:
            raise ValueError("objective: grpo needs rewards, e.g. rewards: [slot-f1]")
        if self.objective != "grpo" and self.rewards:
            raise ValueError(f"rewards are of objective: grpo, and it is {self.objective}; remove the key, or set grpo")
        return self

    @model_validator(mode="after")
    def _objective_fits_the_data(self) -> "RunConfig":
        if self.objective == "sft":
            return self
        named, training = f"objective: {self.objective}", self.training
        if self.router != RouterSection():
            raise ValueError(f"router: its losses are of supervised fine-tuning, not of {named}; remove the section")
        if self.data.packing == "packed":
            raise ValueError(f"data.packing: packed is of supervised fine-tuning, not of {named}; remove the key")
        if self.distributed.experts in ("shard", "parallel"):
            raise ValueError(
                f"distributed.experts: {self.distributed.experts} is of supervised fine-tuning; with {named} each "
                "process has all experts. Set replicate, or remove the key"
            )
        if self.data.train_on != "completion":
            raise ValueError(f"data.train_on: all has no meaning with {named}; remove the key")
        if self.objective != "grpo" and self.lora.dropout and training.get("disable_dropout") is not False:
            raise ValueError(
                f"lora.dropout: {self.lora.dropout} would do nothing: with {named} dropout is off, as in TRL. Set "
                "training.disable_dropout: false, or remove lora.dropout"
            )
        is_kto = self.objective == "kto" and training.get("loss_type", "kto") == "kto"
        if is_kto and training.get("per_device_train_batch_size") == 1:
            raise ValueError(
                f"training.per_device_train_batch_size: 1 is too small for {named}, whose KL term pairs prompts with "
                "the answers of other examples; set 2 or more, or training.loss_type: apo_zero_unpaired"
            )
        return self

    @model_validator(mode="after")
    def _loraplus_needs_parameter_groups(self) -> "RunConfig":
        optimizer = str(self.training.get("optim", ""))
        if self.lora.loraplus_lr_ratio is not None and any(part in optimizer for part in _OWN_GROUPS):
            raise ValueError(
                f"lora.loraplus_lr_ratio needs an optimizer with a learning rate for each group of parameters, and "
                f"training.optim {optimizer} makes its own groups; set it to adamw_torch, or remove the ratio"
            )
        return self

    @model_validator(mode="after")
    def _dora_has_whole_layers(self) -> "RunConfig":
        if self.lora.use_dora and self.distributed.experts in ("shard", "parallel"):
            raise ValueError(
                f"lora.use_dora needs the norms of all weights on each process, and distributed.experts: "
                f"{self.distributed.experts} shares the weights out; set it to replicate"
            )
        return self

    @model_validator(mode="after")
    def _selected_experts_are_not_shared_out(self) -> "RunConfig":
        if self.lora.selects and self.distributed.experts == "parallel":
            raise ValueError(
                "distributed.experts: parallel shares out adapters of all experts alike, and lora.experts or "
                "lora.expert_rank: load gives some of them others than the rest; set distributed.experts to shard or "
                "replicate"
            )
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _wrong_keys_are_one_error(
        cls, values: Any, handler: ModelWrapValidatorHandler["RunConfig"], info: ValidationInfo
    ) -> "RunConfig":
        """Also where a program makes a RunConfig itself."""
        where = (info.context or {}).get("where", "RunConfig")
        try:
            return handler(values)
        except ValidationError as error:
            raise ConfigError(describe(error, where, cls)) from None


def parse_size(value: str | int) -> int:
    """Bytes in `24GB`, `16GiB`, `512MB` or a plain number. GB is 1e9 bytes, GiB is 2**30.

    Raises:
        ConfigError: the text is not a size, or a number of bytes that can only be one of gigabytes.
    """
    text = str(value).strip().lower()
    unit = next(unit for unit in _UNITS if text.endswith(unit))
    try:
        size = int(float(text.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise ConfigError(f"{value!r:.200} is not a size; write it as 24GB, 16GiB or a number of bytes")
    if not unit and size < 10**6:
        raise ConfigError(f"{text} without a unit means bytes; write {text}GB, or whichever unit is meant")
    return size


_UNITS = {"gib": 2**30, "mib": 2**20, "kib": 2**10, "gb": 10**9, "mb": 10**6, "kb": 10**3, "b": 1, "": 1}


def _takes_bool(annotation: Any) -> bool:
    """Whether a field's type has a place for true and false."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return True  # which looks for itself
    return annotation in (bool, Any) or any(_takes_bool(part) for part in get_args(annotation))


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or (isinstance(annotation, type) and issubclass(annotation, Section))
