"""What this machine has, and what of it a run will use: versions, devices, dtype, hub, trackers, known pitfalls.

Nothing here allocates on a device, and the hub is asked only whether it answers.
"""

import ctypes
import importlib.metadata
import importlib.util
import platform
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import psutil
import torch
from packaging.requirements import Requirement
from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from expertune.errors import first_line
from expertune.kernels import gpu, native
from expertune.kernels.cache import find_cache
from expertune.kernels.cpu import cpu_instruction_sets
from expertune.kernels.limits import available_memory, cgroup_share
from expertune.kernels.threads import spins_long, usable_cores
from expertune.placement.device import default_device, resolve_compute_dtype
from expertune.text import format_size

Status = Literal["ok", "info", "warning", "error"]

_TRACKERS = ("wandb", "tensorboard", "trackio")
_TABLE_WIDTH = 72

# A function that bitsandbytes' library has, whatever devices it is for.
_IN_EVERY_LIBRARY = "cquantize_blockwise_cpu_fp32"

# How long the hub is waited for.
_HUB_SECONDS = 3
_STYLES = {"ok": "green", "info": "dim", "warning": "yellow", "error": "bold red"}


class Finding(TypedDict):
    """One thing that was looked at.

    Keys:
        topic: `packages`, `device`, `hub`, `trackers` or `pitfalls`.
        name: what was looked at.
        value: what was found, as text.
        status: `error` keeps a run from working, `warning` may.
        advice: what to do; empty where there is nothing to do.
    """

    topic: str
    name: str
    value: str
    status: Status
    advice: str


def collect() -> list[Finding]:
    """Look at everything. Finds errors, raises none."""
    return [*_packages(), *_native_library(), *_devices(), *_hub(), *_trackers(), *_pitfalls()]


@dataclass
class _Findings:
    """A table, with advice under the finding that needs it; on a narrow terminal one finding below the other."""

    findings: list[Finding]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if options.max_width >= _TABLE_WIDTH:
            yield _table(self.findings)
            return
        topic = ""
        for finding in self.findings:
            if finding["topic"] != topic:
                topic = finding["topic"]
                yield Text(topic, style="dim")
            yield Padding(Text(f"{finding['name']}  {finding['status']}"), (0, 0, 0, 2))
            yield Padding(_value(finding), (0, 0, 0, 4))


def render(findings: list[Finding]) -> RenderableType:
    """The findings for `rich.console.Console.print`."""
    return _Findings(findings)


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    topic = ""
    for finding in findings:
        if topic and finding["topic"] != topic:
            table.add_row()
        status = Text(finding["status"], style=_STYLES[finding["status"]])
        table.add_row("" if finding["topic"] == topic else finding["topic"], finding["name"], status, _value(finding))
        topic = finding["topic"]
    return table


def _value(finding: Finding) -> Text:
    text = Text(finding["value"])
    if finding["advice"]:
        text.append(f"\n{finding['advice']}", style=_STYLES[finding["status"]])
    return text


def _find(topic: str, name: str, value: str, status: Status = "ok", advice: str = "") -> Finding:
    return Finding(topic=topic, name=name, value=value, status=status, advice=advice)


def _packages() -> Iterator[Finding]:
    yield _find("packages", "python", platform.python_version())
    try:
        own, requirements = importlib.metadata.version("expertune"), importlib.metadata.requires("expertune") or []
    except importlib.metadata.PackageNotFoundError:
        yield _find("packages", "expertune", "not installed", "error", "install it: pip install expertune")
        return
    yield _find("packages", "expertune", own)
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _package(requirement)


def _package(requirement: Requirement) -> Finding:
    fix = f"pip install '{requirement.name}{requirement.specifier}'"
    found = _version(requirement.name)
    if found is None:
        return _find("packages", requirement.name, "missing", "error", fix)
    if not requirement.specifier.contains(found, prereleases=True):
        return _find("packages", requirement.name, f"{found}, needs {requirement.specifier}", "error", fix)
    return _find("packages", requirement.name, found)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native_library() -> Iterator[Finding]:
    """bitsandbytes reads and writes NF4 through a library of its own, one for each CUDA release."""
    name, again = "bitsandbytes library", "reinstall bitsandbytes"
    if _version("bitsandbytes") is None:
        return  # which is a finding already
    library: ctypes.CDLL | None
    try:
        spec = importlib.util.find_spec("bitsandbytes")
        if spec is None or spec.origin is None:  # nothing there, or a folder without the package's own code
            missing = "not there: the package is installed, but cannot be imported"
            yield _find("packages", name, missing, "error", again)
            return
        if (own := _library_of_cpus(Path(spec.origin).parent)) is not None:
            library, what = ctypes.CDLL(str(own)), "loads, CPU only (the package around it was not imported)"
        else:
            library, what = _imported_library()
    except Exception as error:  # whatever an import of a broken installation raises is the finding
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        yield _find("packages", name, f"does not load: {kind}{error}", "error", again)
        return
    if library is None:
        yield _find("packages", name, "does not load", "error", "see: python -m bitsandbytes")
    elif not hasattr(library, _IN_EVERY_LIBRARY):
        yield _find("packages", name, f"loads, but has no {_IN_EVERY_LIBRARY}", "error", again)
    else:
        yield _find("packages", name, what)


def _imported_library() -> tuple[ctypes.CDLL | None, str]:
    """The library that bitsandbytes has loaded; None where it has put another object in its place."""
    from bitsandbytes.cextension import lib

    library = vars(lib).get("_lib")
    what = "loaded, with CUDA" if getattr(lib, "compiled_with_cuda", False) else "loaded, without CUDA"
    return (library if isinstance(library, ctypes.CDLL) else None), what


def _library_of_cpus(folder: Path) -> Path | None:
    """The file that bitsandbytes loads where there is nothing but a CPU; None where it chooses among others.

    Of releases 0.50, whose import takes twice as long as torch's: it imports torch's compiler. Another release that has
    no file of this name is imported.
    """
    suffix = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
    path = folder / f"libbitsandbytes_cpu{suffix}"
    has_other = torch.cuda.is_available() or torch.xpu.is_available() or torch.version.hip
    return path if path.is_file() and not has_other else None


def _devices() -> Iterator[Finding]:
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"capability {properties.major}.{properties.minor}"
        value = f"{properties.name}, {format_size(properties.total_memory)}, {capability}"
        yield _find("device", f"cuda:{index}", value)
    if not torch.cuda.is_available():
        build = torch.version.cuda or torch.version.hip
        value = f"none (torch is built for {build})" if build else "none (torch is built for CPUs)"
        yield _find("device", "cuda", value, "info")
    elif (triton := _version("triton")) is not None:
        yield _find("device", "triton", triton)
    if torch.cuda.is_available() and (reason := gpu.unavailable(torch.device("cuda", torch.cuda.current_device()))):
        advice = "experts are computed one by one by torch instead, at a fraction of the speed"
        yield _find("device", "GPU kernels", f"none: {reason}", "warning", advice)
    yield _find("device", "cpu", ", ".join(cpu_instruction_sets()) or "no vector extensions known")
    yield _threads()
    yield _find(
        "device",
        "host memory",
        f"{format_size(psutil.virtual_memory().total)}, {format_size(available_memory())} available",
    )
    library = native.status()
    if library.library is not None:
        yield _find("device", "native kernels", "in use on the CPU")
    else:
        advice = "products on the CPU run by torch and bitsandbytes instead, at a fraction of the speed"
        yield _find("device", "native kernels", f"none: {library.reason}", "warning", advice)
    folder, reason = find_cache()
    if reason:
        advice = "what is built and measured there may be built and measured again; fix that, or set XDG_CACHE_HOME"
        yield _find("device", "cache", f"{folder}, because {reason}", "warning", advice)
    else:
        yield _find("device", "cache", str(folder))
    device = default_device()
    dtype = str(resolve_compute_dtype("auto", device)).removeprefix("torch.")
    yield _find("device", "a run takes", f"{device}, products in {dtype} (quantization.compute_dtype: auto)")


def _threads() -> Finding:
    """How many threads matrix products use, of how many cores, and how they wait for each other."""
    threads, cores, share = torch.get_num_threads(), usable_cores(), cgroup_share()
    allowed = f"{cores} cores" + ("" if share is None else f" (this process's share of time: {share:g})")
    value = f"{threads} on {allowed}, waiting {'awake' if spins_long() else 'asleep, at most after a short spin'}"
    if threads > cores:
        advice = f"more threads than cores wait for each other; set OMP_NUM_THREADS={cores} before torch is imported"
        return _find("device", "threads", value, "warning", advice)
    if threads > 1 and spins_long():
        advice = (
            "beside other work steps may take ten times as long; set GOMP_SPINCOUNT=30000 and KMP_BLOCKTIME=1 before "
            "torch is imported"
        )
        return _find("device", "threads", value, "warning", advice)
    return _find("device", "threads", value)


def _hub() -> Iterator[Finding]:
    try:
        from huggingface_hub import constants
    except ImportError:
        return
    offline = "offline (HF_HUB_OFFLINE is set): models come from local folders and the cache"
    yield _find("hub", "mode", offline if constants.HF_HUB_OFFLINE else "online", "info")
    if not constants.HF_HUB_OFFLINE:
        yield _answer(constants.ENDPOINT)
    yield _find("hub", "cache", str(constants.HF_HUB_CACHE), "info")


def _answer(endpoint: str) -> Finding:
    """Whether the hub answers, by its client, so that proxies and a mirror (HF_ENDPOINT) are taken as a run takes them.

    In a thread: the client's time limits leave out the look-up of the name, which may take minutes without a network.
    """
    found: list[str] = []
    reasons: list[str] = []

    def ask() -> None:
        from huggingface_hub.utils import get_session

        started = time.monotonic()
        try:
            # Any answer will do, a refusal too: it comes from there.
            get_session().head(endpoint, timeout=_HUB_SECONDS)
            found.append(f"{endpoint} answers, in {1000 * (time.monotonic() - started):.0f} ms")
        except Exception as error:  # of the client's many kinds, each is the finding
            reasons.append(first_line(error))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_HUB_SECONDS + 1)
    if found:
        return _find("hub", "connection", _without_login(found[0]))
    reason = reasons[0] if reasons else f"nothing within {_HUB_SECONDS} s"
    advice = "models come from local folders and the cache; HF_HUB_OFFLINE=1 keeps a run from waiting for the hub"
    value = _without_login(f"{endpoint} does not answer ({reason})")
    return _find("hub", "connection", value, "warning", advice)


def _without_login(text: str) -> str:
    """A text without the user and the password in its addresses: findings are sent to others."""
    return re.sub(r"://[^/\s]*@", "://", text)


def _trackers() -> Iterator[Finding]:
    for name in _TRACKERS:
        found = _version(name)
        yield _find("trackers", name, found or "not installed", "ok" if found else "info")


def _pitfalls() -> Iterator[Finding]:
    """What has gone wrong on other machines and shows only later."""
    if "avx512_bf16" in cpu_instruction_sets() and importlib.util.find_spec("kernels") is not None:
        yield _find(
            "pitfalls",
            "package kernels",
            "on this CPU bitsandbytes tries to download a kernel from the hub when it is imported",
            "warning",
            "set HF_HUB_OFFLINE=1, or pip uninstall kernels",
        )
    total = psutil.virtual_memory().total
    if torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory > total:
        yield _find(
            "pitfalls",
            "host memory",
            "less than the device's; paged optimizers and checkpoints need room on the host",
            "warning",
            "watch host memory during the first save",
        )
