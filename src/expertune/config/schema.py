"""The schema of a run file: one YAML file describes a run.

Nothing here imports torch or transformers, so that `--help` and a typing mistake answer at once.
"""

from typing import Any, Literal

from pydantic import PrivateAttr, ValidationError, ValidationInfo, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic 2.10 has it here alone

from expertune.config.data import DataConfig
from expertune.config.lora import LoraSection
from expertune.config.messages import describe
from expertune.config.objective import ObjectiveName, Rewards, RouterSection, TaskConfig
from expertune.config.origin import Origin
from expertune.config.sections import PathText, Section, Size
from expertune.config.weights import DistributedConfig, KernelsConfig, QuantizationConfig
from expertune.errors import ConfigError, option

# Optimizers that make the groups of parameters themselves, by parts of their names.
_OWN_GROUPS = ("galore", "apollo", "lomo")

# Given by whoever starts a command, never by a file.
TRUST_KEY = "trust_remote_code"


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
    rewards: Rewards = []
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
    def origin(self) -> Origin:
        """Where the keys were read from, which errors name."""
        return self._origin

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
        functions = [reward.function for reward in self.rewards]
        if twice := next((name for name in functions if functions.count(name) > 1), None):
            raise ValueError(f"rewards: {twice} is given twice; give it once, with the weight that it has in all")
        if self.rewards and not any(reward.weight for reward in self.rewards):
            raise ValueError("rewards: each has weight: 0, from which nothing is learned; give one a weight")
        return self

    @model_validator(mode="after")
    def _objective_fits_the_data(self) -> "RunConfig":
        if self.objective == "sft":
            return self
        named, training = f"objective: {self.objective}", self.training
        if self.router != RouterSection():
            raise ValueError(f"router: its losses are of supervised fine-tuning, not of {named}; remove the section")
        if self.objective == "grpo" and self.loss == "full":
            raise ValueError("loss: full is of the other objectives, and TRL takes the loss of grpo; remove the key")
        if self.data.packing == "packed":
            raise ValueError(f"data.packing: packed is of supervised fine-tuning, not of {named}; remove the key")
        if self.distributed.experts in ("shard", "parallel"):
            raise ValueError(
                f"distributed.experts: {self.distributed.experts} is of supervised fine-tuning, and with {named} each "
                "process has all experts; remove the key"
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
    def _experts_can_be_held_so(self) -> "RunConfig":
        if problem := self.lora.why_not_held(self.distributed.experts):
            raise ValueError(problem)
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _wrong_keys_are_one_error(
        cls, values: Any, handler: ModelWrapValidatorHandler["RunConfig"], info: ValidationInfo
    ) -> "RunConfig":
        """Also where a program makes a RunConfig itself."""
        origin = (info.context or {}).get("origin", Origin("RunConfig"))
        try:
            return handler(values)
        except ValidationError as error:
            raise ConfigError(describe(error, origin, cls)) from None
