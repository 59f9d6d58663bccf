"""How much the preflight check and the first factors of an adapter compute: what a plan counts of this room."""

from collections.abc import Mapping

from expertune.experts.spec import ExpertsSpec

# Tokens of the check's batch for each expert of a layer, and at least and at most. A few large experts are all reached
# soon, and with more tokens a check of theirs would cost more than a training step.
_TOKENS_FOR_AN_EXPERT = 16
_LEAST_TOKENS, MOST_PREFLIGHT_TOKENS = 128, 512

# Where experts are offloaded, each of them computes so many of its tokens in every forward of a check, or all where
# they are fewer: about a fifth of the tokens, which reach the experts that all would.
ENOUGH_TOKENS = 4

# Of a matrix whose smaller side is at most this, all singular values are computed; of a larger one the largest, by
# iterating on a subspace with so many columns more than are wanted (Halko et al. 2011).
EXACT_SIDE = 512
EXTRA_COLUMNS = 16


def preflight_tokens(specs: Mapping[str, ExpertsSpec]) -> int:
    """Tokens of the preflight check's batch for a model with these experts."""
    num_experts = max(spec.num_experts for spec in specs.values())
    return min(max(_TOKENS_FOR_AN_EXPERT * num_experts, _LEAST_TOKENS), MOST_PREFLIGHT_TOKENS)
