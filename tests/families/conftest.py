"""Which tests of every family are run by default."""

import pytest

from tests.families.test_every_family import UNREADABLE

ALONE = "test_stock_peft_gives_the_logits_of_an_adapter_on_experts_alone"
BY_DEFAULT = {"MixtralExperts", "Qwen3MoeExperts", "GptOssExperts", *UNREADABLE}
"""Families whose adapters of experts alone are read by stock PEFT in the default tests.

An adapter on all that a text can train has experts too, and is read in every other family.
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    alone = [item for item in items if isinstance(item, pytest.Function) and item.originalname == ALONE]
    for item in alone:
        if item.callspec.params["family"] not in BY_DEFAULT:
            item.add_marker(pytest.mark.slow)
