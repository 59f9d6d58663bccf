"""The launcher itself: a rank that is killed ends the job, and the job resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from expertune.run.record import RunRecord
from tests.distributed.test_replicated import AT_STEP, DROPOUT, KILLED, TWO, write_place
from tests.processes import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]


def environment() -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def torchrun(place: Path, *command: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command on two ranks; what is left of it, and the seconds that it took."""
    started = time.monotonic()
    done = subprocess.run(
        [*TORCHRUN, "--standalone", *command],
        cwd=place,
        env=environment(),
        capture_output=True,
        text=True,
    )
    return done, time.monotonic() - started


@pytest.mark.slow
def test_job_of_torchrun_ends_with_a_killed_rank_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    place = write_place(tmp_path / "place")
    (place / "killed.py").write_text(
        "import os, signal, sys, time\nfrom expertune import cli\n"
        f"if os.environ['RANK'] == '1':\n    exec({KILLED!r})\ncli.main()\n",
        encoding="utf-8",
    )
    train = ["train", "run.yaml", *DROPOUT]
    done, _ = torchrun(place, "-m", "expertune", *train, "output_dir=whole")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "whole\n"

    done, seconds = torchrun(place, "killed.py", *train, "output_dir=killed")
    assert done.returncode != 0
    assert seconds < 60
    assert done.stderr.count("expertune: error:") == 1, done.stderr
    assert "rank 1 of 2 ended without a word" in done.stderr
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in done.stderr  # torchrun's own words

    done, _ = torchrun(place, "-m", "expertune", *train, "output_dir=killed", "--resume")
    assert done.returncode == 0, done.stderr
    ours, theirs = ((place / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("killed", "whole"))
    assert ours == theirs


# Rank 1 takes its time in the third step, in which rank 0 waits for it: of the two only one is where it can be stopped.
SLOW = AT_STEP.format(step=3, do="open('slow', 'w').close(), time.sleep(60)")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("replicate", signal.SIGTERM),
        ("shard", signal.SIGTERM),
        ("parallel", signal.SIGTERM),
        ("parallel", signal.SIGINT),
    ],
)
def test_job_of_torchrun_that_is_stopped_says_so_once_and_resumes(
    mode: str, number: signal.Signals, tmp_path: Path
) -> None:
    place = write_place(tmp_path / "place")
    (place / "slow.py").write_text(
        f"import os, time\nfrom expertune import cli\nif os.environ['RANK'] == '1':\n    exec({SLOW!r})\ncli.main()\n",
        encoding="utf-8",
    )
    train = ["train", "run.yaml", *TWO, f"distributed.experts={mode}", "output_dir=stopped"]
    job = subprocess.Popen(
        [*TORCHRUN, "--standalone", "slow.py", *train],
        cwd=place,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        while job.poll() is None and not (place / "slow").exists():
            time.sleep(0.1)
        time.sleep(1)  # rank 0 waits by then
        if number == signal.SIGINT:
            os.killpg(job.pid, number)  # as a terminal does
        else:
            job.send_signal(number)  # which torchrun passes on
        said = job.communicate(timeout=60)[1]
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert said.count("expertune: ") == 1, said
    assert "expertune: interrupted" in said
    assert "--resume` continues from checkpoint-2" in said
    assert RunRecord.load(place / "stopped")["run"]["status"] == "interrupted"

    done, _ = torchrun(place, "-m", "expertune", *train, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resuming from stopped/checkpoint-2" in done.stderr
