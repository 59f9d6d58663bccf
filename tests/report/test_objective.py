"""Figures of an objective over answers: on the page, the terminal, a card, in a comparison, and while training."""

import io
from typing import Any

import pytest
from rich.console import Console

from expertune.config import parse_config
from expertune.report.card import Subject, render_card
from expertune.report.compare import compare
from expertune.report.notebook import run_html
from expertune.report.objective import objective_charts
from expertune.report.page import render_page
from expertune.report.summary import render_summary
from expertune.terminal import print_scores
from expertune.train.callbacks import _scores
from tests.report.pages import require_contained


@pytest.fixture
def dpo_record(run_record: dict[str, Any]) -> dict[str, Any]:
    def evaluated(share: float) -> dict[str, float]:
        return {"rewards/accuracies": share, "rewards/margins": 4 * share - 2, "logps/chosen": -30.0, "nll": 1.0}

    run_record["config"]["objective"] = "dpo"
    run_record["data"]["train"] |= {
        "kind": "pairs",
        "num_repeated": 3,
        "pairs": {"chosen_tokens": 56.4, "rejected_tokens": 55.0, "chosen_longer": 374, "rejected_longer": 317},
    }
    run_record["train"] |= {
        name: [[step, step / 100] for step in range(1, 101)]
        for name in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/rejected")
    }
    run_record["eval"]["scores"] = [[0, evaluated(0.5)], [50, evaluated(0.875)], [100, evaluated(0.8)]]
    return run_record


def on_terminal(record: dict[str, Any], width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render_summary(record, "runs/small"))
    return out.getvalue()


def test_page_shows_reward_accuracy_and_margin_of_held_out_pairs_before_and_after(dpo_record, tmp_path):
    page = require_contained(render_page(dpo_record, "runs/small"))
    for part in (
        *("reward accuracy on evaluation examples - → 0.875", "reward margin on evaluation examples - → 1.500"),
        *("Loss of DPO", "Reward accuracy: share of pairs", "Rewards of good and of bad answers", "nll on evaluation"),
        *("longer side of a pair the chosen in 374, the rejected in 317", "repeat an earlier one 3"),
    ):
        assert part in page.text
    assert "logps/chosen on evaluation examples" not in page.text
    assert "reward accuracy on evaluation examples" in run_html(dpo_record, tmp_path)


def test_figures_of_a_run_that_starts_from_an_adapter_are_of_step_0_and_not_of_the_base(dpo_record):
    dpo_record["config"] |= {"objective": "orpo", "lora": {"init_from": "runs/first/adapter"}}
    dpo_record["eval"]["before"] = None
    text = require_contained(render_page(dpo_record, "runs/small")).text
    assert "reward accuracy on evaluation examples 0.500 at step 0 → 0.875" in text
    assert "loss on evaluation examples 3.200 at step 0 → 0.250" in text
    values = {"model": "m", "data": {"train": "t.jsonl"}, "output_dir": "o", "objective": "orpo"}
    card = render_card(Subject(dpo_record, parse_config(values), "owner/base", "abc"))
    assert "| reward accuracy on held-out examples | - | 0.8750 |" in card


@pytest.mark.parametrize("width", [60, 120])
def test_summary_shows_the_objective_and_its_figures_at_any_width(dpo_record, width):
    text = on_terminal(dpo_record, width)
    assert "direct preference optimization (DPO)" in text
    assert next(line.split()[-2:] for line in text.splitlines() if line.startswith("reward accuracy   ")) == [
        "-",
        "0.875",
    ]
    assert "0.010 at step 1, 1.000 at step 100" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize(("margin", "said"), [(0.0, True), (-0.5, False)])
def test_summary_says_that_an_accuracy_of_zero_is_one_of_ties(dpo_record, margin, said):
    dpo_record["train"] |= {"rewards/accuracies": [[1, 0.0], [2, 1.0]], "rewards/margins": [[1, margin], [2, 0.5]]}
    text = " ".join(on_terminal(dpo_record, 60).split())
    assert ("reward accuracy 0.000 at step 1 (all pairs tie), 1.000 at step 2" in text) is said


def test_card_says_what_the_adapter_was_tuned_with(dpo_record):
    dpo_record["train"]["loss"], dpo_record["task"] = [[1, 0.69]], {}
    values = {"model": "m", "data": {"train": "t.jsonl"}, "output_dir": "o", "objective": "dpo"}
    config = parse_config(values | {"training": {"beta": 0.2}})
    card = render_card(Subject(dpo_record, config, "owner/base", "abc"))
    assert "by direct preference optimization (DPO) on pairs of a chosen and a rejected answer." in card
    assert "| reward accuracy on held-out examples | - | 0.8750 |" in card
    assert "| beta | 0.2 |" in card
    assert "- dpo" in card
    supervised = render_card(Subject(dpo_record, parse_config({**values, "objective": "sft"}), "owner/base", "abc"))
    assert "objective" not in supervised


def test_comparison_has_the_figures_and_ranks_no_losses_of_different_objectives(dpo_record, run_record):
    other = {**dpo_record, "config": {**dpo_record["config"], "objective": "orpo"}, "eval": {"after": 2.0}}
    found = compare([("a", dpo_record), ("b", other)])
    columns = {column.label: column for column in found.scores}
    assert columns["reward accuracy"].shown == ["0.875", "-"]
    assert columns["evaluation loss"].best == frozenset()
    assert next(chart.title for chart in found.charts) == "Evaluation loss of DPO, ORPO"
    same = compare([("a", dpo_record), ("b", {**dpo_record, "eval": {**dpo_record["eval"], "after": 2.0}})])
    assert {column.label: column for column in same.scores}["evaluation loss"].best == {0}


def test_evaluations_while_training_show_figures_by_their_words_and_leave_the_others_to_the_record():
    logs = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.9, "eval_rewards/chosen": 1.0, "eval_slot_f1": 0.25}
    assert _scores(logs) == {"reward accuracy": 0.9, "slot_f1": 0.25}


def test_rewards_are_called_by_the_names_of_their_files(run_record):
    run_record["config"]["objective"] = "grpo"
    run_record["train"] |= {f"rewards/{name}/mean": [[1, 0.5]] for name in ("my/rewards.py:brevity", "slot-f1")}
    titles = [chart.title for chart in objective_charts(run_record)]
    assert {"Reward my/rewards.py:brevity", "Reward slot-f1"} <= set(titles)


def test_scores_on_the_terminal_have_the_objectives_figures(capsys):
    print_scores({"adapter": "adapter", "loss": 0.5, "figures": {"rewards/accuracies": 0.75}})
    assert "rewards/accuracies  0.7500" in capsys.readouterr().out


def test_damaged_evaluations_of_a_received_record_are_left_out(dpo_record):
    dpo_record["eval"]["scores"] += [[[1], {"a": 1}], ["x", {}], [3, "y"], None]
    dpo_record["config"]["objective"] = ["dpo"]
    require_contained(render_page(dpo_record, "runs/small"))
