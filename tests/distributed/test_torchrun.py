"""The launcher itself: a rank that is killed ends the job, and the job resumes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.test_replicated import DROPOUT, KILLED, write_place
from tests.processes import ROOT

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]


def torchrun(place: Path, *command: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Run a command on two ranks; what is left of it, and the seconds that it took."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    started = time.monotonic()
    done = subprocess.run(
        [*TORCHRUN, "--standalone", *command],
        cwd=place,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
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
