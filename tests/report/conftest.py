"""One record for the tests of pages: of a small finished run, with every section that a page shows."""

import copy
from typing import Any

import pytest

_EXAMPLE = {"prompt": "Sentence: It is fun.\nMeaning:", "expected": "inform(name[X], rating[good])"}


def _score(slot_f1: float, answered: str) -> dict[str, Any]:
    return {
        **{"metric": "slot-f1", "rows": 5, "slot_f1": slot_f1, "precision": 0.5, "recall": 0.5, "exact_match": 0.5},
        **{"seconds": 2.0, "examples": [_EXAMPLE | {"answered": answered, "right": False}]},
    }


_DATA = {
    **{"source": "rows.csv", "format": "prompt-completion", "template": "viggo", "max_length": 256, "num_rows": 40},
    **{"num_truncated": 1, "num_tokens": 4000, "num_label_tokens": 1000, "num_skipped": 1, "num_flagged": 0},
    "length": {"min": 3, "median": 100, "p95": 180, "max": 255},
    "length_histogram": {"width": 12.75, "counts": [1, 2, 3, 4] * 5},
    "columns": {"used": ["mr", "ref"], "ignored": {"id": 40}},
    "skipped": ["rows.csv line 7: the answer is empty"],
    "warnings": ["3 prompts are empty"],
}

_RECORD: dict[str, Any] = {
    "format_version": 1,
    "versions": {"python": "3.11.7", "expertune": "0.1.0", "torch": "2.13.0+cpu"},
    "config": {
        "model": "models/tiny",
        "data": {"train": "rows.csv", "max_length": 256},
        "lora": {"r": 16, "alpha": 16.0},
        "training": {"learning_rate": 0.004, "max_steps": 100},
        "output_dir": "runs/small",
    },
    "run": {
        "status": "finished",
        "started": 1.7e9,
        "seconds": 754.2,
        "phases": {"training": 600.0, "evaluation": 60.0},
    },
    "data": {"train": _DATA, "eval": _DATA | {"num_rows": 12}},
    "model": {"name": "models/tiny", "device": "cpu"},
    "plan": {
        "memory": {"peak_bytes": 2e9, "moment": "loss", "components": {"weights": 1.5e9, "adapter": 5e8, "slots": 0}},
        "parameters": {"trainable": 872448, "line": "trainable params: 872448"},
        "time": {"tokens_per_second": 1000.0},
        "run": {"seconds": 550.0},
        "notes": ["a note of the plan"],
    },
    "train": {
        **{name: [[step, 3.0 / step] for step in range(1, 101)] for name in ("loss", "grad_norm", "seconds")},
        "expert_imbalance": [[step, 1.25] for step in range(1, 101)],
        "notes": ["resuming from checkpoint-50"],
        "recoveries": [{"step": 3, "during": "training", "error": "e", "change": "smaller micro-batches"}],
        "steps": 100,
    },
    "experts": {
        "evaluations": {
            "0": {
                "tokens": 100,
                "counts": {
                    "model.layers.0.mlp.experts": [50, 50, 50, 50],
                    "model.layers.1.mlp.experts": [80, 60, 57, 3],
                },
                "entropy": {"model.layers.0.mlp.experts": 0.69, "model.layers.1.mlp.experts": 0.5},
            },
            "50": {
                "tokens": 100,
                "counts": {
                    "model.layers.0.mlp.experts": [80, 20, 50, 50],
                    "model.layers.1.mlp.experts": [80, 60, 60, 0],
                },
                "entropy": {"model.layers.0.mlp.experts": 0.6, "model.layers.1.mlp.experts": 0.4},
            },
        }
    },
    "preflight": {"passed": True, "four_bit": {"bits_per_expert_weight": 4.13, "expert_weights": 4718592}},
    "eval": {"loss": [[0, 3.2], [50, 0.25], [100, 0.4]], "before": 3.2, "after": 0.25, "scores": []},
    "adapter": {"step": 50, "checkpoint": "checkpoint-50", "metric": "loss", "value": 0.25},
    "task": {"before": _score(0.0, "[X]"), "after": _score(0.75, "inform(name[X], rating[poor])")},
    "throughput": {"tokens_per_second": 900.0, "tokens": 100000},
    "memory": {"peak_bytes": 1_600_000_000},
}


@pytest.fixture
def run_record() -> dict[str, Any]:
    """A copy, to change."""
    return copy.deepcopy(_RECORD)
