"""Triton's kernels without a GPU: through its interpreter, in float32 and float16 (its bfloat16 is wrong, silently)."""

import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from expertune.kernels.nf4 import Nf4Bytes, Nf4Stack

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16]
# Of a GEMM's result, relative to its norm: sums in float32; operands and results rounded to the dtype.
RELATIVE = {torch.float32: 2e-6, torch.float16: 1e-3}


class Routing(NamedTuple):
    """Rows sorted by expert: where each comes from, its expert, its number, and the experts' ends."""

    token_R: Tensor
    expert_R: Tensor
    number_R: Tensor
    offsets_E: Tensor


def routing(counts: list[int], tokens: int) -> Routing:
    """As many rows of each expert as asked for, from tokens at random."""
    rows = sum(counts)
    expert_R = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return Routing(
        torch.randint(tokens, (rows,)), expert_R, torch.randperm(rows) + 1000, torch.tensor(counts).cumsum(0)
    )


def stack_of(num_matrices: int, rows: int, columns: int, double_quantization: bool = True) -> Nf4Stack:
    """Random matrices of unit scale."""
    stack = Nf4Stack(num_matrices, rows, columns, double_quantization)
    for index in range(num_matrices):
        stack.write(index, torch.randn(rows, columns))
    return stack


def dense(weight: Nf4Bytes, dtype: torch.dtype = torch.float32) -> Tensor:
    """All matrices [M, N, K], dequantized on the CPU."""
    from expertune.kernels.nf4 import dequantize

    shape = (weight.packed.shape[0], weight.out_features, weight.in_features)
    out = torch.empty(shape, dtype=dtype)
    for index in range(shape[0]):
        dequantize(weight, index, out[index])
    return out


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory in which whatever is not written shows."""
    return torch.full(shape, float("nan"), dtype=dtype)


def assert_near(found: Tensor, expected: Tensor, relative: float) -> None:
    """Within `relative` of the expected values' norm, and no value missing."""
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)
    assert error <= relative, f"relative error {error:.2e}, at most {relative:.0e}"


@pytest.fixture(autouse=True, scope="session")
def _language_is_patched_once_a_launch() -> Iterator[None]:
    """Triton's interpreter replaces the builtins of its language at a launch, and again at each device function's call.

    Which names are builtins does not change, and what a running kernel has replaced stays so until it ends: here they
    are listed once, and replaced once in a launch. Read from Triton 3.6.0 and 3.9.0; a release that does it otherwise
    is left as it is.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    names = ("tl", "_patch_attr", "_patch_builtin", "_patch_lang", "_LangPatchScope")
    if not all(hasattr(interpreter, name) for name in names):
        yield
        return
    language, patch_one, patch_all = interpreter.tl, interpreter._patch_attr, interpreter._patch_lang
    builtins: dict[Any, list[str]] = {}
    patched: set[Any] = set()

    def patch(package: Any, *builder_and_scope: Any) -> None:
        if package not in builtins:
            members = inspect.getmembers(package, language.core.is_builtin)
            builtins[package] = [name for name, _ in members]
        for name in builtins[package]:
            member = getattr(package, name)
            # Within a running kernel it is replaced already.
            if language.core.is_builtin(member):
                patch_one(package, name, member, *builder_and_scope)

    @functools.cache
    def seen_by(fn: Any) -> set[Any]:
        return {each for each in fn.__globals__.values() if each is language or each is language.core}

    def patch_for(fn: Any) -> Any:
        if patched and seen_by(fn) <= patched:
            return interpreter._LangPatchScope()
        scope = patch_all(fn)
        patched.update(seen_by(fn))
        restore = scope.restore

        def restored() -> None:
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(interpreter, "_patch_builtin", patch)
        changed.setattr(interpreter, "_patch_lang", patch_for)
        yield


@pytest.fixture(autouse=True, scope="session")
def _nothing_is_computed_in_vain() -> Iterator[None]:
    """Triton's interpreter looks for overflows at each sum of integers, and says nothing of them without `debug`.

    It also lists numpy's types at each look-up of one. Together they take a third of its time. Read from Triton 3.6.0
    and 3.9.0; a release that does it otherwise is left as it is.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    names = ("tl", "interpreter_builder", "_get_np_dtype")
    options = getattr(getattr(interpreter, "interpreter_builder", None), "options", None)
    if not all(hasattr(interpreter, name) for name in names) or getattr(options, "debug", True):
        yield
        return
    block_type, look_up = interpreter.tl.block_type, interpreter._get_np_dtype
    known: dict[str, Any] = {}

    def numpy_type(dtype: Any) -> Any:
        name = (dtype.element_ty if isinstance(dtype, block_type) else dtype).name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
        changed.setattr(interpreter, "_get_np_dtype", numpy_type)
        yield


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of the GEMMs."""
    return request.param
