"""Runs on several ranks: the same result as one process, one who writes, errors that all end by, and resuming."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import expertune
from expertune.run.record import RunRecord
from tests.distributed.ranks import command, run_jobs
from tests.processes import Ended
from tests.train.conftest import ASSETS, write_small_mixtral

# What each rank would import, read and compute by itself: a run of one process comes upon most of it.
BEFORE = """
import io, shutil
from rich.console import Console
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.qwen3_moe import modeling_qwen3_moe
api.finetune("run.yaml", ["output_dir=before", "training.max_steps=1"], console=Console(file=io.StringIO()))
shutil.rmtree("before")
"""

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # with biases
}

NOT_TOGETHER = 1e-5  # of float32 sums over a step's examples, which are taken in another order
STEPS = 4  # four, four and two examples, and four of the next epoch

SHARED = {
    "memory_budget": "8GB",
    "quantization": {"compute_dtype": "float32"},
    "data": {"train": "rows.jsonl[0:10]", "eval": "rows.jsonl[10:15]", "template": "plain", "max_length": 64},
    "lora": {"r": 4, "alpha": 6, "targets": ["attention", "experts"]},
    "training": {
        "max_steps": STEPS,
        "learning_rate": 2e-4,
        "logging_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "per_device_eval_batch_size": 1,
        "ddp_timeout": 60,
    },
}
ONE = ["training.per_device_train_batch_size=4"]
TWO = [
    *("training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=2"),
    *("data.merge_accumulation=false", "training.gradient_checkpointing=true"),
]
FOUR = ["training.per_device_train_batch_size=1"]
OF_RANKS = {2: TWO, 4: FOUR}
# Where the loss is what most memory is planned for: half of these small experts then decides whether a run fits. In the
# preflight check, which computes as many tokens whatever their sequences are, what is sent takes more.
LONGER = "data.max_length=256"
# On two ranks in the default tests, on four in the slow ones.
RANKS, OTHER_RANKS = dict.fromkeys(FAMILIES, 2), dict.fromkeys(FAMILIES, 4)
TASK = ["task.metric=exact-match", "task.max_new_tokens=2", "task.batch_size=2"]
# Attention of gpt_oss does not keep concatenated sequences apart.
OF_FAMILY = {"mixtral": TASK, "qwen3_moe": [], "gpt_oss": ["data.packing=padded"]}
FEW, UNEVEN = ["data.train=rows.jsonl[0:3]", "training.max_steps=2"], ["data.train=rows.jsonl[0:9]"]
DROPOUT = [*TWO, "lora.dropout=0.1", "training.load_best_model_at_end=true"]

AT_STEP = """
from expertune.train.callbacks import History
end = History.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    end(self, args, state, control, **kwargs)
    if state.global_step == {step}:
        {do}
History.on_step_end = on_step_end
"""
KILLED = AT_STEP.format(step=3, do="os.kill(os.getpid(), signal.SIGKILL)")
# A launcher ends all: rank 0, and rank 1, which waits for it at the next vote and cannot take the signal there.
STOPPED = AT_STEP.format(
    step=3,
    do="time.sleep(0.5), os.kill(int(open('pid').read()), signal.SIGTERM), os.kill(os.getpid(), signal.SIGTERM)",
)
WRITES_PID = "open('pid', 'w').write(str(os.getpid()))"
LATE = AT_STEP.format(step=2, do="time.sleep(9)")
NO_WRAPPER = """
import torch
def wrap(*args, **kwargs):
    raise AssertionError("the model is wrapped")
torch.nn.parallel.DistributedDataParallel.__init__ = wrap
"""
NOT_FINITE = """
from expertune.train.promises import Promises
loss = Promises.compute_loss
def compute_loss(self, *args, **kwargs):
    return loss(self, *args, **kwargs) * (float("nan") if self.state.global_step else 1)
Promises.compute_loss = compute_loss
"""
SCARCE = """
import torch
from expertune.experts import module
layer = module.expert_mlp
def scarce(hidden, *args, **kwargs):
    if torch.is_grad_enabled() and hidden.shape[0] > 24:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    return layer(hidden, *args, **kwargs)
from expertune.train.callbacks import History
begin = History.on_step_begin
def on_step_begin(self, *args, **kwargs):
    begin(self, *args, **kwargs)
    module.expert_mlp = scarce
History.on_step_begin = on_step_begin
"""
FULL_DISK = """
import errno
from expertune.train import saving
def seal(folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "manifest.json"))
saving.seal = seal
"""
OTHER_VERSION = """
import importlib.metadata
from expertune.run import record
record._versions.cache_clear()  # of the run that was made before
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.0.1" if name == "peft" else version(name)
"""


def write_family(folder: Path, family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=4096, pad_token_id=0, **(_SIZES | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "sinks" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((ASSETS / "tiny-mixtral" / name).read_bytes())


def write_place(place: Path) -> Path:
    """A folder with models, rows and a run file; names in it are relative to it."""
    place.mkdir()
    write_small_mixtral(place / "mixtral")
    for family in ("qwen3_moe", "gpt_oss"):
        write_family(place / family, family)
    rows = [{"prompt": f"What is {n} plus {n + 1}?", "completion": f"It is {2 * n + 1}."} for n in range(15)]
    (place / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    values = {"model": "mixtral", "output_dir": "run"} | SHARED
    (place / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return place


def train(world_size: int, name: str, arguments: list[str], before: dict[int, str] | None = None) -> list[str]:
    return command(world_size, ["train", "run.yaml", f"output_dir={name}", *arguments], before)


def back_to_step_2(run: str, name: str) -> list[str]:
    """A copy of a finished run as it was after two steps."""
    code = (
        f"import shutil\nshutil.copytree({run!r}, {name!r})\n"
        f"for late in ('adapter', 'checkpoint-{STEPS}'): shutil.rmtree(f'{name}/{{late}}')"
    )
    return [code]


def too_little_to_replicate(folder: Path) -> int:
    """Bytes with which all experts do not fit on each of two ranks."""
    overrides = [*TWO, LONGER, f"model={folder / 'mixtral'}", "kernels.keep=0"]
    ranks = expertune.plan(folder / "run.yaml", overrides, devices=2).ranks
    assert ranks is not None
    return next(mode.peak_bytes for mode in ranks.modes if mode.distribution.mode == "replicate") - 1


def of_families(ranks: dict[str, int], *arguments: str) -> dict[str, list[str]]:
    """A run of each family with its number of ranks."""
    return {
        (name := f"{family}-{world_size}"): train(
            world_size, name, [f"model={family}", *OF_RANKS[world_size], *OF_FAMILY[family], *arguments]
        )
        for family, world_size in ranks.items()
    }


def jobs(budget: int) -> dict[str, list[str]]:
    # Ranks with all experts each do nothing with them together: the other families are left to the slow tests.
    return of_families({"mixtral": 2}) | {
        "chosen": train(2, "chosen", [*TWO, LONGER, f"memory_budget={budget}"]),
        "chosen, back": back_to_step_2("chosen", "chosen-anew"),
        "chosen anew": train(4, "chosen-anew", [*TWO, LONGER, "training.ddp_timeout=90", "--resume"]),
        "evaluate": command(2, ["evaluate", "chosen"]),
        "three examples on four": train(4, "few-4", [*FOUR, *FEW]),
        "dropout": train(2, "dropout", DROPOUT, {0: NO_WRAPPER, 1: NO_WRAPPER}),
        "stopped": train(2, "stopped", TWO, {0: STOPPED, 1: WRITES_PID}),
        "killed": train(2, "killed", DROPOUT, {1: KILLED}),
        "killed, resumed": train(2, "killed", [*DROPOUT, "--resume"]),
        "two, back": back_to_step_2("mixtral-2", "two-one"),
        "two to one": train(1, "two-one", [*TWO, "--resume"]),
        "one, back": back_to_step_2("mixtral-1", "one-two"),
        "one to two": train(2, "one-two", [*ONE, "--resume"]),
        "one, back again": back_to_step_2("mixtral-1", "three"),
        "three cannot": train(3, "three", [*ONE, "--resume"]),
        "without the file": train(2, "absent", TWO, {1: "os.chdir('bare')"}),
        "other files": train(2, "other", TWO, {1: "os.chdir('elsewhere')"}),
        "other run file": train(2, "file", TWO, {1: "extra.append('training.learning_rate=1e-3')"}),
        "other version": train(2, "version", TWO, {1: OTHER_VERSION}),
        "unknown key": train(2, "key", ["lora.rnk=8"]),
        "not finite": train(2, "nan", TWO, {1: NOT_FINITE}),
        "scarce": train(2, "scarce", ["training.per_device_train_batch_size=2"], {1: SCARCE}),
        "full disk": train(2, "disk", TWO, {0: FULL_DISK}),
        "late": train(2, "late", [*TWO, "training.ddp_timeout=3"], {1: LATE}),
    }


class Place:
    """The folder with all that the jobs have left."""

    def __init__(self, folder: Path, ended: dict[str, list[Ended]]) -> None:
        self.folder, self.ended = folder, ended

    def record(self, run: str) -> RunRecord:
        return RunRecord.load(self.folder / run)

    def said(self, job: str) -> str:
        """What all ranks of a job have said."""
        return "".join(each.err for each in self.ended[job])

    def statuses(self, job: str) -> list[int]:
        return [each.status for each in self.ended[job]]


@pytest.fixture(scope="module")
def place(one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = Path(shutil.copytree(one_process, tmp_path_factory.mktemp("ranks") / "place"))
    for name in ("bare", "elsewhere"):
        (folder / name).mkdir()
        (folder / name / "run.yaml").write_bytes((folder / "run.yaml").read_bytes())
    (folder / "bare" / "mixtral").symlink_to(folder / "mixtral")
    write_small_mixtral(folder / "elsewhere" / "mixtral", seed=1)
    rows = (folder / "rows.jsonl").read_text(encoding="utf-8")
    (folder / "elsewhere" / "rows.jsonl").write_text(rows.replace("What is 3", "How much is 3"), encoding="utf-8")
    return Place(folder, run_jobs(jobs(too_little_to_replicate(folder)), folder, BEFORE))


def assert_same_result(place: Place, one: str, other: str) -> None:
    records = [place.record(run) for run in (one, other)]
    for section, name in (("train", "loss"), ("train", "grad_norm"), ("train", "expert_imbalance"), ("eval", "loss")):
        ours, theirs = (dict(record[section][name]) for record in records)
        assert ours == pytest.approx(theirs, abs=NOT_TOGETHER), name
    assert records[0]["train"]["tokens"] == records[1]["train"]["tokens"]
    ours, theirs = (load_file(place.folder / run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=0, atol=NOT_TOGETHER, msg=lambda text, at=name: f"{at}: {text}"
        )


def test_ranks_give_the_losses_and_the_adapter_of_one_process(place: Place) -> None:
    assert_one_process_agrees(place, "mixtral", 2)


@pytest.mark.slow
def test_more_ranks_and_the_other_families_give_them_too(one_process: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(one_process, tmp_path / "place"))
    place = Place(folder, run_jobs(of_families(OTHER_RANKS), folder, BEFORE))
    for family, world_size in OTHER_RANKS.items():
        assert_one_process_agrees(place, family, world_size)


def assert_one_process_agrees(place: Place, family: str, world_size: int) -> None:
    run = f"{family}-{world_size}"
    assert place.statuses(run) == [0] * world_size, place.said(run)
    assert_same_result(place, f"{family}-1", run)
    train = place.record(run)["train"]
    assert (train["processes"], train["global_batch"]) == (world_size, 4)


def test_mode_is_the_one_that_the_plan_finds(place: Place) -> None:
    assert place.statuses("chosen") == [0, 0], place.said("chosen")
    assert place.record("chosen")["train"]["experts"] == "parallel"
    assert place.said("chosen").count("experts: parallel; not all experts fit on each device") == 1
    ranks = place.record("chosen")["plan"]["ranks"]
    assert ranks["reason"].startswith("not all experts fit on each device")
    assert place.record("mixtral-2")["train"]["experts"] == "replicate"


def test_run_that_another_number_of_processes_resumes_is_planned_anew_and_has_the_same_result(place: Place) -> None:
    assert place.statuses("chosen anew") == [0] * 4, place.said("chosen anew")
    assert "resuming from" in place.said("chosen anew")
    assert place.record("chosen-anew")["train"]["experts"] == "replicate"
    assert_same_result(place, "chosen", "chosen-anew")


def test_more_ranks_than_examples_take_the_steps_of_one_process(place: Place) -> None:
    assert place.statuses("three examples on four") == [0] * 4, place.said("three examples on four")
    assert_same_result(place, "few-1", "few-4")


def test_answers_that_ranks_share_have_the_score_of_one_process(place: Place) -> None:
    for when in ("before", "after"):
        ours, theirs = (place.record(run)["task"][when] for run in ("mixtral-1", "mixtral-2"))
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_rank_0_alone_prints_and_writes(place: Place) -> None:
    first, second = place.ended["mixtral-2"]
    assert first.out == "mixtral-2\n"
    assert "2 processes" in first.err
    assert (second.out, second.err) == ("", "")
    run_dir = place.folder / "mixtral-2"
    written = {path.name for path in run_dir.iterdir()}
    assert written == {
        "adapter",
        "checkpoint-2",
        "checkpoint-4",
        "lengths.png",
        "record.json",
        "report.html",
        "summary.png",
    }
    states = {path.name for path in (run_dir / "checkpoint-2").glob("rng_state*")}
    assert states == {"rng_state_0.pth", "rng_state_1.pth"}


def test_killed_rank_ends_the_others_with_one_message_and_the_run_resumes_to_the_same_bytes(place: Place) -> None:
    assert place.statuses("killed") == [2, -9]
    assert place.said("killed").count("error:") == 1
    assert "rank 1 of 2 ended without a word" in place.said("killed")
    assert place.statuses("killed, resumed") == [0, 0], place.said("killed, resumed")
    for file in ("adapter/adapter_model.safetensors", f"checkpoint-{STEPS}/optimizer.pt"):
        ours, theirs = ((place.folder / run / file).read_bytes() for run in ("dropout", "killed"))
        assert ours == theirs, file
    assert place.record("dropout")["train"]["loss"] == place.record("killed")["train"]["loss"]


@pytest.mark.parametrize(("job", "run", "started"), [("two to one", "two-one", 2), ("one to two", "one-two", 1)])
def test_run_is_resumed_by_another_number_of_processes(place: Place, job: str, run: str, started: int) -> None:
    assert set(place.statuses(job)) == {0}, place.said(job)
    assert "resuming from" in place.said(job)
    assert_same_result(place, f"mixtral-{started}", run)
    train = place.record(run)["train"]
    assert (train["processes"], train["global_batch"]) == (3 - started, 4)


def test_job_that_is_stopped_says_once_how_it_is_resumed(place: Place) -> None:
    assert place.statuses("stopped") == [128 + signal.SIGTERM] * 2, place.said("stopped")
    assert place.said("stopped").count("interrupted by SIGTERM") == 1
    assert "; in 2 processes as before, `expertune train " in place.said("stopped")
    assert "--resume` continues from checkpoint-2" in place.said("stopped")
    assert place.record("stopped")["run"]["status"] == "interrupted"


def test_model_is_not_wrapped_and_the_best_checkpoint_is_the_adapter(place: Place) -> None:
    assert place.statuses("dropout") == [0, 0], place.said("dropout")
    adapter = place.record("dropout")["adapter"]
    evaluations = dict(place.record("dropout")["eval"]["loss"])
    assert adapter["value"] == min(evaluations.values())
    assert evaluations[adapter["step"]] == adapter["value"]


def test_step_that_processes_cannot_share_evenly_is_refused(place: Place) -> None:
    assert place.statuses("three cannot") == [2, 2, 2]
    assert place.said("three cannot").count("error:") == 1
    assert "each step of the run takes 4 examples, which 3 processes cannot share evenly" in place.said("three cannot")


REFUSED = {
    "without the file": ["error: rank 1: data.train: rows.jsonl: no such file"],
    "other files": ["Other than on rank 0 are rank 1: inputs.rows.train, model.weights."],
    "other run file": ["Other than on rank 0 are rank 1: run file.training.learning_rate."],
    "other version": ["Other than on rank 0 are rank 1: versions.peft."],
    "unknown key": ["error: override 'lora.rnk=8': unknown key lora.rnk"],
    "not finite": ["rank 1: the loss became nan in step 2 on rows.jsonl"],
    "full disk": ["rank 0: disk/.checkpoint-being-written", "No space left on device"],
    "evaluate": ["error: this is one of 2 processes, and this command works in one"],
    "late": ["error: rank 1 of 2 ended without a word, or kept the others waiting for more than 3 s"],
}


@pytest.mark.parametrize("job", REFUSED)
def test_error_on_one_rank_ends_all_and_is_said_once(place: Place, job: str) -> None:
    assert place.statuses(job) == [2, 2], place.said(job)
    said = place.said(job)
    assert said.count("error:") == 1
    assert "Traceback" not in said
    for words in REFUSED[job]:
        assert words in " ".join(said.split())


@pytest.mark.parametrize("run", ["absent", "other", "file", "version", "key"])
def test_ranks_that_do_not_start_from_the_same_leave_nothing_behind(place: Place, run: str) -> None:
    assert not (place.folder / run).exists()


def test_memory_that_runs_out_on_one_rank_has_all_take_the_step_again(place: Place) -> None:
    assert place.statuses("scarce") == [0, 0], place.said("scarce")
    assert_same_result(place, "mixtral-1", "scarce")
    changes = place.record("scarce")["train"]["recoveries"]
    assert [change["step"] for change in changes] == [1, 1]
    assert all("on rank 1: Tried to allocate" in change["error"] for change in changes)
    assert changes[0]["setting"] == {"kept_layers": 0}
    assert "micro_batch_tokens" in changes[1]["setting"]


def test_full_disk_is_in_the_record(place: Place) -> None:
    run = place.record("disk")["run"]
    assert run["status"] == "stopped"
    assert "No space left on device" in run["error"]
    assert not list((place.folder / "disk").glob("checkpoint-*"))
