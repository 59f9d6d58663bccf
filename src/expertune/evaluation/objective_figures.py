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


_OTHERS = frozenset(
    {
        *("kl", "nll_loss", "log_odds_ratio", "log_odds_chosen", "aux_loss"),
        *("reward", "reward_std", "frac_reward_zero_std", "entropy"),
    }
)


def is_objective_figure(name: str) -> bool:
    """Whether a figure of an evaluation is one of its objective's, by TRL's name, and none of the task's."""
    return "/" in name or name in _OTHERS


def shown_objective_figures(figures: Mapping[str, Any]) -> list[Figure]:
    """Those of an evaluation's or a step's figures that people are shown beside the loss."""
    return [figure for figure in FIGURES if figure.name in figures]
