"""Rewards: shipped ones by name, code only where it is allowed, and one clear error for what is no reward."""

import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from expertune.config import RewardConfig, RunConfig
from expertune.data.examples import TokenizedExample
from expertune.errors import ConfigError, RewardError
from expertune.objectives.rewards import Answers, Reward, Rewards, load_rewards, require_answers

RUN = {"model": "owner/tiny", "objective": "grpo", "data": {"train": "rows.jsonl"}, "output_dir": "runs/first"}
ANSWERS = Answers(
    prompts=["one", "two", "two"],
    completions=["inform(a[1])", "inform(a[2])", "no"],
    completion_ids=[[1], [2], [3]],
    columns=[{"answer": "inform(a[1])"}, {"answer": "inform(a[1])"}, {"answer": "no"}],
    places=["rows.jsonl: row 1", "rows.jsonl: row 2", "rows.jsonl: row 2"],
)


def loaded(*names: Any, trusted: bool = False) -> list[Reward]:
    return load_rewards(RunConfig(**RUN, rewards=list(names)).rewards, trusted)


def test_shipped_rewards_compare_with_the_examples_answer() -> None:
    slot_f1, exact = loaded("slot-f1", {"function": "exact-match", "weight": 0.5})
    assert slot_f1.of(ANSWERS) == [1.0, 0.5, 0.0]
    assert exact.of(ANSWERS) == [1.0, 0.0, 1.0]
    assert Rewards([slot_f1, exact]).weights == [1.0, 0.5]


def test_code_runs_only_where_the_command_allows_it(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    file = tmp_path / "mine.py"
    file.write_text(
        f"with open({str(ran)!r}, 'a') as ran:\n    ran.write('once')\n"
        "class Own: pass\n"
        "def short(completions, **_):\n    return [-len(c) for c in completions]\n"
        "def own(completions, **_):\n    return [Own() for _ in completions]\n"
    )
    name = f"{file}:short"
    with pytest.raises(ConfigError, match=rf"{re.escape(name)} is Python that the run file names.*--trust-rewards"):
        loaded(name)
    assert not ran.exists()
    short, own = loaded(name, f"{file}:own", trusted=True)
    assert short.of(ANSWERS) == [-12.0, -12.0, -2.0]
    assert ran.read_text() == "once"
    assert type(pickle.loads(pickle.dumps(own.function([""])[0]))).__name__ == "Own"
    with pytest.raises(ConfigError, match=r"mine.py has no function shrt; did you mean short\?"):
        loaded(f"{file}:shrt", trusted=True)
    with pytest.raises(ConfigError, match=r"mine.py has no function sour; known: Own, own, short$"):
        loaded(f"{file}:sour", trusted=True)
    with pytest.raises(ConfigError, match=r"no_such_module:f cannot be imported: ModuleNotFoundError"):
        loaded("no_such_module:f", trusted=True)


def shorter_than_two(completions: list[str], **_: Any) -> list[float]:
    return [1 / (len(each) - 2) for each in completions]


def without_columns(completions: list[str]) -> list[float]:
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (shorter_than_two, "raised ZeroDivisionError for the answer 'no' to rows.jsonl: row 2: division by zero"),
        (without_columns, r"raised TypeError for the answer .* to rows.jsonl: row 1: .*; give it \*\*columns"),
        (lambda **_: [1.0, float("nan"), 0.0], "gave nan for an answer to rows.jsonl: row 2; it must be a finite"),
        (lambda **_: [1.0, "good", 0.0], "gave 'good' for an answer to rows.jsonl: row 2"),
        (lambda **_: [1.0], r"returned 1 numbers for 3 answers .*row 1\); it must return one for each"),
        (lambda **_: 1.0, "returned float; it must return a list"),
    ],
    ids=["raises", "takes no columns", "nan", "text", "too few", "one number"],
)
def test_what_is_no_reward_names_the_function_and_the_row(function: Any, message: str) -> None:
    with pytest.raises(RewardError, match=f"^rewards: mine {message}"):
        Reward("mine", 1.0, function).of(ANSWERS)


def test_answer_that_raises_is_found_in_few_calls() -> None:
    sizes = []

    def mine(completions: list[str], **_: Any) -> list[float]:
        sizes.append(len(completions))
        return [1 / (len(each) - 2) for each in completions]

    answers = ["long"] * 63 + ["no"]
    rows = [f"row {row}" for row in range(64)]
    with pytest.raises(RewardError, match="for the answer 'no' to row 63: division by zero"):
        Reward("mine", 1.0, mine).of(Answers(rows, answers, [[1]] * 64, [{}] * 64, rows))
    assert len(sizes) <= 1 + 2 * 6


def test_no_opinion_is_none_and_numbers_of_libraries_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    assert Reward("mine", 1.0, lambda **_: [None, numpy.float32(0.5), True]).of(ANSWERS) == [None, 0.5, 1.0]


def test_rewards_alike_for_long_are_told_once() -> None:
    told: list[str] = []
    rewards = Rewards([], told.append)
    for share in [1.0] * 9 + [0.5] + [1.0] * 12:
        rewards.watch(share)
    assert len(told) == 1
    assert "nothing is learned: raise training.temperature" in told[0]


def test_example_without_an_answer_is_refused_by_its_row() -> None:
    configs = [RewardConfig(function="m:f"), RewardConfig(function="slot-f1")]
    examples = [
        TokenizedExample([1], [-100], f"rows.jsonl: row {row}", "x", "", 1, columns=columns)
        for row, columns in enumerate([{"answer": "inform(a[1])"}, {"prompt": "x"}], 1)
    ]
    require_answers(configs[:1], examples)
    with pytest.raises(RewardError, match=r"^rows.jsonl: row 2: the example has no answer, which reward slot-f1"):
        require_answers(configs, examples)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"objective: grpo needs rewards, e.g. rewards: \[slot-f1\]"),
        ({"rewards": "slot-f1", "objective": "sft"}, "rewards are of objective: grpo, and it is sft"),
        ({"rewards": ["slot-f2"]}, r"rewards.0.function.* did you mean slot-f1\?"),
        ({"rewards": [{"function": "slot-f1", "weight": float("inf")}]}, "rewards.0.weight"),
        ({"rewards": ["slot-f1", "m:f", "slot-f1"]}, "rewards: slot-f1 is given twice; give it once"),
        ({"rewards": [{"function": "slot-f1", "weight": 0}]}, "rewards: each has weight: 0"),
        ({"rewards": ["mine.py:"]}, "write code as module:function"),
    ],
)
def test_wrong_rewards_are_refused_with_the_run_file(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig(**(RUN | changes))
