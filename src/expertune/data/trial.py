"""A template is tried on one example in a process of its own, where neither time nor memory can run out.

Jinja's sandbox keeps a template from reaching Python, but not from counting for ever: nested loops, `10 ** 10 ** 10`
(which Jinja works out while it compiles) and `"x" * 10 ** 10` hold a process in one operation that nothing interrupts.
A template may have come with a downloaded model or run file, so it is asked before it is used.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from expertune.errors import ConfigError

SECONDS = 5
"""Processor time that a template may take for one example; one takes milliseconds."""

_MEMORY = 2**30
_OUT_OF_MEMORY = 3


def try_template(name: str, render: Callable[[], object]) -> None:
    """Compile and render once, within bounds; what else goes wrong is for the caller to find, in its own words.

    Args:
        name: how the error calls the template.
        render: makes the template and renders an example with it.

    Raises:
        ConfigError: it takes more than `SECONDS` of processor time, or a GiB of memory, or crashes.
    """
    if sys.platform != "linux":
        return
    import resource

    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that a child does not have; this one renders, starts nothing and ends.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 0
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
            render()
        except BaseException as error:
            code = _OUT_OF_MEMORY if _ran_out_of_memory(error) else 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status == 0:
        return
    ended = os.waitstatus_to_exitcode(status)
    what = "a GiB of memory" if ended == _OUT_OF_MEMORY else f"{SECONDS} s of processor time"
    if -ended not in (0, -_OUT_OF_MEMORY, signal.SIGXCPU, signal.SIGKILL):
        what = f"what Python bears (it ended by signal {-ended})"
    raise ConfigError(f"template {name}: one example takes more than {what}; look at its loops, powers and repetitions")


def _ran_out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__context__
    return False
