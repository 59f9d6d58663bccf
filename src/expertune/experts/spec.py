"""Shapes of an experts module, and what its projections are called; a plan reads it, for which torch is not imported.

Shape suffixes: E experts, D hidden size, F intermediate size.
"""

from dataclasses import dataclass

# A projection's canonical name says what it does; its name on disk (w1, gate_proj, ...) belongs to the checkpoint.
GATED_PROJECTIONS = ("gate", "up", "down")
UNGATED_PROJECTIONS = ("up", "down")


@dataclass(frozen=True)
class ExpertsSpec:
    """Shapes and switches of one experts module.

    Attributes:
        num_experts: E.
        hidden_size: D, width of the tokens that enter and leave.
        intermediate_size: F, width between the two products.
        has_gate: there is a gate projection, fused with up in the live module.
        has_bias: every projection adds a bias.
        is_transposed: the live module multiplies x @ W: its stacks are [E, in_features, out_features].
        is_concatenated: gate's outputs come before up's in the live module; otherwise they alternate.
        has_post_expert_norm: a norm of what an expert gives, before the router's weight.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    has_post_expert_norm: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        """Canonical projection names, in the order of the live module's fused rows."""
        return GATED_PROJECTIONS if self.has_gate else UNGATED_PROJECTIONS

    @property
    def weight_names(self) -> tuple[str, str]:
        """Names of the live module's two stacks; a bias has the name of its stack and `_bias`."""
        return ("gate_up_proj" if self.has_gate else "up_proj"), "down_proj"

    def shape(self, projection: str) -> tuple[int, int]:
        """(out_features, in_features) of one expert's matrix of this projection."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    def stack_shape(self, weight: str) -> tuple[int, int, int]:
        """Shape of one of the live module's stacks (`weight_names`), as the family lays it out."""
        projections = ("down",) if weight == "down_proj" else self.projections[:-1]
        rows, columns = self.shape(projections[0])
        rows *= len(projections)
        return (self.num_experts, columns, rows) if self.is_transposed else (self.num_experts, rows, columns)

    @property
    def num_parameters(self) -> int:
        """Weights of all experts of the module, before packing."""
        return self.num_experts * len(self.projections) * self.hidden_size * self.intermediate_size
