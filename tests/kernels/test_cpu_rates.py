"""How fast a CPU is, is measured while nothing else keeps it busy; what was measured otherwise soon is once more."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch

from expertune.kernels import cpu_rates, native
from expertune.kernels.amounts import FLOAT32
from expertune.kernels.cpu_rates import CpuRates

THREADS = 2


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where rates are kept, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_rates, "cgroup_share", lambda: None)
    monkeypatch.setattr(cpu_rates, "_PRODUCT", (8, 8, 8))
    monkeypatch.setattr(cpu_rates, "_COPIED_BYTES", 1024)
    return tmp_path / "expertune"


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CpuRates]:
    """Rates as a new process finds them, where runs take and lose such times."""

    def find(*runs: tuple[float, float]) -> CpuRates:
        following = cycle(runs)
        monkeypatch.setattr(cpu_rates, "_timed", lambda run: next(following))
        return cpu_rates.cpu_rates.__wrapped__(FLOAT32, THREADS)

    return find


def test_rates_of_a_free_machine_are_measured_once(rates, folder):
    first = rates((0.1, 0.0))
    assert not first.was_busy
    assert len(list(folder.glob("rates-*.json"))) == 1
    assert rates((1.0, 0.0)) == first


def test_measuring_rates_leaves_the_programs_draws_as_they_were(rates):
    before = torch.get_rng_state()
    rates((0.1, 0.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_runs_that_another_program_disturbed_do_not_count(rates):
    found = rates((0.1, 0.02), (0.8, 0.9))
    assert not found.was_busy
    assert found.flops_per_second == 2 * 8**3 / 0.1


def test_rates_of_a_busy_machine_are_the_fastest_seen_and_are_measured_again_later(rates, folder, monkeypatch):
    monkeypatch.setattr(cpu_rates, "_MOST_SECONDS", 0.01)
    busy = rates((0.8, 0.5), (0.4, 0.5))
    assert busy.was_busy
    assert rates((0.1, 0.0)) == busy, "a few minutes it serves"
    now = busy.measured_at + 900
    monkeypatch.setattr(cpu_rates.time, "time", lambda: now)
    free = rates((0.1, 0.0))
    assert not free.was_busy
    assert free.flops_per_second == pytest.approx(4 * busy.flops_per_second)


@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
def test_rate_of_integers_is_measured_once_and_found_only_while_the_library_is_in_use(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(cpu_rates, "_PRODUCT", (8, 128, 64))
    monkeypatch.setattr(cpu_rates, "_timed", lambda run: (run(), (0.1, 0.0))[1])
    measure, before = cpu_rates.integer_rate.__wrapped__, torch.get_rng_state()
    found = measure(THREADS)
    assert torch.equal(torch.get_rng_state(), before), "what a program draws is no matter of what was measured"
    assert found.flops_per_second == 2 * 2 * 8 * 128 * 64 / 0.1
    assert not found.was_busy
    assert len(list(folder.glob("rates-*.json"))) == 1
    monkeypatch.setattr(cpu_rates, "_timed", lambda run: (1.0, 0.0))
    assert measure(THREADS) == found
    monkeypatch.setattr(cpu_rates, "_NATIVE", tmp_path)
    assert measure(THREADS).flops_per_second == found.flops_per_second / 10, "other sources may be faster or slower"
    monkeypatch.setenv("EXPERTUNE_NATIVE", "0")
    assert measure(THREADS) is None


def test_rate_of_integers_is_none_where_the_library_cannot_be_built(monkeypatch, folder):
    monkeypatch.setattr(native, "available", lambda: False)
    assert cpu_rates.integer_rate.__wrapped__(THREADS) is None
    assert not list(folder.glob("rates-*.json"))


@pytest.mark.parametrize(("lost", "is_busy"), [(0.5, False), (0.7, True)])
def test_a_container_that_waits_for_its_own_share_is_not_busy(rates, monkeypatch, lost, is_busy):
    monkeypatch.setattr(cpu_rates, "_MOST_SECONDS", 0.01)
    monkeypatch.setattr(cpu_rates, "cgroup_share", lambda: THREADS / 2)
    assert rates((0.1, lost)).was_busy is is_busy


def test_a_thread_that_waits_for_a_core_is_time_lost(tmp_path, monkeypatch):
    (tmp_path / "7").mkdir()
    waits = tmp_path / "7" / "schedstat"
    monkeypatch.setattr(cpu_rates, "_THREADS", tmp_path)
    waits.write_text("0 1000000000 3")
    seconds, lost = cpu_rates._timed(lambda: waits.write_text("0 3000000000 9"))
    assert lost == pytest.approx(2 / seconds)
    # A system that does not tell: nothing counts as lost.
    waits.unlink()
    assert cpu_rates._timed(lambda: None)[1] == 0
