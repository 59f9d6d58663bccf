"""Threads that call the native library at once: each has its own memory, and gets the bytes that it would get alone."""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.dense_linear import dense_linear
from expertune.kernels.expert_mlp import expert_mlp
from expertune.kernels.few_tokens import answering, dense
from expertune.kernels.linear import nf4_linear
from expertune.kernels.linear_cross_entropy import linear_cross_entropy
from expertune.kernels.native.attention import attend
from expertune.kernels.nf4 import reference
from expertune.kernels.routes import KernelSettings
from tests.kernels.expert_layers import make_case
from tests.kernels.output_heads import make_case as make_head
from tests.kernels.stacks import random_stack


@pytest.fixture
def switching_often() -> Iterator[None]:
    """Threads of Python take turns a hundred times as often as they do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    yield
    sys.setswitchinterval(interval)


def work(size: int) -> Callable[[], list[Tensor]]:
    """What a step and a token of an answer ask of the library, in 16 bits and float32; each thread another size."""
    tokens, fused = 40 * size, KernelSettings(name="native threads", route="fused")
    layers = [make_case(tokens, dtype=dtype, biased=True) for dtype in (torch.bfloat16, torch.float32)]
    head = make_head(rows=tokens, vocabulary=300, width=64 * size, dtype=torch.bfloat16, softcap=3.0, bias=True)
    packed, plain = random_stack(1, 70 * size, 192 * size, "double"), torch.randn(70 * size, 192 * size).bfloat16()
    x = torch.randn(tokens, 192 * size).bfloat16().requires_grad_()
    query, cache = torch.randn(3, 4, 1, 32), torch.randn(3, 2, 50 * size, 32)

    def run() -> list[Tensor]:
        found = []
        for layer in layers:
            leaves = [layer.hidden, *(factor for update in layer.updates for factor in (update.a, update.b))]
            out, _ = expert_mlp(*layer)
            found += [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
        loss = linear_cross_entropy(**head.arguments)
        found += [loss, *torch.autograd.grad(loss, head.leaves)]
        for y in (nf4_linear(x, packed, fused), dense_linear(x, plain)):
            found += [y, *torch.autograd.grad(y.float().square().sum(), x)]
        with torch.no_grad(), answering():
            few = layers[0]._replace(
                hidden=layers[0].hidden[:2], index=layers[0].index[:2], weights=layers[0].weights[:2]
            )
            found += [expert_mlp(*few)[0], nf4_linear(x[:3], packed, fused), dense(x[:3], plain)]
            found.append(attend(query, cache, cache, 0.3))
        return [each.detach().clone() for each in found]

    return run


@pytest.mark.skipif(not native.available(), reason="the native library could not be built here")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.usefixtures("switching_often")
def test_two_threads_at_once_get_the_bytes_of_one(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    works = [work(size) for size in (1, 2)]
    alone = [run() for run in works]
    started = threading.Barrier(2)

    def several(run: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
        started.wait(60)
        return [run() for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        for expected, turns in zip(alone, pool.map(several, works), strict=True):
            for found in turns:
                assert [torch.equal(one, other) for one, other in zip(found, expected, strict=True)] == [True] * len(
                    found
                )


def test_tables_that_two_threads_make_at_once_both_stay() -> None:
    """The library is given a pointer, and nothing else of a table may be left."""
    both = threading.Barrier(2)

    @reference._kept
    def table(size: int) -> Tensor:
        both.wait(60)
        return torch.zeros(size)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda size: weakref.ref(table(size)), (3, 3)))
    assert all(each() is not None for each in made)
