"""Objectives over answers on several ranks: losses, figures and the adapter are those of one process."""

import json
from pathlib import Path

import pytest

from tests.distributed.ranks import run_jobs
from tests.distributed.test_replicated import BEFORE, SCARCE, Place, assert_same_result, train, write_place

pytest.importorskip("trl")

# Of ten the last step of an epoch has two; of nine it has one, and a rank none.
EIGHT = "data.train=pairs.jsonl[0:8]"
NINE, NINE_LABELS = "data.train=pairs.jsonl[0:9]", "data.train=labels.jsonl[0:9]"
ONE_EACH, TWO_EACH, FOUR_EACH = (f"training.per_device_train_batch_size={size}" for size in (1, 2, 4))
TWICE = "training.gradient_accumulation_steps=2"
# What one process is asked, and each of two.
CASES: dict[str, tuple[list[str], list[str]]] = {
    "dpo": ([FOUR_EACH], [ONE_EACH, TWICE]),
    "dpo nine": ([FOUR_EACH, NINE], [TWO_EACH, NINE]),
    # Its KL term is over a micro-batch of both ranks.
    "kto": ([FOUR_EACH], [TWO_EACH]),
    "kto nine": ([FOUR_EACH, NINE_LABELS], [TWO_EACH, NINE_LABELS]),
    # Its cross entropy is over a micro-batch of each, which have to be the same ones.
    "orpo": ([TWO_EACH, TWICE, EIGHT], [TWO_EACH, EIGHT]),
}


# Two pairs of a rank are more, and one is not; of labeled answers two are more, too.
SHORT_OF = {"dpo": SCARCE.replace("24", "48"), "kto": SCARCE}


def run(name: str, size: int, before: dict[int, str] | None = None, to: str | None = None) -> list[str]:
    data = ["data.train=pairs.jsonl[0:10]", "data.eval=pairs.jsonl[10:15]"]
    arguments = [f"objective={name.split()[0]}", *data, *CASES[name][size - 1]]
    return train(size, to or f"{name}-{size}", arguments, before)


def write_pairs(folder: Path) -> None:
    rows = [
        {"prompt": f"What is {n} plus {n + 1}?", "chosen": f"It is {2 * n + 1}.", "rejected": f"{n} and {n + 1}."}
        for n in range(15)
    ]
    labels = [
        {"prompt": row["prompt"], "completion": row["chosen" if n % 3 else "rejected"], "label": bool(n % 3)}
        for n, row in enumerate(rows)
    ]
    for name, of_file in (("pairs", rows), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of_file)), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = write_place(tmp_path_factory.mktemp("answers") / "place")
    write_pairs(folder)
    jobs = {f"{name}-{size}": run(name, size) for name in CASES for size in (1, 2)}
    for name, scarce in SHORT_OF.items():
        jobs[f"{name} scarce"] = run(f"{name} nine", 2, {1: scarce}, f"{name}-scarce")
    return Place(folder, run_jobs(jobs, folder, BEFORE))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ranks_give_the_losses_figures_and_adapter_of_one_process(place: Place, name: str) -> None:
    for size in (1, 2):
        assert place.statuses(f"{name}-{size}") == [0] * size, place.said(f"{name}-{size}")
    assert_same_result(place, f"{name}-1", f"{name}-2")
    ours, theirs = (place.record(f"{name}-{size}") for size in (1, 2))
    figures = {each for each in ours["train"] if "/" in each or each in ("kl", "nll_loss")}
    assert figures >= {"rewards/chosen", "rewards/margins"}
    for figure in figures:
        assert dict(ours["train"][figure]) == pytest.approx(dict(theirs["train"][figure]), abs=1e-4), figure
    for (step, figures_1), (_, figures_2) in zip(ours["eval"]["scores"], theirs["eval"]["scores"], strict=True):
        assert figures_1 == pytest.approx(figures_2, abs=1e-4), step


@pytest.mark.slow
def test_pairs_stay_whole_where_memory_runs_out_on_one_rank(place: Place) -> None:
    assert place.statuses("dpo scarce") == [0, 0], place.said("dpo scarce")
    assert_same_result(place, "dpo nine-1", "dpo-scarce")
    changes = place.record("dpo-scarce")["train"]["recoveries"]
    assert [change["step"] for change in changes] == [1]


@pytest.mark.slow
def test_ranks_that_wait_for_a_kl_term_end_with_the_one_whose_memory_runs_out(place: Place) -> None:
    assert place.statuses("kto scarce") == [2, 2], place.said("kto scarce")
    said = " ".join(place.said("kto scarce").split())
    assert said.count("error:") == 1
    assert "no fallback is left (micro-batches are not split: KTO takes its KL term over a micro-batch)" in said
