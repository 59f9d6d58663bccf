"""Routes for the tests of products: what is claimed of one holds on all."""

from collections.abc import Iterator

import pytest

from expertune.kernels import native, routes


@pytest.fixture(params=["decode_then_gemm", "fused"])
def route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each route in turn; the fused one where the native library could be built."""
    if request.param == "fused" and not native.available():
        pytest.skip(native.status().reason)
    before = routes.settings()
    routes.configure(route=request.param)
    yield request.param
    routes.configure(**vars(before))
