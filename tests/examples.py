"""How many examples property tests draw."""

from typing import Any

from hypothesis import settings

THOROUGH = 25


def examples(number: int, **others: Any) -> settings:
    """Settings of a test that draws so many in `make test-slow`, and fewer in `make test`.

    Args:
        number: with the profile `thorough`; others draw in proportion to what they do without a number.
        others: further settings.
    """
    return settings(max_examples=max(1, number * settings().max_examples // THOROUGH), **others)
