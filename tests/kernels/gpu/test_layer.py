"""The expert layer on the GPU's routes, through the public operator: right, repeatable, few launches, no waiting."""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertune.kernels.expert_mlp import Activation, expert_mlp, operator, selfcheck
from expertune.kernels.expert_mlp.grouped import GroupedRoute
from expertune.kernels.expert_mlp.plan import Chunk, FrozenLayer, Gradients
from expertune.kernels.gpu import launch, nf4
from expertune.kernels.gpu.launch import Target
from expertune.kernels.lora import LoraUpdate
from expertune.kernels.nf4 import Nf4Stack
from tests.kernels.expert_layers import SHAPES, Case, assert_same_as_plain, make_case
from tests.kernels.settings import SETTINGS

from .conftest import CPU

FLOAT32 = {"rtol": 1e-5, "atol": 2e-5}
HALF = {"rtol": 2**-8, "atol": 2**-8}
# What these kernels refuse; tests/kernels/test_routes.py holds that they are never asked for it.
GAINS = {name for name, shape in SHAPES.items() if "gained" in shape}
# What takes the interpreter minutes, or goes expert by expert on a GPU too.
LEFT_OUT = {"more rows than a panel of the fused route holds", "two adapters", "experts of two ranks"} | GAINS
# What two other shapes show together, or a smaller one.
SLOW = {
    "one token",
    "biases, SwiGLU by autograd",
    "biases, without a gate",
    "a norm after each expert, with biases",
    "a norm after updates of some experts",
}
# An expert is a tile or two of every launch, and takes the interpreter a second: as few as show what the shape is for.
SMALL = {"hidden": 64, "intermediate": 64, "num_experts": 2}
FEW = {
    "one choice": {"num_experts": 3},
    "ranks that are a multiple of nothing": {"num_experts": 2},
    "every expert chosen": {"num_experts": 2, "top_k": 2},
    "updates of some experts": {"num_experts": 3, "experts": ((1,), (2, 0), (0, 1)), "tokens": 5},
    "updates of some experts, one of them without tokens": {
        "num_experts": 3,
        "experts": ((1,), None, (2,)),
        "tokens": 1,
    },
    "a norm after updates of some experts": {"num_experts": 2, "experts": ((1,), (0,), (1,)), "tokens": 2},
    "most experts without tokens": {"num_experts": 6, "tokens": 1},
    "biases, limits and experts without tokens": {"num_experts": 6, "tokens": 1},
}
# Where dequantized groups differ from one GEMM of all experts.
DEQUANTIZED = {
    "rows that are a multiple of nothing",
    "every expert chosen",
    "a gate with limits",
    "experts without a gate",
}


@pytest.fixture(params=[False, True], ids=["fused", "dequant_gemm"])
def on_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Layers take a GPU's route, in Triton's interpreter; dequantized weights are held for one expert at a time."""
    monkeypatch.setattr(operator, "_route", lambda *_: GroupedRoute(request.param, buffer_bytes=1))
    yield "dequant_gemm" if request.param else "fused"
    SETTINGS.working_set_bytes = None


@pytest.mark.parametrize(
    "shape",
    [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in sorted(set(SHAPES) - LEFT_OUT)],
)
def test_output_and_gradients_are_those_of_plain_arithmetic(on_gpu: str, shape: str) -> None:
    if on_gpu == "dequant_gemm" and shape not in DEQUANTIZED:
        pytest.skip("the same groups as another shape's")
    assert_same_as_plain(make_case(**SMALL | SHAPES[shape] | FEW.get(shape, {})), FLOAT32)


@pytest.mark.usefixtures("on_gpu")
def test_gains_are_refused_and_not_left_out() -> None:
    with pytest.raises(NotImplementedError, match="no gains"):
        expert_mlp(*make_case(1, **SMALL, gained=(1,)))


def test_grouped_mm_of_torch_gives_the_same_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "_route", lambda *_: GroupedRoute(True, torch_gemm=True))
    assert_same_as_plain(make_case(11, **SMALL, dropout=0.0), FLOAT32)
    assert_same_as_plain(make_case(9, **SMALL, activation=SHAPES["a gate with limits"]["activation"]), FLOAT32)


@pytest.mark.usefixtures("on_gpu")
def test_half_precision_stays_within_its_rounding() -> None:
    assert_same_as_plain(make_case(9, dtype=torch.float16, **SMALL), HALF)


@pytest.mark.usefixtures("on_gpu")
def test_no_token_gives_no_output_and_zero_gradients() -> None:
    assert_same_as_plain(make_case(0, **SMALL), FLOAT32)


def gradients(case: Case) -> list[Tensor]:
    torch.manual_seed(7)
    out, _ = expert_mlp(*case)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), case.leaves)]


class Computed(NamedTuple):
    """A layer with dropout, and its output and gradients on a GPU's route."""

    case: Case
    results: list[Tensor]


@pytest.fixture(scope="module")
def by_route() -> dict[str, Computed]:
    """What a test has computed that others compare with: it takes the interpreter seconds."""
    return {}


@pytest.fixture
def computed(on_gpu: str, by_route: dict[str, Computed]) -> Computed:
    if on_gpu not in by_route:
        case = make_case(7, **SMALL | {"num_experts": 3}, dropout=0.3)
        by_route[on_gpu] = Computed(case, gradients(case))
    return by_route[on_gpu]


def test_dropout_falls_where_it_falls_on_a_cpu(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for one, other in zip(computed.results, gradients(computed.case), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_chunks_of_a_few_tokens_give_the_same_layer(computed: Computed) -> None:
    SETTINGS.working_set_bytes = 2**14
    for one, other in zip(computed.results, gradients(computed.case), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_two_runs_give_identical_bytes(computed: Computed) -> None:
    again = gradients(computed.case)
    assert all(torch.equal(one, other) for one, other in zip(computed.results, again, strict=True))


class Work(TorchDispatchMode):
    """Counts what torch itself would launch on a device: every operator that is neither a view nor an allocation."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if not func.is_view and not name.startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            self.operators.append(name)
        return func(*args, **(kwargs or {}))


def launches_of_a_layer(dequantize_first: bool, tokens: int, dropout: float, buffer_bytes: int) -> tuple[int, int]:
    """Launches of forward and of backward of Mixtral's layer; on `meta` nothing can be read, so a wait would raise."""
    E, D, F, K, r = 8, 4096, 14336, 2, 8

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    gate_up, down = Nf4Stack(2 * E, F, D, device="meta"), Nf4Stack(E, D, F, device="meta")
    layer = FrozenLayer(gate_up.bytes, down.bytes, Activation(torch.sigmoid, columnwise=True, swiglu=True))
    updates = [
        LoraUpdate(part, empty(E, r, columns), empty(E, rows, r), 2.0, dropout, empty(1, dtype=torch.int64)[0])
        for part, (rows, columns) in enumerate(((F, D), (F, D), (D, F)))
    ]
    hidden, weights = empty(tokens, D, dtype=torch.bfloat16), empty(tokens, K, dtype=torch.bfloat16)
    index, h = empty(tokens, K, dtype=torch.int64), [empty(tokens * K, r) for _ in updates]
    da, db = [torch.empty_like(u.a) for u in updates], [torch.empty_like(u.b) for u in updates]
    route = GroupedRoute(dequantize_first, buffer_bytes)
    nf4.tables(hidden.device)  # made once for a device
    with launch.recording(Target("cuda", 90)) as forward, Work() as work_forward:
        route.forward(Chunk(hidden, index, weights), layer, updates, h, torch.empty_like(hidden))
    out, dweights = torch.empty_like(hidden), torch.empty_like(weights)
    with launch.recording(Target("cuda", 90)) as backward, Work() as work_backward:
        gradients = Gradients(torch.empty_like(out), dweights, da, db)
        route.backward(out, Chunk(hidden, index, weights), layer, updates, h, gradients)
    assert work_forward.operators == []
    assert work_backward.operators == []
    return len(forward), len(backward)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("tokens", [320, 8192])
def test_layer_of_mixtral_is_at_most_15_launches_a_pass_and_waits_for_nothing(tokens: int, dropout: float) -> None:
    assert launches_of_a_layer(False, tokens, dropout, 2**30) == (7, 15)


def test_dequantized_groups_add_launches_only_as_the_buffer_forces_them() -> None:
    assert launches_of_a_layer(True, 2048, 0.05, 2**32) == (9, 17)
    assert launches_of_a_layer(True, 2048, 0.05, 2**30) == (11, 33)


def test_route_that_computes_wrongly_or_not_at_all_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(selfcheck, "SHAPE", (3, 64, 64, 2, 3, 9))
    real = GroupedRoute.forward

    def wrong(self: GroupedRoute, *arguments: Any) -> None:
        if self.dequantize_first:
            raise RuntimeError("out of resource: shared memory")
        real(self, *arguments)
        arguments[-1][0, 0] += 1

    monkeypatch.setattr(GroupedRoute, "forward", wrong)
    kept = tmp_path / "findings.json"
    kept.write_text(json.dumps({"findings": {}}), encoding="utf-8")
    # What has raised may have left the device unusable: another process says that no part is left.
    for done in (False, True):
        selfcheck.main(["cpu", "float32", str(kept)])
        state = json.loads(kept.read_text(encoding="utf-8"))
        assert (state["done"], "part" in state) == (done, False)
    findings = selfcheck.Findings(**state["findings"])
    assert findings.passed == ["shuffle"]
    assert findings.errors["fused"] > selfcheck.LIMITS[torch.float32]
    assert "shared memory" in findings.messages["dequant_gemm"]


def test_check_finds_every_route_right_inside_an_operator_and_in_inference_mode_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(selfcheck, "SHAPE", (3, 64, 64, 2, 3, 9))
    answers: list[selfcheck.Findings] = []

    @torch.library.custom_op("expertune_tests::asks", mutates_args=())
    def asks(x: Tensor) -> Tensor:
        answers.append(selfcheck.check(CPU, torch.float32))
        return x.clone()

    with torch.inference_mode():
        asks(torch.ones(1))
    (findings,) = answers
    assert findings.passed == ["shuffle", "fused", "dequant_gemm"]
    assert findings.messages == {}


# A check without torch, whose process one part ends before it is done.
CHECK = """
import json, os, signal, sys
*_, wanted, path = sys.argv
with open(path) as file:
    findings = json.load(file)["findings"]
for part in ("shuffle", "fused", "dequant_gemm"):
    if part in findings["errors"]:
        continue
    with open(path, "w") as file:
        json.dump({"findings": findings, "part": part}, file)
    if part == "fused":
        eval(wanted)
    findings["errors"][part] = 0.0
    findings["passed"].append(part)
with open(path, "w") as file:
    json.dump({"findings": findings, "done": True}, file)
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
        ("sys.exit('illegal memory access')", "status 1: illegal memory access"),
        ("signal.pause()", "not done after 2 seconds"),
    ],
)
def test_route_whose_check_ends_its_process_takes_no_other_route_with_it(what: str, said: str) -> None:
    findings = selfcheck.check_apart([sys.executable, "-c", CHECK, what], seconds=2)
    assert findings is not None
    assert findings.passed == ["shuffle", "dequant_gemm"]
    assert findings.errors == {"shuffle": 0.0, "fused": math.inf, "dequant_gemm": 0.0}
    assert said in findings.messages["fused"]


def test_check_that_cannot_begin_in_another_process_says_so() -> None:
    assert selfcheck.check_apart([sys.executable, "-c", "raise SystemExit('no device')"]) is None
    assert selfcheck.check_apart(["/no/such/python"]) is None


def test_check_whose_second_process_cannot_begin_keeps_what_the_first_has_found() -> None:
    """Otherwise the run's own process would meet the same crash."""
    once = CHECK.replace("for part in", "if findings['errors']: sys.exit('device busy')\nfor part in", 1)
    findings = selfcheck.check_apart([sys.executable, "-c", once, "sys.exit('illegal memory access')"])
    assert findings is not None
    assert findings.passed == ["shuffle"]
    assert findings.errors == {"shuffle": 0.0, "fused": math.inf, "dequant_gemm": math.inf}
    assert "illegal memory access" in findings.messages["fused"]
    assert findings.messages["dequant_gemm"] == "not run: its process has ended with status 1: device busy"


@pytest.mark.slow
def test_checks_run_in_a_process_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    findings = selfcheck.check_apart([sys.executable, "-P", "-m", selfcheck.__name__, "cpu", "float32"])
    assert findings is not None
    assert findings.passed == ["shuffle", "fused", "dequant_gemm"]


class Checks:
    """Stands for the checks of a device; a call is a process that asks for their findings."""

    def __init__(self) -> None:
        self.findings, self.num_made = selfcheck.Findings(), 0

    def make(self, command: list[str]) -> selfcheck.Findings:
        self.num_made += 1
        return self.findings

    def __call__(self) -> int:
        """How often the checks were made until the answer was there."""
        selfcheck.checked.cache_clear()
        assert selfcheck.checked(CPU, torch.float16) == self.findings
        selfcheck.checked.cache_clear()
        return self.num_made


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Checks:
    made = Checks()
    monkeypatch.setattr(selfcheck, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(selfcheck, "_identity", lambda device, dtype: "this")
    monkeypatch.setattr(selfcheck, "check_apart", made.make)
    return made


def test_findings_are_kept_of_parts_that_failed_too(checks: Checks) -> None:
    checks.findings = selfcheck.Findings({"fused": 0.5}, {}, ["shuffle"])
    assert [checks(), checks()] == [1, 1]


def test_a_check_that_raised_is_made_again_where_the_machine_was_changed_or_a_day_has_passed(
    checks: Checks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checks.findings = selfcheck.Findings({"fused": math.inf}, {"fused": "CompilationError: no compiler"}, ["shuffle"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [checks(), checks()] == [1, 1]
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh")
    compiler.chmod(0o700)
    assert [checks(), checks()] == [2, 2]
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/usr/bin/ptxas")
    assert [checks(), checks()] == [3, 3]
    now = time.time()
    monkeypatch.setattr(selfcheck.time, "time", lambda: now + 25 * 3600)
    assert checks() == 4
    checks.findings = selfcheck.Findings({"fused": 0.0}, {}, ["shuffle", "fused"])
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    assert [checks(), checks()] == [5, 5]


def test_a_check_that_met_a_full_device_or_ended_its_process_is_made_again(
    checks: Checks, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.findings = selfcheck.Findings({"fused": math.inf}, {"fused": "ended by signal 9"}, [], ["fused"])
    assert [checks(), checks()] == [1, 2]
    checks.findings = selfcheck.Findings({"fused": math.inf}, {"fused": "OutOfMemoryError"}, ["shuffle"])
    monkeypatch.setattr(selfcheck, "_has_room", lambda device: False)
    assert [checks(), checks()] == [3, 4]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [
        float((one.detach().double() - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)
    ]


@pytest.mark.usefixtures("on_gpu")
def test_error_is_no_larger_than_that_of_dequantizing_and_multiplying_in_16_bits() -> None:
    """Against float64: bitsandbytes' dequantized values, GEMMs and activation in float16, expert by expert."""
    case = make_case(24, **SMALL | {"num_experts": 3}, ranks=(), dtype=torch.float16)
    hidden, weights = case.hidden, case.weights

    def layer(hidden: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.zeros(hidden.shape, dtype=dtype)
        for expert in range(3):
            token, choice = (case.index == expert).nonzero(as_tuple=True)
            dequantized = torch.float32 if dtype == torch.float64 else dtype
            gate, up = (case.gate_up.dequantize(expert * 2 + part, dequantized).to(dtype) for part in range(2))
            inter = torch.nn.functional.silu(hidden[token] @ gate.t()) * (hidden[token] @ up.t())
            y = inter @ case.down.dequantize(expert, dequantized).to(dtype).t()
            out = out.index_add(0, token, y * weights[token, choice, None])
        return out

    dout = torch.randn_like(hidden)
    leaves = [hidden.detach().double().requires_grad_(), weights.detach().double().requires_grad_()]
    plain = layer(*leaves, torch.float64)
    expected = [plain.detach(), *torch.autograd.grad(plain, leaves, dout.double())]
    theirs = layer(hidden, weights, torch.float16)
    their_errors = relative_errors([theirs, *torch.autograd.grad(theirs, [hidden, weights], dout)], expected)
    ours, _ = expert_mlp(*case)
    our_errors = relative_errors([ours, *torch.autograd.grad(ours, [hidden, weights], dout)], expected)
    for our, their in zip(our_errors, their_errors, strict=True):
        assert our <= their <= 5e-3
