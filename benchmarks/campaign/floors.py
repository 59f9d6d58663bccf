"""Floors on a device, from shapes and from the rates of a bare product and a bare copy that were measured on it."""

from typing import Any

from benchmarks.workload import Shape


def layer_floor(shape: Shape, tokens: int, weight_bytes: int, rates: dict[str, Any]) -> dict[str, float]:
    """Seconds of forward and backward of one expert layer: three products forward, three for the input's gradient.

    Recomputing gate and up is left out, so that it stays a lower bound; the 4-bit bytes are read in both passes.
    """
    flops = 2 * 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
    return _longer(flops, 2 * weight_bytes, rates)


def step_floor(config: dict[str, Any], shape: Shape, tokens: int, weight_bytes: int, rates: dict[str, Any]) -> Any:
    """Seconds of one optimizer step with gradient checkpointing; 4-bit bytes are read in all three passes."""
    return _longer(step_flops(config, shape, tokens), 3 * weight_bytes, rates)


def step_flops(config: dict[str, Any], shape: Shape, tokens: int) -> int:
    """`benchmarks.floor.step_flops` for any width of the attention's heads."""
    head_size = config.get("head_dim") or shape.hidden // config["num_attention_heads"]
    queries = shape.hidden * config["num_attention_heads"] * head_size
    keys = shape.hidden * config["num_key_value_heads"] * head_size
    experts = 3 * shape.top_k * shape.hidden * shape.intermediate
    layers = 3 * shape.layers * (2 * queries + 2 * keys + experts + shape.experts * shape.hidden)
    head = 2 * config["vocab_size"] * shape.hidden
    return 2 * tokens * (layers - (queries + 2 * keys) + head)


def _longer(flops: int, read_bytes: int, rates: dict[str, Any]) -> dict[str, float]:
    by_flops = flops / rates["matmul"]["flops_per_second"]
    by_bytes = read_bytes / rates["copy"]["bytes_per_second"]
    return {"flops": flops, "bytes": read_bytes, "by_flops_s": by_flops, "by_bytes_s": by_bytes}


def seconds(floor: dict[str, float]) -> float:
    """The floor itself: whichever takes longer."""
    return max(floor["by_flops_s"], floor["by_bytes_s"])
