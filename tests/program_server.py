"""Makes the imports that it is given as an argument, and runs each program that it is sent in a copy of itself.

A program is a line of JSON on stdin (see `run`); its exit status is a line on stdout, once it has ended. The server
ends when its stdin does. It starts no thread: a copy may wait forever for what a thread that was not copied holds.
"""

import gc
import json
import os
import sys
import traceback
from typing import Any


def serve(names: dict[str, Any]) -> None:
    """Run programs until there are no more; they have the names that the imports have made."""
    # What the imports made stays, and is not to be looked through by every program that collects garbage.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line), names)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run(program: dict[str, Any], names: dict[str, Any]) -> None:
    """In the copy: its own streams, folder, arguments and environment, and then its code."""
    for stream, path in enumerate((os.devnull, *program["output"])):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC if stream else os.O_RDONLY)
        os.dup2(opened, stream)
        os.close(opened)
    os.chdir(program["folder"])
    os.environ.clear()
    os.environ.update(program["environment"])
    sys.argv[:] = ["-c", *program["arguments"]]
    status: Any = 0
    try:
        exec(program["code"], names)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # taking all modules apart would cost as much as a short run


if __name__ == "__main__":
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(sys.argv[1], names)
    serve(names)
