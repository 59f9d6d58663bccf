"""Threads wait asleep and are as many as a process's share of the cores: said before torch is imported."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from expertune import doctor
from expertune.kernels import limits, threads
from tests.processes import run_copies

V2 = "30 23 0:27 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n"
    "32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
    "33 31 0:30 {root} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
)
POD = "/kubepods/burstable/pod1/container"


@pytest.fixture
def machine(tmp_path: Path) -> Callable[[dict[str, str]], Path]:
    """A root folder with some files of /proc and /sys."""

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("files", "share"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2}, None),
        ({"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2, "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        # The service may use 4 cores' time, the slice around it 2.
        (
            {
                "proc/self/cgroup": "0::/a.slice/b.service\n",
                "proc/self/mountinfo": V2,
                "sys/fs/cgroup/a.slice/cpu.max": "200000 100000",
                "sys/fs/cgroup/a.slice/b.service/cpu.max": "400000 100000",
            },
            2.0,
        ),
        # Version 1 in a container that sees its own folder as the mount, and the host's path.
        (
            {
                "proc/self/cgroup": f"4:memory:{POD}\n3:cpu,cpuacct:{POD}\n",
                "proc/self/mountinfo": V1.format(root=POD),
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            3.0,
        ),
        # Version 1 on the host.
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/jobs/7\n",
                "proc/self/mountinfo": V1.format(root="/"),
                "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/jobs/7/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/jobs/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
    ],
    ids=["no groups", "v2, no limit file", "v2", "v2, max", "v2, nested", "v1, container", "v1, nested"],
)
def test_share_of_a_control_group_is_the_least_of_its_levels(
    files: dict[str, str], share: float | None, machine: Callable[[dict[str, str]], Path]
) -> None:
    assert limits.cgroup_share(machine(files)) == share


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2}, 2**60),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                "proc/self/mountinfo": V2,
                "sys/fs/cgroup/memory.max": "max",
                "sys/fs/cgroup/memory.current": "900",
                "sys/fs/cgroup/a/memory.max": "1000\n",
                "sys/fs/cgroup/a/memory.current": "700\n",
                "sys/fs/cgroup/a/memory.stat": "anon 550\ninactive_file 100\nactive_file 50\n",
            },
            450,
        ),
        (
            {
                "proc/self/cgroup": f"4:memory:{POD}\n3:cpu,cpuacct:{POD}\n",
                "proc/self/mountinfo": V1.format(root=POD),
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "1000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1100",
                "sys/fs/cgroup/memory/memory.stat": "active_file 5\ntotal_active_file 150\ntotal_inactive_file 0\n",
            },
            50,
        ),
    ],
)
def test_memory_is_what_the_containers_limit_leaves_where_the_host_has_more(
    machine: Callable[[dict[str, str]], Path], files: dict[str, str], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**60))
    assert limits.available_memory(machine(files)) == left


def test_cores_are_physical_ones_of_the_affinity_and_within_the_share(
    machine: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    # CPU n and n + 4 are one core.
    topology = {f"sys/devices/system/cpu/cpu{n}/topology/core_cpus_list": f"{n % 4},{n % 4 + 4}" for n in range(8)}
    root = machine(topology | {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2})
    assert threads.usable_cores(root) == 4
    for limit, cores in (("250000 100000", 3), ("20000 100000", 1), ("800000 100000", 4)):
        machine({"sys/fs/cgroup/cpu.max": limit})
        assert threads.usable_cores(root) == cores
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 4}, raising=False)
    assert threads.usable_cores(root) == 1


@pytest.mark.parametrize(
    ("own", "share", "expected"),
    [
        ({}, None, {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1"}),
        ({}, 2, {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1", "OMP_NUM_THREADS": "2"}),
        ({}, 16, {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1"}),
        ({"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "5"}, 2, {}),
        ({"GOMP_SPINCOUNT": "100"}, None, {}),
        ({"KMP_BLOCKTIME": "infinite", "LRU_CACHE_CAPACITY": "7"}, 1, {"OMP_NUM_THREADS": "1"}),
    ],
)
def test_what_is_said_to_openmp_leaves_the_users_own_settings(
    own: dict[str, str], share: int | None, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.os, "environ", dict(own))
    monkeypatch.setattr(threads, "cores_by_affinity", lambda *_: 8)
    monkeypatch.setattr(threads, "cgroup_share", lambda *_: share)
    threads.prepare_threads()
    assert threads.os.environ == own  # torch is here already: too late
    monkeypatch.delitem(sys.modules, "torch")
    threads.prepare_threads()
    caches = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}
    assert threads.os.environ == caches | own | expected


SPY = """
import os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), file=sys.__stdout__, flush=True)
            raise SystemExit(0)
sys.meta_path.insert(0, Spy())
for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
    os.environ.pop(name, None)
"""
STARTS = {
    "expertune doctor": "import sys; sys.argv[1:] = ['doctor']; from expertune.cli import main; main()",
    "python -m expertune doctor": "import runpy, sys; sys.argv[1:] = ['doctor']; "
    "runpy.run_module('expertune', run_name='__main__')",
    "expertune.prepare_threads()": "import expertune; expertune.prepare_threads(); expertune.finetune",
    "expertune.finetune": "import expertune; expertune.finetune",
}


def test_commands_say_it_before_torch_is_imported_and_a_library_call_only_when_it_is_asked_to(tmp_path: Path) -> None:
    ended = run_copies("import typer", [SPY + code for code in STARTS.values()], tmp_path)
    seen = dict(zip(STARTS, (process.out.strip() for process in ended), strict=True))
    assert seen == dict.fromkeys(STARTS, "30000") | {"expertune.finetune": "None"}


@pytest.mark.parametrize(
    ("count", "waiting", "advice"),
    [
        (64, {"OMP_WAIT_POLICY": "PASSIVE"}, "set OMP_NUM_THREADS=2"),
        (2, {}, "set GOMP_SPINCOUNT=30000"),
        (2, {"GOMP_SPINCOUNT": "infinite", "OMP_WAIT_POLICY": "passive"}, "set GOMP_SPINCOUNT=30000"),
        (2, {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "200"}, "and KMP_BLOCKTIME=1"),
        (2, {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": "active"}, "set GOMP_SPINCOUNT=30000"),
        (2, {"GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1"}, ""),
        (2, {"OMP_WAIT_POLICY": "passive"}, ""),
        (1, {}, ""),
    ],
)
def test_doctor_tells_of_threads_that_will_be_slow(
    count: int, waiting: dict[str, str], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setattr(doctor, "cgroup_share", lambda: 1.5)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(os, "environ", waiting)
    finding = doctor._threads()
    assert finding["value"].startswith(f"{count} on 2 cores (this process's share of time: 1.5)")
    assert finding["status"] == ("warning" if advice else "ok")
    assert advice in finding["advice"]
