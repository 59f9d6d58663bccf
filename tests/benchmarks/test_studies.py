"""What the studies of quality and of preferences say of their figures."""

from typing import Any

import pytest
from benchmarks.preference_step import require_same_loss
from benchmarks.quality_study.origin import with_origins
from benchmarks.quality_study.page import TASKS, study_tables
from benchmarks.quality_study.variants import DEFAULT, Variant

CELL = {"score": 0.5, "loss": 1.0, "loss_at_start": None, "other_text_loss": 3.0}
CELL |= {"trained_parameters": 1000, "seconds_per_step": 2.0}
VERSIONS = {"torch": "2", "transformers": "5", "peft": "0.21"}


def study(**changes: Any) -> dict[str, Any]:
    cells = {f"muon | {task} | 1": CELL for task in TASKS}
    return {"bits": {}, "cells": cells, "device": "A", "versions": VERSIONS, "commit": "1", "workers": 2, "seconds": 60,
            "date": "2026-01-01"} | changes  # fmt: skip


def tables(result: dict[str, Any]) -> str:
    return "\n".join(study_tables(result, [Variant(DEFAULT), Variant("muon", seeds=1)]))


def test_variants_without_the_default_have_tables_without_differences_to_it() -> None:
    assert "| muon | 1,000 | 1 | 0.500 | 0.500 | 0.500 |  |" in tables(study())


def test_page_says_where_results_were_measured_if_not_all_in_one_place() -> None:
    assert "- 1 results:" not in tables(study())
    continued = with_origins(study()) | {"device": "B", "commit": "2"}
    continued["cells"]["muon | act | 1"] = CELL  # the last call's
    assert "- 2 results: A; torch 2, transformers 5, peft 0.21; commit 1" in tables(continued)
    assert "- 1 results: B; torch 2, transformers 5, peft 0.21; commit 2" in tables(continued)


@pytest.mark.parametrize("loss", [0.5002, float("nan")])
def test_steps_of_different_losses_are_an_error_whichever_step_it_is(loss: float) -> None:
    require_same_loss([0.5, 0.50005], 3)
    with pytest.raises(SystemExit, match="losses of step 9 differ"):
        require_same_loss([0.5, loss], 9)
