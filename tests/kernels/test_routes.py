"""The route of a GEMM: by tokens per expert against a crossover, or as one setting says; what ran is known."""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from expertune.config import KernelsConfig
from expertune.errors import ConfigError
from expertune.kernels import native, routes
from expertune.kernels.expert_mlp import ExpertLayer, dequant_gemm, operator
from expertune.kernels.expert_mlp.grouped import GroupedRoute
from expertune.kernels.expert_mlp.plan import FrozenLayer
from expertune.kernels.routes import KernelSettings
from expertune.placement.device import make_kernel_settings
from tests.kernels.expert_layers import SHAPES, make_case

CPU = torch.device("cpu")


needs_native = pytest.mark.skipif(not native.available(), reason="the native library could not be built here")


@needs_native
@pytest.mark.parametrize(("tokens", "route"), [(1, "fused"), (63.5, "fused"), (64, "dequant_gemm")])
def test_tokens_per_expert_choose_against_the_crossover(tokens: float, route: str) -> None:
    assert KernelSettings(crossover=64).choose(CPU, tokens, torch.float32) == route


@needs_native
@pytest.mark.parametrize("route", ["fused", "dequant_gemm"])
def test_one_setting_overrides_and_the_record_names_what_ran(route: str) -> None:
    settings = make_kernel_settings(KernelsConfig(route=route), crossover=64)
    for tokens in (1, 1000):
        assert settings.choose(CPU, tokens, torch.float32) == route
    described = settings.describe(CPU, torch.float32)
    assert described["setting"] == route
    assert described["ran"] == {route: 2}
    assert route in routes.summarize(described)


def test_working_set_of_the_run_file_is_the_operators() -> None:
    settings = make_kernel_settings(KernelsConfig(working_set="64MiB"))
    assert settings.working_set_on("cpu") == settings.working_set_on("cuda") == 64 * 2**20


def test_fused_route_that_cannot_run_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    with pytest.raises(ConfigError, match=r"kernels\.route: the fused route cannot run here: "):
        make_kernel_settings(KernelsConfig(route="fused"))


def test_without_the_library_every_gemm_dequantizes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    assert KernelSettings(crossover=64).choose(CPU, 1, torch.float32) == "dequant_gemm"


def test_other_devices_go_expert_by_expert() -> None:
    assert KernelSettings().choose(torch.device("meta"), 1, torch.bfloat16) == "expert_by_expert"


@needs_native
def test_crossover_is_measured_where_the_first_product_is_one_of_inference(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(routes, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(routes, "_TOKENS", (1,))
    routes._measured.cache_clear()
    with torch.inference_mode():
        assert routes._measured(torch.float32, CPU, 2)["crossover"]
    routes._measured.cache_clear()


@needs_native
def test_crossover_is_measured_once_and_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[torch.dtype] = []
    monkeypatch.setattr(routes, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(routes, "_measure", lambda dtype: measured.append(dtype) or 48)
    for _ in range(2):
        routes._measured.cache_clear()
        assert routes._measured(torch.float32, CPU, 2)["crossover"] == 48
    assert measured == [torch.float32]
    (path,) = tmp_path.iterdir()
    path.write_text("{}", encoding="utf-8")  # damaged: measured again
    routes._measured.cache_clear()
    assert routes._measured(torch.float32, CPU, 2)["crossover"] == 48
    assert len(measured) == 2
    routes._measured.cache_clear()


@needs_native
@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float32, "products in float32, fused below 64 tokens per expert, dequant_gemm from there on"),
        (torch.bfloat16, "products in integers of 16 bits, fused below 512 tokens per expert, dequant_gemm in float32"),
    ],
)
def test_products_in_integers_are_measured_and_named_for_themselves(
    dtype: torch.dtype, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {torch.float32: 64, torch.bfloat16: 512}
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: 0)
    monkeypatch.setattr(routes, "gemm_dtype", lambda dtype, device: torch.float32)
    monkeypatch.setattr(routes, "_measured", lambda dtype, *_: {"crossover": measured[dtype]})
    assert routes.summarize(KernelSettings().describe(CPU, dtype)).startswith(said)


@needs_native
@pytest.mark.parametrize("route", ["auto", "dequant_gemm"])
def test_record_says_what_the_fused_route_multiplies_in_where_a_run_takes_it(
    route: routes.Route, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "bfloat16_arithmetic", lambda: 0)
    described = KernelSettings(route, crossover=64).describe(CPU, torch.bfloat16)
    assert described.get("fused_in") == ("integers of 16 bits" if route == "auto" else None)


@needs_native
def test_measuring_finds_one_of_the_token_counts_it_tries() -> None:
    assert routes._measure(torch.float32) in (*routes._TOKENS, routes._NEVER)


def test_measuring_leaves_the_programs_draws_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else a seed gives one adapter, or one drawn answer, where the machine was measured before, and another where not.
    monkeypatch.setattr(routes, "_TOKENS", (4,))
    before = torch.get_rng_state()
    routes._measure(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_count_that_was_disturbed_while_it_was_measured_does_not_decide_for_larger_ones() -> None:
    inside = {8: 1.0, 64: 4.0, 512: 3.0, 1024: 6.0}  # at 64 tokens other work ran beside it
    assert routes._crossover(list(inside), lambda tokens: [3.5, inside[tokens]]) == 1024
    assert routes._crossover(list(inside), lambda tokens: [7.0, inside[tokens]]) == routes._NEVER
    assert routes._crossover(list(inside), lambda tokens: [0.5, inside[tokens]]) == 8


class TestOnAGpu:
    """What is decided about a GPU, with the device's answers put in: which routes passed, and what was measured."""

    device = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def _answers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from expertune.kernels import gpu
        from expertune.kernels.expert_mlp import selfcheck

        self.findings = selfcheck.Findings(
            {"shuffle": 0.0, "fused": 0.003, "dequant_gemm": 0.004}, {}, ["shuffle", "fused", "dequant_gemm"]
        )
        monkeypatch.setattr(gpu, "unavailable", lambda device: "")
        monkeypatch.setattr(selfcheck, "checked", lambda device, dtype: self.findings)
        monkeypatch.setattr(routes, "_measured", lambda *_: {"crossover": 384, "gemm": "torch"})
        self.settings = KernelSettings()

    def test_routes_cross_where_this_device_was_measured_to(self) -> None:
        assert self.settings.choose(self.device, 383, torch.bfloat16) == "fused"
        assert self.settings.choose(self.device, 384, torch.bfloat16) == "dequant_gemm"
        described = self.settings.describe(self.device, torch.bfloat16)
        assert described["crossover"] == 384
        assert described["gemm"] == "torch"
        assert "fused below 384 tokens per expert" in routes.summarize(described)

    def test_route_that_failed_its_check_is_not_used_and_the_record_says_so(self) -> None:
        self.findings.passed.remove("fused")
        self.findings.messages["fused"] = "RuntimeError: misaligned address"
        self.settings.route = "fused"
        assert self.settings.choose(self.device, 1, torch.bfloat16) == "dequant_gemm"
        described = self.settings.describe(self.device, torch.bfloat16)
        assert described["self_check"]["fused"] == "RuntimeError: misaligned address, not used"
        assert described["self_check"]["shuffle"] == "relative error 0.0e+00"
        assert "fused failed the check on this device" in routes.summarize(described)

    def test_without_a_usable_route_experts_are_computed_one_by_one(self) -> None:
        self.findings.passed.clear()
        assert self.settings.choose(self.device, 1, torch.bfloat16) == "expert_by_expert"

    def test_layer_that_the_kernels_cannot_serve_goes_expert_by_expert(self) -> None:
        assert self.settings.choose(self.device, 1, torch.bfloat16, grouped=False) == "expert_by_expert"

    @pytest.mark.parametrize(
        ("shape", "served"),
        [("gate alone, rank 1", True), ("updates of some experts", True), ("gains", False), ("two adapters", False)],
    )
    def test_operator_gives_the_kernels_only_updates_that_they_can_serve(self, shape: str, served: bool) -> None:
        case = make_case(**SHAPES[shape])
        frozen = FrozenLayer(case.gate_up.bytes, case.down.bytes, case.layer.activation)
        layer = ExpertLayer(case.layer.activation, settings=self.settings)
        with FakeTensorMode():  # a GPU's tensors, where there is none
            hidden = torch.empty(case.hidden.shape, device=self.device)
        ((_, route),) = operator._chunks(hidden, case.index, layer, frozen, case.updates)
        assert isinstance(route, GroupedRoute) if served else route is dequant_gemm
        assert self.settings.ran == {"fused" if served else "expert_by_expert": 1}

    def test_continued_run_keeps_what_it_multiplied_with(self) -> None:
        settings = make_kernel_settings(KernelsConfig(), crossover=64, gemm="triton")
        assert settings.choose(self.device, 100, torch.bfloat16) == "dequant_gemm"
        assert settings.gemm_on(self.device, torch.bfloat16) == "triton"

    def test_without_triton_the_terminal_says_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from expertune.kernels import gpu

        monkeypatch.setattr(gpu, "unavailable", lambda device: "triton is not installed")
        assert self.settings.choose(self.device, 1, torch.bfloat16) == "expert_by_expert"
        said = routes.summarize(self.settings.describe(self.device, torch.bfloat16))
        assert said == "products in bfloat16, expert by expert, without Triton's kernels: triton is not installed"


def test_working_set_left_to_the_device_is_larger_on_a_gpu() -> None:
    settings = make_kernel_settings(KernelsConfig())
    assert (settings.working_set_on("cpu"), settings.working_set_on("cuda")) == (2**29, 2**31)
