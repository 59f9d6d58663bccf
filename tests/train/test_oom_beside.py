"""Memory that runs out beside the steps: in evaluations, scores, the preflight check and checkpoints."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import expertune
from expertune import api
from expertune.errors import DoesNotFitError
from expertune.placement.experts import Placement
from expertune.run.record import RunRecord
from expertune.train.checkpoints import STAGING_NAME, list_checkpoints, verify
from expertune.train.trainer import ExpertTrainer
from tests.train.scarce import (
    NO_SEQUENCE,
    ONE_SEQUENCE,
    Reference,
    Scarce,
    adapter_bytes,
    before_training,
    evaluating,
    generating,
    out_of_memory,
    outside_training,
    run,
)

# Two prompts of the fixture fit, four do not; later tokens come one for each.
TWO_PROMPTS = 32

TASK = {"metric": "exact-match", "rows": 4, "max_new_tokens": 4, "batch_size": 4}


@pytest.fixture
def scored(values: dict[str, Any]) -> dict[str, Any]:
    """Two steps, with the task's score before and after."""
    values["training"] |= {"max_steps": 2, "eval_strategy": "no"}
    return values | {"task": TASK}


def answers(score: dict[str, Any]) -> list[str]:
    return [example["answered"] for example in score["examples"]]


def test_evaluation_out_of_memory_halves_its_batches_and_leaves_training_as_it_is(
    values: dict[str, Any],
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values["training"] |= {"max_steps": 4}
    undisturbed, adapter = reference("four")
    scarce = Scarce(2 * ONE_SEQUENCE, when=evaluating).install(monkeypatch)
    recovered = run(values, tmp_path / "recovered")
    assert scarce.num_failures == 1
    assert [(change["step"], change["during"]) for change in recovered["train"]["recoveries"]] == [(2, "evaluation")]
    assert adapter_bytes(tmp_path / "recovered") == adapter
    for (step, loss), (at, expected) in zip(recovered["eval"]["loss"], undisturbed["eval"]["loss"], strict=True):
        assert step == at
        assert loss == pytest.approx(expected, rel=1e-6)


def test_score_out_of_memory_answers_fewer_prompts_at_once_and_leaves_training_as_it_is(
    scored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = run(copy.deepcopy(scored) | {"task": TASK | {"batch_size": 2}}, tmp_path / "small")
    scarce = Scarce(TWO_PROMPTS, when=generating).install(monkeypatch)
    recovered = run(scored, tmp_path / "recovered")
    assert scarce.num_failures == 1
    (change,) = recovered["train"]["recoveries"]
    assert (change["step"], change["during"], change["setting"]) == (0, "generation", {"generation_rows": 2})
    assert change["change"] == "prompts answered at once: at most 2"
    for when in ("before", "after"):
        assert answers(recovered["task"][when]) == answers(small["task"][when])
        assert recovered["task"][when]["exact_match"] == small["task"][when]["exact_match"]
    assert adapter_bytes(tmp_path / "recovered") == adapter_bytes(tmp_path / "small")


def test_score_that_fits_no_single_prompt_uses_every_fallback(
    scored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter(["experts of layer 1 are offloaded"])
    monkeypatch.setattr(Placement, "offload_more", lambda _: next(left, None))
    Scarce(NO_SEQUENCE, when=generating).install(monkeypatch)
    with pytest.raises(
        DoesNotFitError,
        match=r"^generation before the first step ran out of memory, and no fallback is left: Tried to alloc",
    ):
        run(scored, tmp_path / "run")
    record = RunRecord.load(tmp_path / "run")
    assert [next(iter(change["setting"])) for change in record["train"]["recoveries"]] == [
        *["generation_rows"] * 2,
        "demoted",
    ]
    assert record["run"]["status"] == "stopped"


def test_resumed_run_repeats_the_changes_of_the_score_before_it(
    scored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored["training"] |= {"max_steps": 4}
    moved: list[str] = []

    def offload_more(_: Placement) -> str:
        moved.append("experts of a layer are offloaded")
        return moved[-1]

    monkeypatch.setattr(Placement, "offload_more", offload_more)
    with pytest.MonkeyPatch.context() as patch:
        scarce = Scarce(NO_SEQUENCE, when=generating)
        patch.setattr(scarce, "too_large", lambda tokens: not moved)
        scarce.install(patch)
        whole = run(scored, tmp_path / "run")
    assert len(moved) == 1
    before = adapter_bytes(tmp_path / "run")

    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = run(scored, tmp_path / "run", resume=True)
    assert len(moved) == 2
    assert resumed["train"]["recoveries"] == whole["train"]["recoveries"]
    assert adapter_bytes(tmp_path / "run") == before


def test_evaluating_and_asking_a_finished_run_use_smaller_batches_and_report_it(
    scored: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(scored, tmp_path / "run")
    plenty = expertune.evaluate(tmp_path / "run")
    assert plenty["recoveries"] == []

    with pytest.MonkeyPatch.context() as patch:
        Scarce(2 * ONE_SEQUENCE, when=outside_training).install(patch)
        loss = expertune.evaluate(tmp_path / "run")
    assert loss["loss"] == pytest.approx(plenty["loss"], rel=1e-6)
    assert loss["task"]["exact_match"] == plenty["task"]["exact_match"]
    assert {(change["step"], change["during"]) for change in loss["recoveries"]} == {(2, "evaluation")}
    assert json.dumps(loss)

    with pytest.MonkeyPatch.context() as patch:
        Scarce(TWO_PROMPTS, when=generating).install(patch)
        score = expertune.evaluate(tmp_path / "run")
    assert score["loss"] == plenty["loss"]
    assert answers(score["task"]) == answers(plenty["task"])
    assert [(change["step"], change["setting"]) for change in score["recoveries"]] == [(2, {"generation_rows": 2})]

    Scarce(NO_SEQUENCE, when=generating).install(monkeypatch)
    with pytest.raises(DoesNotFitError, match=r"generation after step 2 ran .*Try again where there is more memory"):
        expertune.generate(tmp_path / "run", "What is 1 plus 2?", max_new_tokens=4)


@pytest.mark.parametrize("most_tokens", [4 * ONE_SEQUENCE, ONE_SEQUENCE], ids=["with gradients", "of the base"])
def test_preflight_check_uses_fewer_sequences_where_a_forward_runs_out_of_memory(
    most_tokens: int, values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 2, "eval_strategy": "no"}
    _, adapter = reference("two whole", eval_strategy="steps")
    scarce = Scarce(most_tokens, when=before_training).install(monkeypatch)
    record = run(values, tmp_path / "recovered")
    assert scarce.num_failures >= 1
    changes = record["train"]["recoveries"]
    assert {(change["step"], change["during"]) for change in changes} == {(0, "preflight")}
    assert changes[-1]["setting"]["preflight_tokens"] <= most_tokens
    assert record["preflight"]["passed"]
    assert adapter_bytes(tmp_path / "recovered") == adapter


def test_preflight_check_out_of_memory_is_run_again_with_nothing_changed_that_shows_in_a_logit(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 2, "eval_strategy": "no"}
    _, adapter = reference("two whole", eval_strategy="steps")
    monkeypatch.setattr(Placement, "offload_more", lambda _: "experts of layer 0 are offloaded")
    tries, real = [], api.preflight

    def preflight(*arguments: Any) -> Any:
        tries.append(arguments)
        if len(tries) < 3:
            raise out_of_memory()
        return real(*arguments)

    monkeypatch.setattr(api, "preflight", preflight)
    record = run(values, tmp_path / "recovered")
    assert len(tries) == 3
    changes = record["train"]["recoveries"]
    assert {change["during"] for change in changes} == {"preflight"}
    assert [next(iter(change["setting"])) for change in changes] == ["preflight_tokens", "preflight_tokens"]
    assert adapter_bytes(tmp_path / "recovered") == adapter


def test_checkpoint_out_of_memory_is_written_again(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 4, "eval_strategy": "no"}
    _, adapter = reference("four", eval_strategy="steps")
    real, failures = ExpertTrainer._save_optimizer_and_scheduler, []

    def save(trainer: Any, folder: str) -> None:
        real(trainer, folder)
        if not failures:
            failures.append(folder)
            raise out_of_memory()

    monkeypatch.setattr(ExpertTrainer, "_save_optimizer_and_scheduler", save)
    record = run(values, tmp_path / "run")
    assert len(failures) == 1
    changes = record["train"]["recoveries"]
    assert [(change["step"], change["during"], change["setting"]) for change in changes] == [(2, "checkpoint", {})]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    for folder in list_checkpoints(tmp_path / "run"):
        verify(folder)
    assert not (tmp_path / "run" / STAGING_NAME).exists()
    assert adapter_bytes(tmp_path / "run") == adapter

    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    run(values, tmp_path / "run", resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter


def test_checkpoint_that_never_fits_stops_and_leaves_those_before_it(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 4, "eval_strategy": "no"}
    real = ExpertTrainer._save_rng_state

    def save(trainer: Any, folder: str) -> None:
        if trainer.state.global_step == 4:
            raise out_of_memory()
        real(trainer, folder)

    monkeypatch.setattr(ExpertTrainer, "_save_rng_state", save)
    with pytest.raises(
        DoesNotFitError,
        match=r"^the checkpoint after step 4 ran out of memory, and no fallback.*checkpoint-2\. ",
    ):
        run(values, tmp_path / "run")
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / STAGING_NAME).exists()


def test_final_adapter_out_of_memory_is_written_again(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"max_steps": 4, "eval_strategy": "no"}
    _, adapter = reference("four", eval_strategy="steps")
    real, failures = api.ExpertPeftModel.save_pretrained, []

    def save(model: Any, folder: str, *arguments: Any, **settings: Any) -> None:
        if folder.endswith("adapter") and not failures:
            failures.append(folder)
            raise MemoryError
        real(model, folder, *arguments, **settings)

    monkeypatch.setattr(api.ExpertPeftModel, "save_pretrained", save)
    record = run(values, tmp_path / "run")
    assert len(failures) == 1
    assert [(change["step"], change["error"]) for change in record["train"]["recoveries"]] == [(4, "MemoryError")]
    assert adapter_bytes(tmp_path / "run") == adapter
