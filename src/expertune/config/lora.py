"""The section `lora`: the adapter, and what of it cannot go together."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from expertune.config.sections import PathText, Section

# The highest is far above any use, and far below what makes gradients infinite.
Alpha = Annotated[float, Field(gt=0, le=1e6)]

# What of a section keeps experts from being shared out: its property, the values of `distributed.experts`, the reason.
_NOT_SHARED_OUT = (
    (
        "use_dora",
        ("shard", "parallel"),
        "lora.use_dora needs the norms of all weights on each process, and distributed.experts: {} shares the weights "
        "out; set it to replicate",
    ),
    (
        "selects",
        ("parallel",),
        "distributed.experts: {} shares out adapters of all experts alike, and lora.experts or lora.expert_rank: load "
        "gives some of them others than the rest; set distributed.experts to shard or replicate",
    ),
)


def alpha_of_twice_the_rank(alpha: float, rslora: bool) -> float:
    """The alpha with which an adapter of twice the rank has the same scale."""
    return alpha * (math.sqrt(2) if rslora else 2)


class ExpertsSection(Section):
    """Experts of each layer that have an adapter, where not all have one (Wang et al. 2024, ESFT).

    Attributes:
        select: what a pass over training examples scores them by: `load`, the share of a layer's tokens that each gets;
            `gate`, that of the router's weights.
        share: the experts with the highest scores are taken, as few as have this share together; needed
            without `layers`.
        layers: the experts by their layer's name, the highest score first; given, no pass is made.
    """

    select: Literal["load", "gate"] = "load"
    share: float | None = Field(default=None, gt=0, le=1)
    layers: dict[str, list[NonNegativeInt]] = {}

    @model_validator(mode="after")
    def _names_experts_or_how_to_find_them(self) -> "ExpertsSection":
        if self.share is None and not self.layers:
            raise ValueError(
                "set share, the part of the load that the experts with an adapter have, or name them in layers"
            )
        return self


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
            outputs, by a sample of the training examples (Zhang et al. 2024); these two need the 16-bit checkpoint.
            `pissa` trains from the principal components of each matrix (Meng et al. 2024), which are taken away from
            what the adapter gives, so that it begins as the 4-bit base too.
        init_from: folder of an existing PEFT adapter to start from.
        init_from_other_base: take it though it was trained on another base model, and leave layers that it has nothing
            for as they are.
    """

    r: int = Field(default=8, ge=1)
    alpha: Alpha = 16
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    targets: list[str] = Field(default=["attention", "experts"], min_length=1)
    rank_pattern: dict[str, PositiveInt] = {}
    alpha_pattern: dict[str, Alpha] = {}
    rslora: bool = False
    use_dora: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    loraplus_lr_ratio: float | None = Field(default=None, ge=1, le=1e6)
    experts: ExpertsSection | None = None
    expert_rank: Literal["scaled", "load"] | None = None
    init: Literal["default", "loftq", "qera", "pissa"] = "default"
    init_from: PathText | None = None
    init_from_other_base: bool = False

    @property
    def begins_as_base(self) -> bool:
        """Whether an adapter that has not been trained changes nothing, so that its base is where it begins."""
        return self.init_from is None and not self.corrects

    @property
    def corrects(self) -> bool:
        """Whether the adapter begins as a correction of what 4 bits lost, and is right on the 4-bit base alone."""
        return self.init in ("loftq", "qera")

    @property
    def in_files(self) -> "LoraSection":
        """The section of what an adapter's files hold: of `init: pissa` an ordinary adapter of twice the rank."""
        if self.init != "pissa":
            return self
        alphas = {name: alpha_of_twice_the_rank(alpha, self.rslora) for name, alpha in self.alpha_pattern.items()}
        return self.model_copy(
            update={
                "init": "default",
                "r": 2 * self.r,
                "alpha": alpha_of_twice_the_rank(self.alpha, self.rslora),
                "rank_pattern": {name: 2 * rank for name, rank in self.rank_pattern.items()},
                "alpha_pattern": alphas,
            }
        )

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
            begins = "corrects all 4-bit matrices" if self.corrects else "begins with components of all 4-bit matrices"
            raise ValueError(f"init: {self.init} {begins}, and {other}; remove one of the two")
        if self.init == "pissa" and self.expert_rank:
            raise ValueError(
                "init: pissa gives what it has learned as an adapter of twice the rank, which expert_rank would round "
                "otherwise; give the experts their rank in rank_pattern"
            )
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

    def why_not_held(self, mode: str) -> str | None:
        """Why processes cannot hold the experts in this way (`distributed.experts`) with such an adapter, or None."""
        reasons = (reason for key, modes, reason in _NOT_SHARED_OUT if mode in modes and getattr(self, key))
        return next((reason.format(mode) for reason in reasons), None)
