"""The loop that each stack runs: generate on request, say how long it took. Imports the standard library alone."""

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any

# Special tokens, which a model may treat otherwise, come first.
_FIRST_ID, _IDS = 300, 30_000


def serve(
    generate: Callable[[list[list[int]], int], Any],
    others: dict[str, Callable[[], dict[str, Any]]],
    answers: Any,
    **ready: Any,
) -> None:
    """Answer JSON lines on stdin until it is closed.

    Args:
        generate: given prompts and a number of new tokens.
        others: what else can be asked for.
        answers: where answers go; see `own_stdout`.
        **ready: said first.
    """
    _say(answers, **ready)
    for line in sys.stdin:
        action = json.loads(line)["do"]
        if action in others:
            _say(answers, **others[action]())
            continue
        sequences, length, new = map(int, action.removeprefix("generate ").split())
        asked = prompts(sequences, length)
        started = time.perf_counter()
        generate(asked, new)
        _say(answers, seconds=time.perf_counter() - started)


def own_stdout() -> Any:
    """Where answers go: libraries print as they like."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def prompts(sequences: int, length: int) -> list[list[int]]:
    """Token ids at random, the same for all stacks."""
    draw = random.Random(sequences * 100_003 + length)
    return [[_FIRST_ID + draw.randrange(_IDS) for _ in range(length)] for _ in range(sequences)]


def _say(answers: Any, **values: Any) -> None:
    answers.write(json.dumps(values) + "\n")
    answers.flush()
