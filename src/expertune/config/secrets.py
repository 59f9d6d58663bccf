"""Secrets that a run file may hold: they go to whom they are for, and into no file."""

import re
from typing import Any

_SECRET = re.compile(r"(?i)(^|[_-])(tokens?|keys?|secrets?|passwords?|passwd|credentials?)$|apikey$")


def is_secret(key: str, value: Any) -> bool:
    """Whether a key under `training:` holds a secret by its name: `hub_token`, `api_key`, `password` and the like."""
    return isinstance(value, str) and _SECRET.search(key) is not None


def without_secrets(values: Any) -> Any:
    """Values without their secrets, whatever depth these are at; the keys are left out with them."""
    if isinstance(values, dict):
        return {key: without_secrets(value) for key, value in values.items() if not is_secret(str(key), value)}
    if isinstance(values, list):
        return [without_secrets(value) for value in values]
    return values
