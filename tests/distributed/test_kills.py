"""A rank that is killed at each phase of a run that shares its experts out: one message, and `--resume` goes on."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_jobs
from tests.distributed.test_parallel import PARALLEL, assert_same_files
from tests.distributed.test_replicated import BEFORE, TASK, TWO, Place, train, write_place

# In each phase a function that a rank does not come back from, and at which of its calls.
PHASES = {
    "loading": ("expertune.checkpoint.loader", "Loader.stream", 1),
    "preflight, forward": ("expertune.experts.dispatch", "Dispatch.send", 2),
    "preflight, backward": ("expertune.experts.dispatch", "Dispatch._back", 6),
    "training, forward": ("expertune.experts.dispatch", "Dispatch.give_back", 50),
    "training, backward": ("expertune.experts.dispatch", "Dispatch._back", 62),
    "gradients": ("expertune.train.exchange", "Exchange.average_gradients", 3),
    "evaluation": ("expertune.evaluation.held_out", "HeldOut.figures", 2),
    "answers": ("expertune.evaluation.held_out", "HeldOut.score", 2),
    "checkpoint": ("expertune.train.saving", "states_of_all", 2),
    "random states": ("expertune.train.saving", "gather_files", 2),
    "adapter": ("expertune.api", "write_adapter", 1),
    "summary": ("expertune.api", "peak_memory_bytes", 1),
}
OF_RANK_0 = {
    "sealing": ("expertune.train.saving", "seal", 2),
    "publishing": ("expertune.train.saving", "publish", 2),
}
KILLED = """
import importlib
*owner, name = {attribute!r}.split(".")
owner = getattr(importlib.import_module({module!r}), *owner) if owner else importlib.import_module({module!r})
do, calls = getattr(owner, name), []
def die(*args, **kwargs):
    calls.append(name)
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGKILL)
    return do(*args, **kwargs)
setattr(owner, name, die)
"""
CASES = [(phase, rank) for rank in (0, 1) for phase in (PHASES if rank else PHASES | OF_RANK_0)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = write_place(tmp_path_factory.mktemp("kills") / "place")
    arguments = [*TWO, *PARALLEL, *TASK]
    jobs = {"whole": train(2, "whole", arguments)}
    for number, (phase, rank) in enumerate(CASES):
        module, attribute, call = (PHASES | OF_RANK_0)[phase]
        killed = KILLED.format(module=module, attribute=attribute, call=call)
        jobs[f"{phase} {rank}"] = train(2, f"run-{number}", arguments, {rank: killed})
        jobs[f"{phase} {rank}, resumed"] = train(2, f"run-{number}", [*arguments, "--resume"])
    return Place(folder, run_jobs(jobs, folder, BEFORE))


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "rank"), CASES)
def test_killed_rank_ends_the_other_with_one_message_and_the_run_resumes_to_the_same_bytes(
    place: Place, phase: str, rank: int
) -> None:
    job = f"{phase} {rank}"
    assert sorted(place.statuses(job)) == [-9, 2], place.said(job)
    assert place.said(job).count("error:") == 1, place.said(job)
    assert f"rank {rank} of 2 ended without a word" in place.said(job)
    run = Path(f"run-{CASES.index((phase, rank))}")
    assert place.statuses(f"{job}, resumed") == [0, 0], place.said(f"{job}, resumed")
    assert_same_files(place, "whole", str(run))
