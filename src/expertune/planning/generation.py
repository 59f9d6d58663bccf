"""What answering rows holds: the cache of keys and values, and the attention that reads the prompts.

Shape suffixes: S tokens of a prompt.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from expertune.planning.inventory import Attention, Inventory
from expertune.planning.settings import Settings

_FLOAT32_BYTES = 4


def cached_numbers(model: nn.Module, experts: Iterable[str], attention: Attention, num_layers: int) -> int:
    """How many numbers a token leaves in the cache, in all layers together.

    The model itself says it: two tokens pass through a copy on the meta device, whose experts return what they are
    given. So latents count where a family caches these, and layers that hold a state in place of keys count nothing.
    Where a family cannot run like this, it is keys and values of every layer.

    Args:
        model: a causal language model on the meta device.
        experts: names of its experts modules.
        attention: its widths.
        num_layers: its decoder layers.
    """
    tried: Any = copy.deepcopy(model).to("meta").eval()
    for name in experts:
        tried.get_submodule(name).forward = _as_given
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        cache = DynamicCache(config=tried.config.get_text_config())
        with torch.no_grad():
            tried(input_ids=tokens, past_key_values=cache, use_cache=True)
        held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
        numbers = sum(tensor.numel() for tensor in held if isinstance(tensor, Tensor)) // tokens.numel()
    except Exception:  # whatever a family's own code does not do without values
        numbers = 0
    return numbers or num_layers * (attention.key + attention.value)


def cache_bytes(inventory: Inventory, rows: int, length: int, itemsize: int) -> int:
    """Keys and values of all layers. A layer with a window holds a view of the whole prompt's at first."""
    return rows * length * inventory.cached_numbers * itemsize


def prefill_bytes(inventory: Inventory, settings: Settings) -> int:
    """What attention adds while it reads prompts [rows, S] of different length, padded on the left.

    A mask of a byte, and as numbers in the compute dtype; queries, keys, values and what attention gives; keys and
    values once more where query heads share them. Where values are narrower than keys, on a CPU, the scores of all
    rows and their softmax in float32.
    """
    attention, itemsize = inventory.attention, settings.compute_dtype.itemsize
    pairs = settings.tokens * settings.row_length
    states = attention.query + attention.key + attention.value + attention.output
    shared = attention.query + attention.output if attention.key < attention.query else 0
    scores = 2 * _FLOAT32_BYTES * attention.heads * pairs if attention.uneven and settings.device == "cpu" else 0
    return pairs * (1 + itemsize) + settings.tokens * (states + shared) * itemsize + scores


def _as_given(hidden_states: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
    return hidden_states
