"""What each result of a study was measured with: a study may be continued elsewhere, or at a later commit."""

import json
from collections import Counter
from typing import Any

_NAMES = ("device", "versions", "commit")


def origin(result: dict[str, Any]) -> dict[str, Any]:
    """Device, versions and commit of a study's last call."""
    return {name: result[name] for name in _NAMES}


def with_origins(result: dict[str, Any]) -> dict[str, Any]:
    """The same with an origin in each result; those without one are of the file's."""
    return result | {
        kind: {name: {"origin": origin(result)} | found for name, found in result[kind].items()}
        for kind in ("bits", "cells")
    }


def origins(result: dict[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """What a study's results were measured with, and how many by each; the most first."""
    whole = with_origins(result)
    found = [json.dumps(each["origin"], sort_keys=True) for kind in ("bits", "cells") for each in whole[kind].values()]
    return [(json.loads(each), count) for each, count in Counter(found).most_common()]
