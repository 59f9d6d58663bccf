"""Experts of which each rank holds a slice: the result of one process, in less memory."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoint.formats.test_bnb4bit import BITSANDBYTES, pack
from tests.checkpoint.formats.test_mxfp4 import pack_blocks
from tests.distributed.conftest import RUNS
from tests.distributed.ranks import command, run_jobs
from tests.distributed.test_replicated import (
    BEFORE,
    FEW,
    FOUR,
    NOT_FINITE,
    NOT_TOGETHER,
    RANKS,
    SCARCE,
    TASK,
    TWO,
    Place,
    assert_same_result,
    back_to_step_2,
    of_families,
    train,
    write_place,
)

SHARD = ["distributed.experts=shard"]
FOLDERS = ("mixtral", "qwen3_moe", "nf4", "mxfp4", "bitsandbytes")
FILES = ("adapter/adapter_model.safetensors", "checkpoint-4/optimizer.pt")

# Which experts a rank reads of each layer, and whether what it holds is its part of what one process loads.
LOADING = """
import json, torch
from expertune.checkpoint.load import LoadOptions, load_model
from expertune.config import QuantizationConfig
from expertune.distributed.mesh import open_ranks
from expertune.distributed.sharded import ExpertSharding
from expertune.experts.module import Nf4Experts
from expertune.kernels.nf4 import Part
found, read = {{}}, []
place = Nf4Experts.locate
def locate(self, expert, projection):
    read.append(expert)
    return place(self, expert, projection)
def experts(loaded):
    return {{name: each for name, each in loaded.model.named_modules() if isinstance(each, Nf4Experts)}}
with open_ranks() as ranks:
    sharding = ExpertSharding(ranks)
    for folder in {folders}:
        quantization = QuantizationConfig()
        load = lambda **given: experts(load_model(folder, quantization, torch.float32, "cpu", **given))
        whole = load()
        Nf4Experts.locate = locate
        held = load(options=LoadOptions(sharing=sharding))
        Nf4Experts.locate = place
        pairs = [(getattr(stack, name), getattr(other, name), getattr(stack.whole, name)) for key in whole
                 for stack, other in ((held[key].gate_up, whole[key].gate_up), (held[key].down, whole[key].down))
                 for name in ("packed", "absmax", "nested_absmax", "offset")]
        same = True
        for own, all_of_it, like in pairs:
            here = Part(ranks.rank, ranks.world_size).of(like)
            same &= torch.equal(own, all_of_it.detach().reshape(-1).view(torch.uint8)[here.start : here.stop])
        found[folder] = [same, sorted(set(read)), sum(own.nbytes for own, _, _ in pairs),
                         sum(like.nbytes for _, _, like in pairs), len(pairs)]
        read.clear()
    open(f"loaded-{{ranks.rank}}.json", "w").write(json.dumps(found))
"""

# Does not come to a layer that the other rank gathers.
STOPS_GATHERING = """
from expertune.distributed.sharded import ExpertSharding
start, calls = ExpertSharding.start, []
def late(self, *args):
    calls.append(args)
    if len(calls) == 9:
        time.sleep(9)
    start(self, *args)
ExpertSharding.start = late
"""

FEW_STEPS = [
    *("training.per_device_train_batch_size=2", "training.max_steps=1", "training.eval_strategy=no"),
    "training.save_strategy=no",
]
SCARCE_RUN = ["training.per_device_train_batch_size=2", *SHARD, *TASK, "task.batch_size=4"]
# Memory runs out twice while prompts are answered: with a layer under way, and after the last one of a pass.
SCARCE_ANSWERING = """
import torch
from expertune.evaluation.held_out import HeldOut
from expertune.experts import module
score = HeldOut.score
def scarce_score(self, step, *args, **kwargs):
    if step:
        layer, head, left = module.expert_mlp, self._model.get_output_embeddings(), ["head", "layer"]
        def scarce(*given, **named):
            if left == ["head", "layer"]:
                raise torch.OutOfMemoryError(f"Tried to allocate 2.00 GiB in the {left.pop()}")
            return layer(*given, **named)
        def scarce_head(*_):
            if left == ["head"]:
                raise torch.OutOfMemoryError(f"Tried to allocate 2.00 GiB in the {left.pop()}")
        module.expert_mlp = scarce
        head.register_forward_pre_hook(scarce_head)
    return score(self, step, *args, **kwargs)
HeldOut.score = scarce_score
"""
# Memory runs out once, after all that the ranks exchange while a first batch's losses are compared.
SCARCE_COMPARING = """
import torch
from expertune.objectives import chunked_loss
find = chunked_loss._find_transform
def find_transform(*args):
    chunked_loss._find_transform = find
    raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
chunked_loss._find_transform = find_transform
"""


def jobs() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"quantize": command(1, ["quantize", "mixtral", "nf4"])}
    found["loading"] = [LOADING.format(folders=FOLDERS)] * 3
    found |= of_families(RANKS, *SHARD)
    return found | {
        "three": train(3, "uneven-3", [*RUNS["uneven-1"], *FOUR, *SHARD]),
        "three examples on five": train(5, "few-5", [*FEW, *FOUR, *SHARD]),
        "from the disk": train(2, "disk", ["model=nf4", *TWO, *SHARD, "placement=disk"]),
        "two, back": back_to_step_2("mixtral-2", "two-two"),
        "two to two": train(2, "two-two", [*TWO, *SHARD, "--resume"]),
        "two, back again": back_to_step_2("mixtral-2", "two-parallel"),
        "to parallel": train(2, "two-parallel", [*TWO, "distributed.experts=parallel", "--resume"]),
        "scarce": train(2, "scarce", SCARCE_RUN, {0: SCARCE, 1: SCARCE_ANSWERING}),
        "scarce at first": train(2, "scarce-at-first", [*FEW_STEPS, *SHARD], {1: SCARCE_COMPARING}),
    }


def write_packed(place: Path) -> None:
    """The models of the place again, their experts packed as others publish them."""
    for source, folder in (("gpt_oss", "mxfp4"), ("mixtral", "bitsandbytes")):
        tensors = load_file(place / source / "model.safetensors")
        if folder == "mxfp4":
            for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
                blocks, scales = pack_blocks(tensors.pop(key).transpose(1, 2))
                tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        else:
            pack(tensors)
        (place / folder).mkdir()
        save_file(tensors, place / folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((place / source / "config.json").read_text(encoding="utf-8"))
        mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        values["quantization_config"] = mxfp4 if folder == "mxfp4" else BITSANDBYTES
        (place / folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


@pytest.fixture(scope="module")
def place(one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = Path(shutil.copytree(one_process, tmp_path_factory.mktemp("sharded") / "place"))
    write_packed(folder)
    return Place(folder, run_jobs(jobs(), folder, BEFORE))


@pytest.mark.parametrize("family", RANKS)
def test_ranks_give_the_losses_and_the_adapter_of_one_process(place: Place, family: str) -> None:
    run = f"{family}-{RANKS[family]}"
    assert set(place.statuses(run)) == {0}, place.said(run)
    assert_same_result(place, f"{family}-1", run)
    one, several = place.record(f"{family}-1"), place.record(run)
    assert several["preflight"]["four_bit"] == one["preflight"]["four_bit"]
    assert several["preflight"]["learning"] == one["preflight"]["learning"]
    assert several["train"]["experts"] == "shard"


@pytest.mark.parametrize("family", RANKS)
def test_rank_holds_its_part_of_the_bytes_and_two_layers(place: Place, family: str) -> None:
    ranks = RANKS[family]
    record = place.record(f"{family}-{ranks}")
    total, held = record["preflight"]["four_bit"]["expert_bytes"], record["placement"]
    layers, rounded = held["layers"]["device"], 16 * 8  # of eight tensors, each slice up to 16 bytes
    assert total / ranks <= held["streamed_bytes"] <= total / ranks + layers * rounded
    assert 2 * total / layers <= held["slot_bytes"] <= 2 * (total / layers + 8 * 256 + ranks * rounded)


@pytest.mark.parametrize("folder", FOLDERS)
def test_rank_reads_no_more_than_it_keeps_and_the_experts_that_lie_in_it(place: Place, folder: str) -> None:
    assert place.statuses("loading") == [0, 0, 0], place.said("loading")
    found = [json.loads((place.folder / f"loaded-{rank}.json").read_text(encoding="utf-8")) for rank in range(3)]
    of_folder = [of_rank[folder] for of_rank in found]
    assert all(same for same, *_ in of_folder)
    assert sum(held for _, _, held, *_ in of_folder) == of_folder[0][3]
    for _, read, held, total, tensors in of_folder:
        assert held <= total / 3 + 16 * tensors
        num_experts = 16 if folder == "qwen3_moe" else 4
        assert len(read) <= (0 if folder == "nf4" else num_experts / 3 + 2), read


def test_answers_have_the_score_of_one_process(place: Place) -> None:
    for when in ("before", "after"):
        ours, theirs = (place.record(name)["task"][when] for name in ("mixtral-1", "mixtral-2"))
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_experts_that_do_not_divide_give_the_same_result(place: Place) -> None:
    assert place.statuses("three") == [0] * 3, place.said("three")
    assert_same_result(place, "uneven-1", "uneven-3")


def test_more_ranks_than_experts_of_which_two_have_no_example_give_the_same_result(place: Place) -> None:
    assert place.statuses("three examples on five") == [0] * 5, place.said("three examples on five")
    assert_same_result(place, "few-1", "few-5")


def test_slices_that_are_mapped_from_a_folder_give_the_same_result(place: Place) -> None:
    assert place.statuses("from the disk") == [0, 0], place.said("from the disk")
    assert place.record("disk")["placement"]["layers"] == {"disk": 2}
    assert_same_result(place, "mixtral-1", "disk")


def test_run_that_is_resumed_gives_the_bytes_of_one_that_was_not(place: Place) -> None:
    assert place.statuses("two to two") == [0, 0], place.said("two to two")
    for file in FILES:
        ours, theirs = ((place.folder / run / file).read_bytes() for run in ("mixtral-2", "two-two"))
        assert ours == theirs, file


def test_run_is_resumed_with_experts_shared_out(place: Place) -> None:
    assert place.statuses("to parallel") == [0, 0], place.said("to parallel")
    assert "resuming from" in place.said("to parallel")
    assert_same_result(place, "mixtral-2", "two-parallel")


def test_memory_that_runs_out_on_one_rank_has_all_take_the_step_again(place: Place) -> None:
    assert place.statuses("scarce") == [0, 0], place.said("scarce")
    assert_same_result(place, "mixtral-1", "scarce")
    changes = place.record("scarce")["train"]["recoveries"]
    assert [(change["step"], change["during"]) for change in changes[:1]] == [(1, "training")]
    assert "on rank 0: Tried to allocate" in changes[0]["error"]


def test_memory_that_runs_out_while_prompts_are_answered_on_one_rank_has_all_answer_again(place: Place) -> None:
    assert place.statuses("scarce") == [0, 0], place.said("scarce")
    ours, theirs = (place.record(name)["task"]["after"] for name in ("mixtral-1", "scarce"))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    changes = [change for change in place.record("scarce")["train"]["recoveries"] if change["during"] == "generation"]
    where = [change["error"].removeprefix("on rank 1: Tried to allocate 2.00 GiB in the ") for change in changes]
    assert where == ["layer", "head"]


def test_memory_that_runs_out_while_losses_are_compared_on_one_rank_has_all_compare_again(place: Place) -> None:
    assert place.statuses("scarce at first") == [0, 0], place.said("scarce at first")
    record = place.record("scarce-at-first")["train"]
    assert record["loss"][0] == pytest.approx(place.record("mixtral-1")["train"]["loss"][0], abs=NOT_TOGETHER)
    assert [change["error"] for change in record["recoveries"]] == ["on rank 1: Tried to allocate 2.00 GiB"]


@pytest.mark.slow
def test_error_on_one_rank_and_a_rank_that_does_not_come_to_a_layer_end_all_and_are_said_once(tmp_path: Path) -> None:
    folder = write_place(tmp_path / "place")
    jobs = {
        "late": train(2, "late", [*FEW_STEPS, *SHARD, "training.ddp_timeout=3"], {1: STOPS_GATHERING}),
        "not finite": train(2, "nan", [*TWO, *SHARD], {0: NOT_FINITE}),
    }
    place = Place(folder, run_jobs(jobs, folder, BEFORE))
    words = {
        "late": "rank 1 of 2 ended without a word, or kept the others waiting for more than 3 s",
        "not finite": "rank 0: the loss became nan in step 2 on rows.jsonl",
    }
    for job in jobs:
        said = place.said(job)
        assert place.statuses(job) == [2, 2], said
        assert said.count("error:") == 1, said
        assert "Traceback" not in said
        assert words[job] in " ".join(said.split())
