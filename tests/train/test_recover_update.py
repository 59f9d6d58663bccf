"""An optimizer's update, and the clipping of gradients before it, go through whole where memory runs out in them."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from expertune.errors import DoesNotFitError
from expertune.run.record import RunRecord
from expertune.train import ladder
from expertune.train.trainer import ExpertTrainer
from tests.train.scarce import Reference, ScarceOperators, adapter_bytes, out_of_memory, run

ADAM = importlib.import_module("torch.optim.adam")

GIVEN_BACK = "memory that nothing uses has been given back"

pytestmark = pytest.mark.usefixtures("own_settings")


@pytest.fixture(autouse=True)
def _four_steps(values: dict[str, Any]) -> None:
    # Without warm-up: the first learning rate would be 0, and half an update as good as none.
    values["training"] |= {"max_steps": 4, "warmup_steps": 0}


def in_each_step(number: int, tries: int) -> bool:
    """Fail once at every third operator; a step has more than three."""
    return tries < 1 and number % 3 == 1


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_updates_out_of_memory_at_many_operators_end_in_the_adapter_of_the_undisturbed_run(
    optim: str, values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"optim": optim, "eval_strategy": "no"}
    _, adapter = reference(optim)
    scarce = ScarceOperators(in_each_step).install(monkeypatch)
    record = run(values, tmp_path / "recovered")
    assert scarce.num_failures >= 4
    assert adapter_bytes(tmp_path / "recovered") == adapter
    changes = record["train"]["recoveries"]
    assert {(change["during"], change["change"]) for change in changes} == {("optimizer", GIVEN_BACK)}
    # Told once in a step, and not in the first alone.
    steps = [change["step"] for change in changes]
    assert steps == sorted(set(steps))
    assert len(steps) > 1


def test_update_of_an_optimizer_that_counts_its_calls_is_still_one(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting(torch.optim.SGD):
        """Steps get smaller by the number of calls, as in optimizers without a schedule."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
                for parameter in group["params"]:
                    parameter.data.sub_(parameter.grad / group["calls"], alpha=0.1)

    monkeypatch.setattr(ExpertTrainer, "get_optimizer_cls_and_kwargs", lambda *_: (Counting, {}))
    values["training"] |= {"eval_strategy": "no"}
    _, adapter = reference("counting")
    scarce = ScarceOperators(in_each_step).install(monkeypatch)
    run(values, tmp_path / "recovered")
    assert scarce.num_failures >= 4
    assert adapter_bytes(tmp_path / "recovered") == adapter


def test_update_goes_on_once_expert_bytes_have_moved(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = reference("four")
    monkeypatch.setattr(ladder, "offload_more", lambda model: "layer 0 waits on the host")
    counted = ScarceOperators(lambda *_: False).install(monkeypatch)
    run(values, tmp_path / "counted")
    middle_of_third = counted.num_operators * 5 // 8
    monkeypatch.undo()

    monkeypatch.setattr(ladder, "offload_more", lambda model: "layer 0 waits on the host")
    ScarceOperators(lambda number, tries: number == middle_of_third and tries < 3).install(monkeypatch)
    record = run(values, tmp_path / "recovered")
    assert [(change["step"], change["setting"]) for change in record["train"]["recoveries"]] == [
        (3, {}),
        (3, {"demoted": 1}),
        (3, {"demoted": 1}),
    ]
    assert {change["during"] for change in record["train"]["recoveries"]} == {"optimizer"}
    assert adapter_bytes(tmp_path / "recovered") == adapter


def test_update_with_nothing_left_to_move_stops_and_resumes_to_the_adapter_of_the_undisturbed_run(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = reference("four")
    counted = ScarceOperators(lambda *_: False).install(monkeypatch)
    run(values, tmp_path / "counted")
    monkeypatch.undo()
    middle_of_third = counted.num_operators * 5 // 8
    ScarceOperators(lambda number, _: number == middle_of_third).install(monkeypatch)
    with pytest.raises(
        DoesNotFitError,
        match=r"step 3 ran out of memory in the optimizer's update, and there is nothing cheaper left; the adapter is "
        r"half updated, and is not saved: .*checkpoint-2\. ",
    ):
        run(values, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    monkeypatch.undo()
    run(values, tmp_path / "run", resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter


class FailingUpdate:
    """AdamW's arithmetic, which fails once, after half of a group's parameters and outside of torch's operators; it is
    called for two groups a step.
    """

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0
        self.real = ADAM.adam

    def __call__(self, parameters: list[Any], *lists: Any, **settings: Any) -> None:
        self.calls += 1
        if self.calls != self.at:
            return self.real(parameters, *lists, **settings)
        half = len(parameters) // 2
        cut = [entry[:half] if isinstance(entry, list) else entry for entry in lists]
        self.real(parameters[:half], *cut, **settings)
        raise out_of_memory()


def test_first_update_out_of_memory_outside_of_operators_is_taken_again_whole(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = reference("four")
    update = FailingUpdate(at=2)
    monkeypatch.setattr(ADAM, "adam", update)
    record = run(values, tmp_path / "recovered")
    assert update.calls == 2 + 4 * 2
    assert [change["during"] for change in record["train"]["recoveries"]] == ["optimizer"]
    assert adapter_bytes(tmp_path / "recovered") == adapter


def test_later_update_out_of_memory_outside_of_operators_stops_and_names_the_last_checkpoint(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, adapter = reference("four")
    update = FailingUpdate(at=6)
    monkeypatch.setattr(ADAM, "adam", update)
    with pytest.raises(DoesNotFitError, match=r"step 3 .*half updated: it is not saved.*checkpoint-2\. "):
        run(values, tmp_path / "run")
    assert not (tmp_path / "run" / "adapter").exists()
    monkeypatch.undo()
    run(values, tmp_path / "run", resume=True)
    assert adapter_bytes(tmp_path / "run") == adapter


def test_clipping_out_of_memory_at_many_operators_scales_each_gradient_once(
    values: dict[str, Any], reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values["training"] |= {"optim": "sgd", "max_grad_norm": 0.01, "eval_strategy": "no"}
    _, adapter = reference("clipped sgd")
    scarce = ScarceOperators(in_each_step).install(monkeypatch, clipping=True)
    record = run(values, tmp_path / "recovered")
    assert scarce.num_failures >= 4
    assert adapter_bytes(tmp_path / "recovered") == adapter
    assert {(change["during"], change["change"]) for change in record["train"]["recoveries"]} == {
        ("clipping", GIVEN_BACK)
    }


def test_clipping_with_nothing_left_to_move_stops_before_the_step(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ScarceOperators(lambda number, _: number == 1).install(monkeypatch, clipping=True)
    with pytest.raises(DoesNotFitError, match=r"in the clipping of gradients, .*cheaper left; the step was not"):
        run(values, tmp_path / "run")


def test_run_killed_after_an_update_that_recovered_resumes_to_the_identical_adapter(
    values: dict[str, Any], reference: Reference, tmp_path: Path
) -> None:
    _, adapter = reference("four")
    script = f"""
import os, pytest, signal
from expertune import finetune
from expertune.config import parse_config
from expertune.train.callbacks import History
from tests.train.scarce import ScarceOperators
from tests.train.test_recover_update import in_each_step

def die(self, args, state, control, **kwargs):
    if state.global_step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    ScarceOperators(in_each_step).install(pytest.MonkeyPatch())
    History.on_pre_optimizer_step = die
    finetune(parse_config({values | {"output_dir": str(tmp_path / "killed")}!r}))
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    changes = RunRecord.load(tmp_path / "killed")["train"]["recoveries"]
    assert changes[-1]["step"] == 3
    run(values, tmp_path / "killed", resume=True)
    assert adapter_bytes(tmp_path / "killed") == adapter
