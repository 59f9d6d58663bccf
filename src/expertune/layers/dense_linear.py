"""A linear left in 16 bits, on a CPU that multiplies no 16-bit floats: `expertune.kernels.dense_linear` runs.

These are what `quantization.layers` leaves in 16 bits, what a family keeps beside its decoder layers, and the output
head, where neither a loss nor an answer takes its weight by itself.
"""

from types import MethodType

import torch
from torch import Tensor, nn

from expertune.kernels import few_tokens
from expertune.kernels.cpu import gemm_dtype
from expertune.kernels.dense_linear import HALVES, dense_linear


def use_dense_linear(model: nn.Module) -> None:
    """Let the model's frozen 16-bit linears multiply there, where this CPU has no instructions for their dtype.

    Each gets a forward of its own and remains torch's class in the eyes of PEFT and of all who ask.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            dtype: torch.dtype = module.weight.dtype
            if dtype in HALVES and gemm_dtype(dtype, torch.device("cpu")) != dtype:
                module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def is_dense_linear(module: nn.Module) -> bool:
    """Whether the forward that a module has of its own is the one given here: a product and nothing else."""
    return getattr(vars(module).get("forward"), "__func__", None) is _forward


def _forward(linear: nn.Linear, x: Tensor) -> Tensor:
    """[..., in_features] -> [..., out_features]."""
    weight, bias = linear.weight, linear.bias
    elsewhere = x.device.type != "cpu" or weight.device.type != "cpu"
    is_trained = weight.requires_grad and torch.is_grad_enabled()
    if elsewhere or is_trained or x.dtype != weight.dtype or x.dtype not in HALVES:
        return nn.functional.linear(x, weight, bias)
    if few_tokens.serves_dense(x, weight):
        y = few_tokens.dense(x, weight)
    else:
        y = dense_linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias
