"""What an objective is called, and its figures beside the loss, as people read them."""

from collections.abc import Mapping
from typing import Any

from expertune.evaluation.metrics import Figure

OBJECTIVES = {
    "sft": "supervised fine-tuning",
    "dpo": "direct preference optimization (DPO)",
    "kto": "Kahneman-Tversky optimization (KTO)",
    "orpo": "odds ratio preference optimization (ORPO)",
    "grpo": "group relative policy optimization (GRPO)",
}

FIGURES = (
    Figure("rewards/accuracies", "reward accuracy"),
    Figure("rewards/margins", "reward margin"),
    Figure("reward", "reward"),
)
"""By TRL's names. Of pairs: the share whose chosen answer has the higher reward, and by how much on average."""

LOSS_PARTS = (
    Figure("kl", "KL"),
    Figure("nll_loss", "cross entropy"),
    Figure("log_odds_ratio", "log odds ratio"),
    Figure("aux_loss", "load balancing"),
    Figure("router_aux_loss", "load balancing"),
    Figure("router_z_loss", "z-loss"),
)
"""What of a step's loss, or beside it, has a series of its own: by TRL's names, and by those of the router's losses."""

OF_ANSWERS = frozenset(
    {
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
        *("logps/chosen", "logps/rejected", "kl", "nll_loss", "log_odds_ratio", "log_odds_chosen", "aux_loss"),
    }
)
"""What a run over answers keeps of TRL's figures; the others are of all logits, or count tokens."""

_OF_REWARDS = frozenset({"reward", "reward_std", "frac_reward_zero_std", "kl", "entropy"})

SELECTING = {
    "dpo": ("rewards/accuracies", "rewards/margins"),
    "kto": ("rewards/margins",),
    "orpo": ("rewards/accuracies", "rewards/margins"),
    "grpo": ("reward",),
}
"""Figures of an evaluation that the best checkpoint may be chosen by; higher is better."""


def is_objective_figure(name: str) -> bool:
    """Whether a figure of an evaluation is one of its objective's, by TRL's name, and none of the task's."""
    return "/" in name or name in OF_ANSWERS | _OF_REWARDS


def shown_objective_figures(figures: Mapping[str, Any]) -> list[Figure]:
    """Those of an evaluation's or a step's figures that people are shown beside the loss."""
    return [figure for figure in FIGURES if figure.name in figures]
