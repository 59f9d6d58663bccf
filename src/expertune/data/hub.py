"""Datasets on the Hugging Face hub, through the real client."""

import re
from collections.abc import Iterator
from typing import Any

from expertune.errors import DataError, first_line

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+){0,2}")


def is_hub_name(name: str) -> bool:
    """Whether `name` has the shape `name` or `owner/name`, then `:split` or `:config:split`."""
    return _HUB_NAME.fullmatch(name) is not None


def read_hub(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and columns of every example of a hub dataset.

    Args:
        name: `name`, `name:split` or `name:config:split`; the split is `train` by default.

    Raises:
        DataError: the dataset cannot be had; says how to bring a local file instead.
    """
    from datasets import load_dataset

    dataset_name, *rest = name.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        examples = [dict(example) for example in load_dataset(dataset_name, config, split=split)]
    except Exception as error:  # the client lets errors of several libraries through (http, file system, its own)
        raise DataError(
            f"{name}: neither a local file nor a dataset that the hub gave us "
            f"({type(error).__name__}: {first_line(error)}). Without a connection, bring the examples as a file: on a "
            f"connected machine run `hf download --repo-type dataset {dataset_name} --local-dir rows`, copy the "
            "folder here, and set data.train or data.eval to the .jsonl, .json, .csv or .parquet file in it"
        ) from error
    for number, example in enumerate(examples, start=1):
        yield f"{dataset_name}:{split}: row {number}", example
