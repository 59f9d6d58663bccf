"""Datasets on the Hugging Face hub, through the real client."""

import re
from collections.abc import Iterator
from typing import Any

from expertune.checkpoint.hub import hub_reason
from expertune.errors import DataError

_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+){0,2}")


def is_hub_name(name: str) -> bool:
    """Whether `name` has the shape `name` or `owner/name`, then `:split` or `:config:split`."""
    return _HUB_NAME.fullmatch(name) is not None


class HubRows:
    """Place and columns of every example of a hub dataset, which `datasets` maps from its own cache.

    Args:
        name: `name`, `name:split` or `name:config:split`; the split is `train` by default.

    Raises:
        DataError: the dataset cannot be had; says how to bring a local file instead.
    """

    def __init__(self, name: str) -> None:
        from datasets import load_dataset

        self._name = name
        self._dataset_name, *rest = name.split(":")
        self._split = rest[-1] if rest else "train"
        config = rest[0] if len(rest) == 2 else None
        try:
            self._dataset = load_dataset(self._dataset_name, config, split=self._split)
        except Exception as error:  # the client lets errors of several libraries through (http, file system, its own)
            raise self._error(error) from error

    @property
    def num_bytes(self) -> int:
        """Bytes of the dataset in Arrow."""
        return int(self._dataset.data.nbytes)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        examples = enumerate(self._dataset, start=1)
        while True:
            try:
                number, example = next(examples)
            except StopIteration:
                return
            except Exception as error:  # a feature that needs a library to be decoded, such as an image
                raise self._error(error) from error
            yield f"{self._dataset_name}:{self._split}: row {number}", dict(example)

    def _error(self, error: Exception) -> DataError:
        return DataError(
            f"{self._name}: neither a local file nor a dataset that the hub gave us "
            f"({hub_reason(error)}). Without a connection, bring the examples as a file: on a "
            f"connected machine run `hf download --repo-type dataset {self._dataset_name} --local-dir rows`, copy the "
            "folder here, and set data.train or data.eval to the .jsonl, .json, .csv or .parquet file in it"
        )
