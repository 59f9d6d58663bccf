"""Recognise the experts of any transformers model by their contract, not by their name.

transformers 5 holds the experts of an MoE block behind one decorator, `use_experts_implementation`: the instance then
carries `has_gate`, `has_bias`, `is_transposed`, `is_concatenated` and `has_post_expert_norm`, a `gate_up_proj` (or
`up_proj`) and a `down_proj` parameter stacked over experts, and a forward of
`(hidden_states, top_k_index, top_k_weights)`. Whatever fulfils this is an experts module here.

Shape suffixes: E experts, D hidden size, F intermediate size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from expertune.errors import UnsupportedModelError

# A projection's canonical name says what it does; its name on disk (w1, gate_proj, ...) belongs to the checkpoint.
GATED_PROJECTIONS = ("gate", "up", "down")
UNGATED_PROJECTIONS = ("up", "down")

BLOCK_SIZE = 64


@dataclass(frozen=True)
class ExpertsSpec:
    """Shapes and switches of one experts module.

    Attributes:
        num_experts: E.
        hidden_size: D, width of the tokens that enter and leave.
        intermediate_size: F, width between the two products.
        has_gate: there is a gate projection, fused with up in the live module.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool = True

    @property
    def projections(self) -> tuple[str, ...]:
        """Canonical projection names, in the order of the live module's fused rows."""
        return GATED_PROJECTIONS if self.has_gate else UNGATED_PROJECTIONS

    def shape(self, projection: str) -> tuple[int, int]:
        """(out_features, in_features) of one expert's matrix of this projection."""
        if projection == "down":
            return self.hidden_size, self.intermediate_size
        return self.intermediate_size, self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Weights of all experts of the module, before packing."""
        return self.num_experts * len(self.projections) * self.hidden_size * self.intermediate_size


def is_experts(module: nn.Module) -> bool:
    """Whether the module's class went through `use_experts_implementation`."""
    return all(hasattr(module, name) for name in ("has_gate", "is_transposed", "is_concatenated", "_apply_gate"))


def find_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every experts module of a model with its dotted name, in layer order."""
    for name, module in model.named_modules():
        if is_experts(module):
            yield name, module


def read_spec(name: str, module: nn.Module) -> ExpertsSpec:
    """Shapes and switches of an experts module; works on the meta device.

    Args:
        name: dotted module name, for errors.
        module: an experts module for which `is_experts` holds.

    Raises:
        UnsupportedModelError: the module uses a part of the contract that cannot be held in 4 bits yet, or its sizes
            are no multiple of the quantization block.
    """
    for switch, means in (
        ("has_bias", "biases"),
        ("is_transposed", "transposed weights"),
        ("has_post_expert_norm", "a norm after each expert"),
    ):
        if getattr(module, switch, False):
            raise UnsupportedModelError(f"{name}: experts with {means} are not supported yet")
    if module.has_gate and not module.is_concatenated:
        raise UnsupportedModelError(f"{name}: experts with interleaved gate and up rows are not supported yet")
    try:
        first = module.get_parameter("gate_up_proj" if module.has_gate else "up_proj")
        down = module.get_parameter("down_proj")
    except AttributeError as error:
        raise UnsupportedModelError(f"{name}: experts are held otherwise than stacked ({error})") from None
    num_experts, rows, hidden_size = first.shape
    intermediate_size = rows // 2 if module.has_gate else rows
    if tuple(down.shape) != (num_experts, hidden_size, intermediate_size):
        raise UnsupportedModelError(
            f"{name}: down_proj has shape {tuple(down.shape)}, expected {(num_experts, hidden_size, intermediate_size)}"
        )
    for what, size in (("hidden size", hidden_size), ("intermediate size", intermediate_size)):
        if size % BLOCK_SIZE:
            raise UnsupportedModelError(
                f"{name}: {what} {size} is no multiple of {BLOCK_SIZE}, the number of weights that share one scale"
            )
    return ExpertsSpec(num_experts, hidden_size, intermediate_size, bool(module.has_gate))


def require_experts(model: nn.Module) -> dict[str, ExpertsSpec]:
    """Specs of all experts modules by name.

    Raises:
        UnsupportedModelError: there are none, or one cannot be packed.
    """
    specs = {name: read_spec(name, module) for name, module in find_experts(model)}
    if not specs:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no experts behind transformers' experts contract; Expertune tunes "
            "mixture-of-experts models (use plain PEFT with bitsandbytes for a dense one)"
        )
    return specs
