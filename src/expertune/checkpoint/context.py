"""How many tokens a model's context holds, from its config alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

_DTYPES = ("dtype", "torch_dtype")


def read_config(folder: str | Path, trust_remote_code: bool = False) -> PretrainedConfig | None:
    """A model folder's config; None where it cannot be read, which who builds the model says better.

    Without the dtype of its weights where transformers has the config's class: with it transformers imports torch, and
    none of what a config is read for here depends on it.
    """
    try:
        values, _ = PretrainedConfig.get_config_dict(folder)
        if not trust_remote_code and values.get("model_type") in CONFIG_MAPPING:
            found: PretrainedConfig = CONFIG_MAPPING[values["model_type"]].from_dict(
                _without_dtypes(values), name_or_path=folder
            )
            return found
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception:  # damaged values lead to errors of every kind
        return None


def _without_dtypes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config and of those within it."""
    return {
        key: _without_dtypes(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if key not in _DTYPES
    }


def context_length(config: PretrainedConfig | None) -> int | None:
    """Tokens that a sequence may have: `max_position_embeddings`, or what scaled rotary positions reach.

    Scaled positions reach their factor times the length that the model was trained with. Some configs name what is
    reached as `max_position_embeddings` and some what was trained with, so that the larger of the two is right.

    Args:
        config: a model's config.

    Returns:
        None where the config names no such length, as for models without positions.
    """
    if config is None:
        return None
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        return None
    reached = [longest]
    for rope in _ropes(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)):
        factor, trained = rope.get("factor"), rope.get("original_max_position_embeddings") or longest
        if isinstance(factor, int | float) and isinstance(trained, int):
            reached.append(int(factor * trained))
    return max(reached)


def _ropes(parameters: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary positions of a config: one mapping, or one for each kind of layer."""
    if isinstance(parameters, Mapping):
        yield parameters
        for inner in parameters.values():
            yield from _ropes(inner)
