"""What a run minimizes and is scored on: `objective`, `rewards` and the sections `router` and `task`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from expertune.config.messages import unknown_name
from expertune.config.sections import Section
from expertune.evaluation.metrics import METRICS

# Far above any use, and far below what makes gradients infinite.
_LARGEST_COEFFICIENT = 1000

ObjectiveName = Literal["sft", "dpo", "kto", "orpo", "grpo"]


def _is_a_coefficient(value: Any) -> Any:
    if value != "auto" and not (isinstance(value, int | float) and 0 <= value <= _LARGEST_COEFFICIENT):
        raise ValueError(f"wanted is auto, or a number of at least 0 and at most {_LARGEST_COEFFICIENT:,}")
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
    z_loss: float = Field(default=0.0, ge=0, le=_LARGEST_COEFFICIENT)


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


Rewards = Annotated[list[RewardConfig], BeforeValidator(_named_rewards)]


class TaskConfig(Section):
    """What the model is scored on by generating answers to evaluation examples, before and after training.

    Attributes:
        metric: a registered metric (`expertune.evaluation.metrics`): `slot-f1` for meaning representations such as
            ViGGO's, `exact-match` for any text; or None.
        rows: how many evaluation examples are answered; None means all of them.
        max_new_tokens: the longest answer.
        batch_size: examples answered at once.
        before: score the base model too, before training; it answers as many examples as the adapter does afterwards.
    """

    metric: str | None = None
    rows: int | None = Field(default=None, ge=1)
    max_new_tokens: int = Field(default=128, ge=1)
    batch_size: int = Field(default=32, ge=1)
    before: bool = True

    @field_validator("metric")
    @classmethod
    def _is_registered(cls, value: str | None, info: ValidationInfo) -> str | None:
        """A run that is opened needs its metric only to be scored; see `expertune.run.evaluation.evaluate`."""
        if value is not None and value not in METRICS and not (info.context or {}).get("opened"):
            raise unknown_name("no metric of this name is registered", METRICS)
        return value
