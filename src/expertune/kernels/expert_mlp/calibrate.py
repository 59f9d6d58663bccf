"""How long an expert layer takes on this device, by route: what the crossover between routes is measured from."""

import statistics
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from expertune.kernels.amounts import NESTED_BLOCK_SIZE
from expertune.kernels.expert_mlp.operator import Route
from expertune.kernels.expert_mlp.plan import Activation, Chunk, FrozenLayer, Gradients
from expertune.kernels.nf4 import BLOCK_SIZE, Nf4Bytes

# Experts, hidden and intermediate size: on a GPU wide enough that tiles fill it, and 0.2 GB; on a CPU enough not to fit
# a core's own cache when dequantized.
_SHAPES = {"cuda": (8, 4096, 4096), "cpu": (2, 1024, 2048)}


def random_bytes(num_matrices: int, rows: int, columns: int, device: torch.device, scale: float = 0.02) -> Nf4Bytes:
    """Double-quantized NF4 matrices of random codes, whose blocks' scales lie around `scale`; made on the device."""
    generator = torch.Generator(device=device).manual_seed(0)
    blocks = rows * columns // BLOCK_SIZE
    nested = -(-blocks // NESTED_BLOCK_SIZE)

    def codes(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, device=device, generator=generator)

    return Nf4Bytes(
        codes(num_matrices, rows, columns // 2),
        codes(num_matrices, blocks),
        torch.full((num_matrices, nested), scale / 4, device=device),
        torch.full((num_matrices,), scale, device=device),
    )


@cache
def _layer(device: torch.device) -> FrozenLayer:
    experts, hidden_size, size = _SHAPES[device.type]
    gate_up = random_bytes(2 * experts, size, hidden_size, device)
    down = random_bytes(experts, hidden_size, size, device)
    return FrozenLayer(gate_up, down, Activation(_swiglu, columnwise=True, swiglu=True))


def release(device: torch.device) -> None:
    """Give back what measuring has held on a device."""
    _layer.cache_clear()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def layer_pass(route: Route, tokens_per_expert: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Forward and backward of a layer without adapters, every expert with as many tokens."""
    layer = _layer(device)._replace(dtype=dtype)
    tokens = tokens_per_expert * layer.num_experts // 2
    # Of its own draws: whether this is measured must not decide what the program draws next.
    generator = torch.Generator(device=device).manual_seed(0)
    hidden = torch.randn(tokens, layer.hidden_size, dtype=dtype, device=device, generator=generator)
    index = torch.stack([torch.arange(tokens, device=device) % layer.num_experts for _ in range(2)], dim=1)
    index[:, 1] = (index[:, 1] + 1) % layer.num_experts
    weights = torch.full((tokens, 2), 0.5, device=device)
    chunk, out = Chunk(hidden, index, weights), torch.empty_like(hidden)
    gradients = Gradients(torch.empty_like(hidden), torch.empty_like(weights), [], [])

    def run() -> None:
        route.forward(chunk, layer, [], [], out)
        route.backward(hidden, chunk, layer, [], [], gradients)

    return run


def layer_seconds(route: Route, tokens_per_expert: int, dtype: torch.dtype, device: torch.device) -> float:
    """Median seconds of `layer_pass` on a GPU."""
    run = layer_pass(route, tokens_per_expert, dtype, device)
    seconds = []
    for round_ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        if round_ > 1:
            seconds.append(start.elapsed_time(end) / 1000)
    return statistics.median(seconds)


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
