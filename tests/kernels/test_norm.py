"""Root mean square norms of few rows in one call, against plain arithmetic."""

import pytest
import torch

from expertune.kernels import native
from expertune.kernels.native.norm import rms_norm

pytestmark = pytest.mark.skipif(not native.available(), reason="the native library could not be built here")

ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("beyond", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1, 2048), (3, 96), (2, 5, 1, 24), (4, 7), (1, 1), (0, 16)])
@pytest.mark.parametrize("dtype", ROUNDED)
def test_norm_is_that_of_plain_arithmetic(dtype: torch.dtype, shape: tuple[int, ...], beyond: float) -> None:
    x, weight = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    y = rms_norm(x, weight, 1e-5, beyond)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() + beyond)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    assert torch.allclose(y.double(), expected, rtol=ROUNDED[dtype], atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gives_no_number(bad: float) -> None:
    x = torch.ones(2, 40)
    x[1, 35] = bad
    y = rms_norm(x, torch.ones(40), 1e-6)
    assert y[0].isfinite().all()
    assert y[1, 35].isnan()


def test_a_row_of_zeros_stays_one() -> None:
    assert not rms_norm(torch.zeros(2, 33), torch.ones(33), 1e-6).any()
