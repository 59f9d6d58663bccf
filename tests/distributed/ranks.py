"""Commands on several ranks, started as torchrun would, all in copies of one process."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.processes import Ended, run_program

# A copy of the process that has made the imports reads what every rank would read, and is copied for each rank.
_JOBS = """
import gc, json, os, signal, socket, sys, time, traceback
from expertune import api, cli
{before}
gc.freeze()
names = dict(cli=cli, os=os, signal=signal, sys=sys, time=time)
for number, job in enumerate(json.loads(sys.argv[1])):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank, code in enumerate(job):
        pid = os.fork()
        if pid == 0:
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{{number}}.{{rank}}.{{name}}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            if len(job) > 1:
                os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(len(job)),
                                   MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            status = 0
            try:
                exec(code, names)
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # taking all modules apart would cost as much as the run
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    open(f"{{number}}.json", "w").write(json.dumps(statuses))
"""


def command(world_size: int, arguments: Sequence[object], before: Mapping[int, str] | None = None) -> list[str]:
    """The code of each rank for a command.

    Args:
        world_size: how many ranks; of one nothing says that it is one of several.
        arguments: of the command.
        before: what some ranks run first, by rank; it may append to `extra`, which are more arguments.
    """
    run = f"sys.argv = ['expertune', *{[str(each) for each in arguments]!r}, *extra]\ncli.main()"
    return [f"extra = []\n{(before or {}).get(rank, '')}\n{run}" for rank in range(world_size)]


def run_jobs(jobs: Mapping[str, Sequence[str]], folder: Path, before: str = "") -> dict[str, list[Ended]]:
    """Run jobs one after the other; what each rank of each has left, by the job's name.

    Args:
        jobs: code for each rank, by name.
        folder: where they run, and where their output is kept.
        before: what would otherwise be read or computed by every rank; it must start no thread.
    """
    done = run_program(_JOBS.format(before=before), json.dumps(list(jobs.values())), folder=folder)
    assert done.status == 0, done.err[-4000:]
    return {name: _ended(folder, number) for number, name in enumerate(jobs)}


def _ended(folder: Path, number: int) -> list[Ended]:
    statuses = json.loads((folder / f"{number}.json").read_text(encoding="utf-8"))
    return [
        Ended(status, *((folder / f"{number}.{rank}.{name}").read_text(encoding="utf-8") for name in ("out", "err")))
        for rank, status in enumerate(statuses)
    ]
