"""The drivers of the benchmarks' peers, as far as they go without the peers and without a GPU."""

import argparse
import importlib

import pytest
import torch
from benchmarks.peers import grouped_nf4_gemm as kernels
from benchmarks.peers import processes
from benchmarks.step import PEERS, _peers

# Their own environment has it; under ours it only has to be importable.
MODULES = sorted({module for module, _ in processes.STACKS.values()})


@pytest.mark.parametrize("module", MODULES)
def test_every_driver_imports_without_its_peer(module: str) -> None:
    assert callable(importlib.import_module(f"benchmarks.peers.{module}").build)


@pytest.mark.parametrize("name", processes.GPU_STACKS)
def test_a_gpu_driver_says_in_one_line_what_is_missing(name: str) -> None:
    module, _ = processes.STACKS[name]
    with pytest.raises(SystemExit, match=r"^[^\n]*(not installed|needs a CUDA GPU)[^\n]*$"):
        importlib.import_module(f"benchmarks.peers.{module}").build(argparse.Namespace(device="cpu"))


def test_the_layers_kernels_say_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("a machine with a GPU may have everything")
    problem = kernels.missing()
    assert problem is not None
    assert "\n" not in problem


def test_the_cpu_benchmark_has_no_gpu_peers_unless_they_are_asked_for() -> None:
    assert PEERS == ("legacy", "tutorial", "stock5")
    assert _peers(argparse.Namespace(device="cpu", peers=None)) == list(PEERS)
    assert _peers(argparse.Namespace(device="cuda", peers=None)) == list(processes.GPU_STACKS)
    with pytest.raises(SystemExit, match="unsloth cannot run with --device cpu"):
        _peers(argparse.Namespace(device="cpu", peers=["unsloth"]))


def test_older_packages_lie_before_ours(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    monkeypatch.setenv(processes.PINNED_FOLDER, str(tmp_path))
    assert processes.packages("axolotl")["PYTHONPATH"].startswith(str(tmp_path))
    assert processes.packages("axolotl")["PYTHONPATH"].endswith("ours")
    assert processes.packages("experts4bit") == {}
    monkeypatch.delenv(processes.PINNED_FOLDER)
    with pytest.raises(FileNotFoundError, match=processes.PINNED_FOLDER):
        processes.packages("unsloth")


def test_separate_adapters_of_w1_and_w3_are_one_of_twice_the_rank() -> None:
    torch.manual_seed(0)
    gate, up = (kernels.Factors(torch.randn(2, 3, 8), torch.randn(2, 5, 3), 2.0) for _ in range(2))
    merged = kernels.merge_factors(gate, up)
    x = torch.randn(4, 8)
    for expert in range(2):
        separate = [x @ one.a_EDK[expert].T @ one.b_END[expert].T for one in (gate, up)]
        together = x @ merged.a_EDK[expert].T @ merged.b_END[expert].T
        torch.testing.assert_close(together, torch.cat(separate, dim=1))


def test_experts_without_rows_are_no_groups() -> None:
    assert kernels.groups(torch.tensor([0, 5, 5, 12])) == ([5, 7], [1, 3])
