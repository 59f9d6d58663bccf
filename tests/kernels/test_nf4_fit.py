"""Scales chosen by error: bitsandbytes' layout with less error, and the same bytes from C as from plain torch."""

import bitsandbytes.functional as bnb_functional
import pytest
import torch
from torch import Tensor

from expertune.kernels.nf4 import BLOCK_SIZE, Fit, Nf4Bytes, dequantize, quantize_matrix, reference
from tests.kernels.test_nf4 import MATRICES, real_rows


def values_of(parts: tuple[Tensor, Tensor, Tensor, Tensor], shape: tuple[int, ...]) -> Tensor:
    packed, absmax, nested, offset = parts
    nested = nested[None] if len(offset) else nested.view(1, 0)
    return dequantize(Nf4Bytes(packed[None], absmax[None], nested, offset), 0, torch.empty(shape))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("layer", [0, 3])
def test_trained_experts_lose_a_tenth_less_by_error_than_by_magnitude(layer: int, double: bool) -> None:
    matrix = real_rows(layer, 3, "w1").float()
    errors = [
        float((values_of(quantize_matrix(matrix, double, fit), matrix.shape) - matrix).pow(2).sum())
        for fit in (None, Fit())
    ]
    assert errors[1] < 0.9 * errors[0]


def test_a_feature_that_counts_more_is_held_better() -> None:
    matrix = real_rows(1, 2, "w3").float()
    importance = torch.ones(matrix.shape[1])
    importance[::7] = 100.0
    of_all, of_some = (values_of(quantize_matrix(matrix, True, fit), matrix.shape) for fit in (Fit(), Fit(importance)))
    error = lambda values: float(((values - matrix).pow(2) * importance).sum())  # noqa: E731
    assert error(of_some) < 0.95 * error(of_all)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", MATRICES)
def test_c_and_plain_torch_choose_the_same_bytes(name: str, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = MATRICES[name]()
    importance = torch.rand(matrix.shape[1], generator=torch.Generator().manual_seed(1)) if "row" not in name else None
    native = quantize_matrix(matrix, double, Fit(importance))
    monkeypatch.setattr("expertune.kernels.native.available", lambda: False)
    plain = quantize_matrix(matrix, double, Fit(importance))
    for ours, theirs in zip(native, plain, strict=True):
        assert torch.equal(ours, theirs)
    assert values_of(native, matrix.shape).isfinite().all()


def test_bitsandbytes_reads_scales_that_were_chosen_by_error() -> None:
    matrix = real_rows(2, 1, "w2").float()
    packed, absmax, *_ = parts = quantize_matrix(matrix, False, Fit())
    state = bnb_functional.QuantState(
        absmax, matrix.shape, reference.nf4_codebook(matrix.device), BLOCK_SIZE, "nf4", torch.float32
    )
    assert torch.equal(bnb_functional.dequantize_4bit(packed.view(-1, 1), state), values_of(parts, matrix.shape))


def test_a_block_where_the_largest_magnitude_is_best_keeps_it() -> None:
    matrix = torch.tensor(reference.NF4_CODEBOOK).repeat(3, 8) * torch.tensor([[1.0], [3.0], [1e-3]])
    assert all(map(torch.equal, quantize_matrix(matrix, False, Fit()), quantize_matrix(matrix, False)))
