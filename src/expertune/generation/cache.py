"""What a model caches of a token while it writes an answer."""

import copy
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache


def cached_numbers(model: nn.Module, experts: Iterable[str]) -> int | None:
    """How many numbers a token leaves in the cache, in all layers together; None where the model cannot be asked.

    Two tokens pass through a copy of the model on the meta device, whose experts return what they are given. So latents
    count where a family caches these, and layers that hold a state in place of keys count nothing.

    Args:
        model: the model; only its shapes are used.
        experts: dotted names of its experts modules.
    """
    tried: Any = copy.deepcopy(model).to("meta").eval()
    for name in experts:
        tried.get_submodule(name).forward = lambda hidden_states, *_args, **_kwargs: hidden_states
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        cache = DynamicCache(config=tried.config.get_text_config())
        with torch.no_grad():
            tried(input_ids=tokens, use_cache=True, **{cache_argument(tried): cache})
    except Exception:  # whatever a family's own code does not do without values
        return None
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.numel() for tensor in held if isinstance(tensor, Tensor)) // tokens.numel() or None


def cache_argument(model: nn.Module) -> str:
    """What a model's forward calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
