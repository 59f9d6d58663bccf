"""Experts shared out to ranks: the result of one process, from what each reads to the checkpoint that all write."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import expertune
from expertune.placement.experts import placement_of
from tests.distributed.ranks import command, run_jobs
from tests.distributed.test_replicated import (
    BEFORE,
    FAMILIES,
    FEW,
    FOUR,
    FULL_DISK,
    LONGER,
    NOT_FINITE,
    NOT_TOGETHER,
    ONE,
    OTHER_RANKS,
    RANKS,
    TASK,
    TWO,
    UNEVEN,
    Place,
    assert_same_result,
    back_to_step_2,
    of_families,
    too_little_to_replicate,
    train,
)

PARALLEL = ["distributed.experts=parallel"]

# What a rank holds, which the record does not say.
HELD = """
import json
from expertune import api
load = api._load_and_adapt
def load_and_adapt(context, inputs, placement):
    model, *rest = load(context, inputs, placement)
    from expertune.experts.module import Nf4Experts
    held = {{name: [list(each.owned), each.gate_up.packed.shape[0], each.down.nbytes]
            for name, each in model.named_modules() if isinstance(each, Nf4Experts)}}
    factors = {{name: list(each.shape) for name, each in model.named_parameters() if each.requires_grad}}
    factors = {{name: shape for name, shape in factors.items() if len(shape) == 3}}
    open("held-{rank}.json", "w").write(json.dumps([held, factors]))
    return model, *rest
api._load_and_adapt = load_and_adapt
"""


# Memory runs out in the second step, in an evaluation and in answers, on one rank after the other and each time later:
# before, between and after what the ranks exchange, and in their experts, in forward and in backward.
SCARCE_ANYWHERE = """
import torch
from expertune.distributed.mesh import Ranks
from expertune.distributed.parallel import ExpertParallel
from expertune.evaluation.held_out import HeldOut
from expertune.experts import module
from expertune.train.callbacks import History
from expertune.train.oom import OutOfMemory
from expertune.train.promises import Promises
now = dict(attempt=0, place=0, on=False, stride=5)
def scarce(owner, name):
    do = getattr(owner, name)
    def counted(*args, **kwargs):
        if now["on"]:
            now["place"] += 1
            if now["place"] == now["stride"] * (now["attempt"] // 2) + 1 and now["attempt"] % 2 == {rank}:
                raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return do(*args, **kwargs)
    setattr(owner, name, counted)
scarce(Ranks, "proceed"), scarce(ExpertParallel, "exchange"), scarce(module, "expert_mlp")
def on_while(owner, name, when):
    do = getattr(owner, name)
    def watched(self, *args, **kwargs):
        now["on"] = when(self, *args, **kwargs)
        try:
            return do(self, *args, **kwargs)
        finally:
            now["on"] = False
    setattr(owner, name, watched)
on_while(Promises, "_forward_and_backward", lambda self, *_: self.state.global_step == 1)
on_while(HeldOut, "figures", lambda self, step, *_, **__: step == 2 and not now.update(attempt=0, place=0))
on_while(HeldOut, "score", lambda self, step, *_, **__: step == 2 and not now.update(attempt=0, place=0, stride=11))
fall_back = OutOfMemory._fall_back
def again(self, *args):
    now["attempt"], now["place"] = now["attempt"] + 1, 0
    fall_back(self, *args)
OutOfMemory._fall_back = again
limits = dict(training="micro_batch_tokens", evaluation="evaluation_tokens", generation="generation_rows")
OutOfMemory._choose = lambda self, phase, part: (limits[phase], 1 if phase == "generation" else 16)
"""
SCARCE_RUN = [
    *("training.per_device_train_batch_size=2", "training.per_device_eval_batch_size=2"),
    *("training.gradient_checkpointing=true", *PARALLEL, *FEW, *TASK),
]
QUANTIZED_HERE = """
os.mkdir("here")
for name, source in dict(mixtral="nf4").items() | {(name, name) for name in ("run.yaml", "rows.jsonl")}:
    os.symlink(f"../{source}", f"here/{name}")
os.chdir("here")
"""
# In a factor of experts that this rank alone has.
DIVIDES_BY_ZERO = """
from expertune.train.promises import Promises
create = Promises.create_optimizer
def create_optimizer(self, *args, **kwargs):
    optimizer = create(self, *args, **kwargs)
    factor = next(each for name, each in self.model.named_parameters() if each.requires_grad and each.ndim == 3)
    def divide_by_zero(*args):
        if self.state.global_step == 1:
            factor.detach().view(-1)[:1].fill_(float("nan"))
    optimizer.register_step_post_hook(divide_by_zero)
    return optimizer
Promises.create_optimizer = create_optimizer
"""
DAMAGED = """
import pathlib, shutil
shutil.copytree("nf4", "damaged")
with next(pathlib.Path("damaged").glob("*.safetensors")).open("r+b") as file:
    file.seek(-9, 2)
    file.write(b"damage")
"""
KILLED_SAVING = """
from expertune.train import saving
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
gather = saving.states_of_all
def gather_once(*args, **kwargs):
    return die() if os.path.exists("killed/checkpoint-2") else gather(*args, **kwargs)
saving.states_of_all = gather_once
"""
TIMEOUTS = """
from expertune.distributed.parallel import ExpertParallel
init = ExpertParallel.__init__
def made(self, *args):
    init(self, *args)
    backends = [group._get_backend(torch.device("cpu")) for group in (self._peers, self._replicas)]
    print("timeouts", *(backend.options._timeout for backend in backends))
import torch
ExpertParallel.__init__ = made
"""
# The names of the files that a rank reads to verify a folder.
VERIFIED = """
from expertune.checkpoint import verified
hash_file = verified.hash_file
def hashed(path):
    print("verified", path.name)
    return hash_file(path)
verified.hash_file = hashed
"""


def jobs(budget: int) -> dict[str, list[str]]:
    return of_families(RANKS, *PARALLEL) | {
        "three": train(3, "uneven-3", [*FOUR, *PARALLEL, *UNEVEN], {rank: HELD.format(rank=rank) for rank in range(3)}),
        "three examples on four": train(4, "few-4", [*FOUR, *PARALLEL, *FEW]),
        "two by two": train(4, "mesh", [*FOUR, *PARALLEL, *TASK, "distributed.expert_parallel_size=2"], {3: TIMEOUTS}),
        "quantize": command(1, ["quantize", "mixtral", "nf4"]),
        "from the disk": train(2, "disk", ["model=nf4", *TWO, *PARALLEL, "placement=disk"], {0: VERIFIED, 1: VERIFIED}),
        "half": train(
            2, "half", ["model=nf4", *TWO, LONGER, *PARALLEL, "training.max_steps=2", f"memory_budget={budget}"]
        ),
        "damage": [DAMAGED],
        "damaged": train(2, "hurt", ["model=damaged", *TWO, *PARALLEL]),
        "two, back": back_to_step_2("mixtral-2", "two-one"),
        "two to one": train(1, "two-one", [*TWO, "--resume"]),
        "one, back": back_to_step_2("mixtral-1", "one-four"),
        "one to four": train(4, "one-four", [*ONE, *PARALLEL, "--resume"]),
        "other kind of folder": train(2, "kind", [*TWO, *PARALLEL], {1: QUANTIZED_HERE}),
        "not finite after an update": train(2, "divided", [*TWO, *PARALLEL], {1: DIVIDES_BY_ZERO}),
        "too many": train(5, "many", PARALLEL),
        "no multiple": train(3, "multiple", [*PARALLEL, "distributed.expert_parallel_size=2"]),
        "not by expert": train(2, "adafactor", [*TWO, *PARALLEL, "training.optim=adafactor"]),
        "not finite": train(2, "nan", [*TWO, *PARALLEL], {1: NOT_FINITE}),
        "full disk": train(2, "full", [*TWO, *PARALLEL], {0: FULL_DISK}),
        "scarce": train(2, "scarce", SCARCE_RUN, {rank: SCARCE_ANYWHERE.format(rank=rank) for rank in (0, 1)}),
        "killed": train(2, "killed", [*TWO, *PARALLEL], {1: KILLED_SAVING}),
        "killed, resumed": train(2, "killed", [*TWO, *PARALLEL, "--resume"]),
    }


@pytest.fixture(scope="module")
def place(one_process: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = Path(shutil.copytree(one_process, tmp_path_factory.mktemp("parallel") / "place"))
    return Place(folder, run_jobs(jobs(too_little_to_replicate(folder)), folder, BEFORE))


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_give_the_losses_and_the_adapter_of_one_process(place: Place, family: str) -> None:
    assert_one_process_agrees(place, family, RANKS[family])


@pytest.mark.slow
def test_the_other_number_of_ranks_gives_them_too(one_process: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(one_process, tmp_path / "place"))
    place = Place(folder, run_jobs(of_families(OTHER_RANKS, *PARALLEL), folder, BEFORE))
    for family, world_size in OTHER_RANKS.items():
        assert_one_process_agrees(place, family, world_size)


def assert_one_process_agrees(place: Place, family: str, world_size: int) -> None:
    run = f"{family}-{world_size}"
    assert place.statuses(run) == [0] * world_size, place.said(run)
    assert_same_result(place, f"{family}-1", run)
    one, several = (place.record(name)["preflight"] for name in (f"{family}-1", run))
    assert several["four_bit"] == one["four_bit"]
    assert several["learning"] == one["learning"]


def assert_same_files(place: Place, one: str, other: str) -> None:
    for file in ("adapter/adapter_model.safetensors", "checkpoint-4/optimizer.pt"):
        ours, theirs = ((place.folder / run / file).read_bytes() for run in (one, other))
        assert ours == theirs, file


@pytest.mark.parametrize("run", ["mixtral-2", "mesh"])
def test_answers_have_the_score_of_one_process(place: Place, run: str) -> None:
    for when in ("before", "after"):
        ours, theirs = (place.record(name)["task"][when] for name in ("mixtral-1", run))
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_experts_that_ranks_cannot_share_evenly_give_the_same_result(place: Place) -> None:
    assert place.statuses("three") == [0] * 3, place.said("three")
    assert_same_result(place, "uneven-1", "uneven-3")


def test_each_rank_holds_its_own_experts_and_their_factors(place: Place) -> None:
    bytes_of_one = set()
    for rank, owned in enumerate(([0, 1], [2], [3])):
        held, factors = json.loads((place.folder / f"held-{rank}.json").read_text(encoding="utf-8"))
        for experts, stacked, nbytes in held.values():
            assert (experts, stacked) == (owned, 2 * len(owned))
            bytes_of_one.add(nbytes / len(owned))
        assert {shape[0] for shape in factors.values()} == {len(owned)}
        assert len(factors) == 2 * 3 * len(held)
    assert len(bytes_of_one) == 1


def test_rank_without_examples_takes_part_with_its_experts(place: Place) -> None:
    assert place.statuses("three examples on four") == [0] * 4, place.said("three examples on four")
    assert_same_result(place, "few-1", "few-4")


def test_experts_that_pairs_of_ranks_share_give_the_same_result(place: Place) -> None:
    assert place.statuses("two by two") == [0] * 4, place.said("two by two")
    assert_same_result(place, "mixtral-1", "mesh")


def test_experts_that_each_rank_maps_from_its_part_of_a_file_give_the_same_result(place: Place) -> None:
    assert place.statuses("from the disk") == [0, 0], place.said("from the disk")
    assert place.record("disk")["placement"]["layers"] == {"disk": 2}
    assert_same_result(place, "mixtral-1", "disk")


def test_run_whose_processes_had_half_of_the_experts_each_is_opened_by_one_as_it_has_room_for_them(
    place: Place,
) -> None:
    assert place.statuses("half") == [0, 0], place.said("half")
    assert place.record("half")["placement"]["layers"] == {"device": 2}
    run = expertune.open_run(place.folder / "half")
    held = placement_of(run.model)
    assert held is not None
    assert set(held.locations.values()) == {"disk"}
    assert expertune.evaluate(run)["loss"] == pytest.approx(
        place.record("half")["eval"]["loss"][-1][1], abs=NOT_TOGETHER
    )


@pytest.mark.parametrize(("job", "started", "run"), [("two to one", 2, "two-one"), ("one to four", 1, "one-four")])
def test_run_is_resumed_by_another_number_of_processes_and_another_mode(
    place: Place, job: str, started: int, run: str
) -> None:
    assert set(place.statuses(job)) == {0}, place.said(job)
    assert "resuming from" in place.said(job)
    assert_same_result(place, f"mixtral-{started}", run)


def test_memory_that_runs_out_anywhere_on_one_rank_has_all_begin_again(place: Place) -> None:
    assert place.statuses("scarce") == [0, 0], place.said("scarce")
    assert_same_result(place, "few-1", "scarce")
    ours, theirs = (place.record(name)["task"]["after"] for name in ("few-1", "scarce"))
    assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    changes = place.record("scarce")["train"]["recoveries"]
    for during in ("training", "evaluation", "generation"):
        where = [change["error"][:9] for change in changes if change["during"] == during]
        assert {"on rank 0", "on rank 1"} == set(where)
        assert len(where) > 6


def test_rank_that_is_killed_while_states_are_gathered_leaves_no_checkpoint_and_the_run_resumes_to_the_same_bytes(
    place: Place,
) -> None:
    assert place.statuses("killed") == [2, -9]
    assert place.said("killed").count("error:") == 1
    assert "rank 1 of 2 ended without a word" in place.said("killed")
    assert place.statuses("killed, resumed") == [0, 0], place.said("killed, resumed")
    assert "resuming from killed/checkpoint-2" in place.said("killed, resumed")
    # Its first steps are taken a second time, by other processes, and its last are a resumed run's.
    assert_same_files(place, "mixtral-2", "killed")


def test_ranks_of_a_machine_read_each_file_of_a_folder_once_to_verify_it(place: Place) -> None:
    names = [
        [line.split()[1] for line in each.err.splitlines() if line.startswith("verified")]
        for each in place.ended["from the disk"]
    ]
    assert all(names)
    manifest = json.loads((place.folder / "nf4" / "expertune.json").read_text(encoding="utf-8"))
    assert sorted([*names[0], *names[1]]) == sorted(manifest["files"])


def test_groups_of_ranks_wait_as_long_as_the_run_file_says(place: Place) -> None:
    assert "timeouts 0:01:00 0:01:00" in place.ended["two by two"][3].err


def test_checkpoint_holds_the_states_of_all_experts(place: Place) -> None:
    one, two = (
        torch.load(place.folder / run / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        for run in ("mixtral-1", "mixtral-2")
    )
    assert one.keys() == two.keys()
    for number, state in one.items():
        torch.testing.assert_close(state, two[number], rtol=0, atol=1e-5)


REFUSED = {
    "too many": "distributed.experts: parallel shares 4 experts out to 5 processes",
    "no multiple": "distributed.expert_parallel_size is 2, and 3 processes are no multiple of it",
    "not by expert": "training.optim adafactor updates an expert by what it finds in others",
    "not finite": "rank 1: the loss became nan in step 2 on rows.jsonl",
    "other kind of folder": "Other than on rank 0 are rank 1: model folder",
    "not finite after an update": "the update of step 2 left weights that are not finite (base_model.",
    "full disk": "rank 0: full/.checkpoint-being-written",
    "damaged": "damaged: changed since it was written: layer-0",
}


@pytest.mark.parametrize("job", REFUSED)
def test_error_on_one_rank_ends_all_and_is_said_once(place: Place, job: str) -> None:
    assert set(place.statuses(job)) == {2}, place.said(job)
    said = place.said(job)
    assert said.count("error:") == 1, said
    assert "Traceback" not in said
    assert REFUSED[job] in " ".join(said.split())


@pytest.mark.parametrize("run", ["many", "multiple"])
def test_number_of_processes_that_does_not_fit_leaves_nothing_behind(place: Place, run: str) -> None:
    assert not Path(place.folder / run).exists()
