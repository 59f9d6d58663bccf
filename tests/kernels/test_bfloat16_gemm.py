"""Grouped GEMMs in bfloat16 on CPUs that have instructions for it, against what they are defined as in float32."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.native import build
from expertune.kernels.native.gemv import Product, gemv
from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack, dequantize
from tests.kernels.stacks import random_stack

ARITHMETIC = {"AVX512-BF16": 1, "AMX": 2}
# Of sums of products that are the same in both, so that only the order differs.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Tokens of each expert: none, one, parts of tiles, and more than one item's.
TOKENS = [0, 1, 17, 0, 33, 530]


@pytest.fixture(params=ARITHMETIC)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of instructions that this CPU has."""
    number = ARITHMETIC[request.param]
    if not native.available() or native.bfloat16_arithmetic() < number:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: number)
    return request.param


def weights(rows: int, columns: int, parts: int = 1, kind: str = "double") -> Nf4Bytes:
    """`parts` random matrices of each expert."""
    return random_stack(parts * len(TOKENS), rows, columns, kind)


def expected(x: Tensor, weight: Nf4Bytes, parts: int, transposed: bool) -> Tensor:
    """Both factors rounded to bfloat16, multiplied in float32; x is sorted by expert."""
    out, start = [], 0
    for expert, count in enumerate(TOKENS):
        size = weight.out_features, weight.in_features
        matrices = [
            dequantize(weight, expert * parts + part, torch.empty(size, dtype=torch.bfloat16)).float()
            for part in range(parts)
        ]
        w = torch.cat(matrices)
        out.append(x[start : start + count].bfloat16().float() @ (w.t() if transposed else w))
        start += count
    return torch.cat(out)


def run(x: Tensor, weight: Nf4Bytes | Tensor, columns: int, transposed: bool, **others: object) -> Tensor:
    offsets = torch.tensor(TOKENS).cumsum(0)
    out = torch.full((sum(TOKENS), columns), float("nan"))
    native.grouped_gemm(x, weight, offsets, out, transposed=transposed, dtype=torch.bfloat16, **others)  # type: ignore[arg-type]
    return out


@pytest.mark.parametrize("kind", ["double", "plain", "mxfp4"])
@pytest.mark.parametrize(("rows", "columns", "parts"), [(1, 64, 1), (40, 192, 2), (333, 640, 1), (65, 1088, 3)])
def test_products_and_input_gradients_are_those_of_rounded_factors(
    arithmetic: str, kind: str, rows: int, columns: int, parts: int
) -> None:
    weight = weights(rows, columns, parts, kind)
    for transposed in (True, False):
        depth, width = (columns, parts * rows) if transposed else (parts * rows, columns)
        x = torch.randn(sum(TOKENS), depth, generator=torch.Generator().manual_seed(1))
        wanted = expected(x, weight, parts, transposed)
        torch.testing.assert_close(run(x, weight, width, transposed) / depth**0.5, wanted / depth**0.5, **CLOSE)


@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
def test_what_would_be_left_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, dense = weights(64, 64, 2), torch.randn(len(TOKENS), 128, 64)
    x, number = torch.randn(sum(TOKENS), 64), torch.arange(sum(TOKENS))
    dropped = native.Dropout(number, 1, 2**31, 2.0, 64)
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: 1)
    for weight in (packed, dense.bfloat16()):
        with pytest.raises(ValueError, match="dropout of x is for dense weights in float32"):
            run(x, weight, 128, True, dropout=dropped)
    with pytest.raises(ValueError, match="swiglu is for transposed NF4 weights"):
        run(x, dense.bfloat16(), 64, True, swiglu=True)
    with pytest.raises(ValueError, match="swiglu is for transposed NF4 weights"):
        run(torch.randn(sum(TOKENS), 128), packed, 32, False, swiglu=True)
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: 0)
    with pytest.raises(ValueError, match="swiglu is for transposed NF4 weights in bfloat16"):
        run(x, packed, 64, True, swiglu=True)


@pytest.mark.parametrize("rank", [1, 8, 37])
def test_updates_of_some_columns_and_some_experts_are_added_in_float32(arithmetic: str, rank: int) -> None:
    weight, slots = weights(70, 192, 2), torch.tensor([0, 1, -1, -1, 2, 3])
    of_each = torch.repeat_interleave(slots, torch.tensor(TOKENS))
    generator = torch.Generator().manual_seed(rank)
    for transposed, column, column_end in ((True, 70, 140), (True, 0, 140), (False, 0, 192), (False, 5, 77)):
        depth, width = (192, 140) if transposed else (140, 192)
        x = torch.randn(sum(TOKENS), depth, generator=generator)
        h = torch.randn(sum(TOKENS), rank, generator=generator)
        b = torch.randn(4, *((column_end - column, rank) if transposed else (rank, column_end - column)))
        wanted = expected(x, weight, 2, transposed)
        added = torch.einsum("tr,tnr->tn", h, b[of_each] if transposed else b[of_each].transpose(1, 2))
        wanted[:, column:column_end] += added.where(of_each[:, None] >= 0, 0)
        update = native.Update(h, b, column, column_end, slots)
        torch.testing.assert_close(run(x, weight, width, transposed, updates=[update]), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [5, 64, 141])
def test_swiglu_is_applied_to_both_halves_of_the_sums(arithmetic: str, size: int) -> None:
    weight, generator = weights(size, 128, 2), torch.Generator().manual_seed(size)
    x, h = (torch.randn(sum(TOKENS), columns, generator=generator) for columns in (128, 3))
    b = torch.randn(len(TOKENS), size, 3, generator=generator)
    updates = [native.Update(h, b, 0, size), native.Update(2 * h, b, size, 2 * size)]
    gate, up = run(x, weight, 2 * size, transposed=True, updates=updates).chunk(2, dim=1)
    found = run(x, weight, size, transposed=True, updates=updates, swiglu=True)
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 193), (333, 640)])
def test_matrices_that_are_bfloat16_themselves_are_multiplied_as_they_lie(
    arithmetic: str, rows: int, columns: int
) -> None:
    weight = torch.randn(len(TOKENS), rows, columns, generator=torch.Generator().manual_seed(rows)).bfloat16()
    for transposed in (True, False):
        depth, width = (columns, rows) if transposed else (rows, columns)
        x = torch.randn(sum(TOKENS), depth, generator=torch.Generator().manual_seed(1))
        own = zip(x.bfloat16().float().split(TOKENS), weight.float(), strict=True)
        wanted = torch.cat([x_e @ (w_e.t() if transposed else w_e) for x_e, w_e in own])
        torch.testing.assert_close(run(x, weight, width, transposed) / depth**0.5, wanted / depth**0.5, **CLOSE)


def test_tokens_are_read_where_the_index_says(arithmetic: str) -> None:
    weight, x = weights(48, 128), torch.randn(9, 128)
    index = torch.randint(9, (sum(TOKENS),), generator=torch.Generator().manual_seed(2))
    wanted = run(x[index], weight, 48, transposed=True)
    assert torch.equal(run(x, weight, 48, transposed=True, index=index), wanted)


@pytest.mark.parametrize("transposed", [True, False])
def test_any_number_of_threads_gives_the_same_bytes(arithmetic: str, transposed: bool) -> None:
    weight = weights(200, 576)
    depth, width = (576, 200) if transposed else (200, 576)
    x, h = torch.randn(sum(TOKENS), depth), torch.randn(sum(TOKENS), 4)
    update = native.Update(h, torch.randn(len(TOKENS), *((width, 4) if transposed else (4, width))), 0, width)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(x, weight, width, transposed, updates=[update]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
def test_a_compiler_that_does_not_know_avx512_and_amx_builds_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_command = build._run

    def without_avx512(command: list[str]) -> None:
        if (
            any(name in " ".join(command) for name in build.AVX512)
            and "-c" in command
            and "-DWITHOUT_AVX512" not in command
        ):
            raise subprocess.CalledProcessError(1, command, stderr="unrecognized argument")
        run_command(command)

    monkeypatch.setattr(build, "_run", without_avx512)
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O0"))  # compiled faster
    sources = {name: (build.FOLDER / name).read_bytes() for name in (*build.HEADERS, *build.SOURCES)}
    build._compile(["cc"], tmp_path / "library.so", sources)
    library = ctypes.CDLL(str(tmp_path / "library.so"))
    assert library.expertune_bfloat16() == 0
    monkeypatch.setattr(native, "library", lambda: library)
    stack = Nf4Stack(1, 64, 64)
    stack.write(0, torch.eye(64))
    x, y = torch.randn(2, 64), torch.empty(2, 64)
    gemv([Product(stack.bytes, x, y)], 2)
    torch.testing.assert_close(y, x, rtol=0, atol=float(x.abs().max()) / 8192)
