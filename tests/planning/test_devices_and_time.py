"""Devices by name, where experts are held, how long a step takes, and changes as lines of a run file."""

import math
import re
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

from expertune import load_config
from expertune.errors import ConfigError
from expertune.gpus import DEVICES, device_of_this_name, find_device
from expertune.kernels import cpu_rates, native, routes
from expertune.kernels.cpu_rates import CpuRates, ProductRate
from expertune.kernels.processor import Processor
from expertune.planning import devices, make_plan, speed
from expertune.planning.devices import Machine
from expertune.planning.duration import Lengths
from expertune.planning.fit import as_yaml
from expertune.planning.placement import PlacementChooser, spread
from expertune.planning.table import as_text
from tests.tiny_models import tiny_config

MIXTRAL = "mixtral-8x7b-v0.1"
AUTO = {"placement": "auto", "memory_budget": None}


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", "NVIDIA GeForce RTX 4090", "rtx_4090"])
def test_a_gpu_is_found_however_it_is_written(name):
    assert find_device(name).name == "rtx-4090"


def test_a_gpu_that_is_not_there_names_the_nearest(run_of):
    with pytest.raises(ConfigError, match=r"gpu rtx-4900: not in the table; did you mean rtx-4090\?"):
        make_plan(run_of(MIXTRAL), gpu="rtx-4900")


def test_any_other_gpu_needs_its_memory(run_of):
    with pytest.raises(ConfigError, match="--memory 24GB"):
        make_plan(run_of(MIXTRAL, **AUTO), gpu="cuda")
    plan = make_plan(run_of(MIXTRAL, **AUTO), gpu="cuda", memory="48GB")
    assert (plan.budget_bytes, plan.time) == (48_000_000_000, None)


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla K80", None),
    ],
)
def test_a_driver_s_name_finds_the_row_of_the_table(reported, name):
    assert device_of_this_name(reported) == (DEVICES[name] if name else None)


def test_given_memory_stands_above_the_run_file_and_the_table(run_of):
    assert make_plan(run_of(MIXTRAL), gpu="h100").budget_bytes == DEVICES["h100"].memory_bytes
    assert make_plan(run_of(MIXTRAL), gpu="h100", memory="30GB").budget_bytes == 30_000_000_000
    assert make_plan(run_of(MIXTRAL), device="cpu", memory="30GB").budget_bytes == 30_000_000_000


def test_a_gpu_without_bfloat16_is_planned_in_float16(run_of):
    assert make_plan(run_of(MIXTRAL, **AUTO), gpu="t4").compute_dtype == "float16"


# --- where experts are held -----------------------------------------------------------------------------------------


def test_experts_stay_on_the_device_where_they_fit(run_of):
    plan = make_plan(run_of(MIXTRAL, **AUTO), gpu="h100")
    assert set(plan.placement.values()) == {"device"}
    assert plan.planned.reason is None
    assert plan.memory.host_bytes == 0


def test_as_many_layers_as_needed_are_offloaded_to_the_host_and_no_more(run_of):
    plan = make_plan(run_of(MIXTRAL, **AUTO), gpu="rtx-4090")
    waiting = plan.planned.counts["host"]
    assert plan.fits
    assert 2 < waiting < 32
    one = plan.weights.experts_bytes // 32
    assert plan.memory.host_bytes == waiting * one
    assert plan.memory.components["slots"] == 2 * one
    assert plan.memory.components["weights"] == plan.weights.frozen_bytes - waiting * one
    # With one layer more on the device, less than the share that is left free would be.
    assert plan.memory.peak_bytes + one > 0.95 * plan.budget_bytes
    assert plan.time.brought_bytes == 2 * (waiting - 1) * one
    assert f"experts of {waiting} of 32 layers are offloaded to the host's memory" in plan.planned.reason


def test_offloaded_layers_are_evenly_spread():
    names = [str(number) for number in range(32)]
    assert spread(names, 4) == ["4", "12", "20", "28"]
    assert spread(names, 32) == names
    assert len(set(spread(names, 31))) == 31


def test_explicit_placement_puts_all_layers_there(run_of):
    plan = make_plan(run_of(MIXTRAL, placement="host"), device="cuda")
    assert plan.planned.counts == {"host": 32}
    on_cpu = make_plan(run_of(MIXTRAL, placement="host"), device="cpu")
    assert on_cpu.memory == make_plan(run_of(MIXTRAL), device="cpu").memory


def test_a_command_for_a_folder_with_a_space_is_quoted(run_of, tmp_path):
    tiny_config().save_pretrained(tmp_path / "a model")
    with pytest.raises(ConfigError, match=r"run `expertune quantize '\S+/a model' 'a model-nf4'` once"):
        make_plan(run_of(tmp_path / "a model", placement="disk"), device="cpu")


def test_disk_without_an_nf4_folder_names_the_command_that_writes_one(run_of, tmp_path):
    tiny_config().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"run `expertune quantize \S+/model model-nf4`"):
        make_plan(run_of(tmp_path / "model", placement="disk"), device="cpu")


def test_on_a_cpu_layers_of_an_nf4_folder_are_offloaded_to_the_disk():
    sizes = dict.fromkeys("abcd", 100)
    choice = PlacementChooser(sizes, "cpu", holds_nf4=True, host_bytes=1000)

    def peak(planned):
        return 1000 - planned.offloaded_bytes + planned.slot_bytes

    assert choice.fitting(1000, peak).counts == {"device": 4}
    assert choice.fitting(980, peak).counts == {"device": 1, "disk": 3}
    assert choice.fitting(100, peak).counts == {"disk": 4}
    assert PlacementChooser(sizes, "cpu", holds_nf4=False, host_bytes=1000).fitting(100, peak).counts == {"device": 4}


@pytest.mark.parametrize(("processes", "location"), [(1, "host"), (2, "host"), (3, "disk"), (8, "disk")])
def test_processes_of_a_machine_share_the_memory_that_layers_are_offloaded_to(run_of, monkeypatch, processes, location):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    machine = Machine.of(run_of(MIXTRAL, **AUTO), device="cpu", local_size=processes)
    assert (machine.host_bytes, machine.budget_bytes) == (1000 // processes, 1000 // processes)
    assert PlacementChooser({"a": 400}, "cuda", True, machine.host_bytes).lower() == location
    assert PlacementChooser({"a": 400}, "cuda", False, machine.host_bytes).lower() == "host"
    assert Machine.of(run_of(MIXTRAL, **AUTO), gpu="h100", devices=8).host_bytes == math.inf


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_offloaded_layers_share_two_slots_as_large_as_the_largest_of_them(device):
    chooser = PlacementChooser({"a": 50, "b": 100, "c": 70}, device, holds_nf4=True, host_bytes=1000)
    offloading = chooser.offloading(["a", "b", "c"], "disk")
    assert (offloading.offloaded_bytes, offloading.slot_bytes) == (220, 200)
    # The layer at a turnaround stays: the last one into backward, the first one into the next forward.
    assert offloading.transferred_bytes == (170, 150)


def test_offloaded_activations_leave_one_layer_s_on_the_device(run_of):
    here = make_plan(run_of(MIXTRAL), device="cuda").memory
    offloaded = make_plan(run_of(MIXTRAL, offload_activations=True), device="cuda").memory
    kept = here.phases["loss"]["activations"]
    assert offloaded.phases["loss"]["activations"] == kept // 32
    assert offloaded.host_bytes == kept
    on_cpu = run_of(MIXTRAL, offload_activations=True)
    assert make_plan(on_cpu, device="cpu").memory == make_plan(run_of(MIXTRAL), device="cpu").memory


# --- time -----------------------------------------------------------------------------------------------------------


def test_a_step_of_mixtral_on_an_h100_comes_near_the_floor_that_is_known_for_it(run_of):
    # 202 ms at 798 TFLOP/s for 2048 tokens with checkpointing, by counting products by hand.
    data = {"train": "rows.jsonl", "max_length": 2048}
    time = make_plan(run_of(MIXTRAL, data=data, **AUTO), gpu="h100").time
    assert time.flops / 798e12 == pytest.approx(0.202, rel=0.1)
    assert time.floor_seconds == pytest.approx(time.flops / 989e12)
    assert time.seconds == pytest.approx(time.floor_seconds / speed.EFFICIENCY["cuda"])
    assert time.rates.source == "tabled"


def test_products_in_float32_have_no_time_on_a_gpu_whose_rate_is_that_of_16_bits(run_of):
    plan = make_plan(run_of(MIXTRAL, quantization={"compute_dtype": "float32"}, **AUTO), gpu="h100")
    assert plan.time is None
    assert "products in 16 bits" in plan.notes[-1]


def test_few_tokens_are_bound_by_reading_the_weights(run_of):
    data = {"train": "rows.jsonl", "max_length": 8}
    plan = make_plan(run_of(MIXTRAL, data=data, **AUTO), gpu="h100")
    assert plan.time.floor_seconds == pytest.approx(2 * plan.weights.quantized_bytes / 3.35e12)


def test_accumulated_micro_batches_take_as_long_as_they_are_many(run_of):
    training = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": True}
    data = {"train": "rows.jsonl", "merge_accumulation": False}
    four = make_plan(run_of(MIXTRAL, data=data, training=training, **AUTO), gpu="h100").time
    one = make_plan(
        run_of(MIXTRAL, data=data, training=training | {"gradient_accumulation_steps": 1}, **AUTO), gpu="h100"
    )
    assert four.seconds == pytest.approx(4 * one.time.seconds)
    assert four.tokens == 4 * one.time.tokens


def test_on_a_cpu_the_rate_is_measured_once_and_kept(run_of, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_rates, "_LOST", 1.0)  # whatever else this machine does
    cpu_rates.cpu_rates.cache_clear()
    first = make_plan(run_of(MIXTRAL), device="cpu").time
    assert first.rates.source == "measured"
    assert first.rates.flops_per_second > 1e8
    monkeypatch.setattr(cpu_rates, "_measure", None)
    cpu_rates.cpu_rates.cache_clear()
    assert make_plan(run_of(MIXTRAL), device="cpu").time == first
    cpu_rates.cpu_rates.cache_clear()


@pytest.mark.parametrize("hidden_size", [4096, 256])
def test_a_speed_that_was_measured_on_a_busy_machine_is_said_to_be(run_of, tiny_mixtral, monkeypatch, hidden_size):
    model = MIXTRAL if hidden_size == 4096 else tiny_mixtral
    monkeypatch.setattr(devices, "cpu_rates", lambda dtype, threads: CpuRates(0, 1e11, 1e10, was_busy=True))
    plan = make_plan(run_of(model, training={"max_steps": 5}), device="cpu").timed(Lengths(100, 320))
    shown = " ".join(as_text(plan).split())
    assert shown.count("measured while others kept the machine busy") == 1
    assert "less if it has the machine to itself: others kept it busy when it was timed" in shown
    monkeypatch.setattr(devices, "cpu_rates", lambda dtype, threads: CpuRates(0, 1e11, 1e10))
    plan = make_plan(run_of(model, training={"max_steps": 5}), device="cpu").timed(Lengths(100, 320))
    assert "busy" not in as_text(plan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("route", ["auto", "dequant_gemm"])
@pytest.mark.parametrize("has_library", [True, False])
def test_plan_says_what_products_are_in_as_a_run_does(run_of, monkeypatch, dtype, route, has_library):
    if has_library and not native.available():
        pytest.skip("the native library could not be built here")
    monkeypatch.setattr(native, "available", lambda: has_library)
    monkeypatch.setattr(devices, "integer_rate", lambda threads: ProductRate(0, 2e11) if has_library else None)
    plan = make_plan(run_of(MIXTRAL, quantization={"compute_dtype": dtype}, kernels={"route": route}), device="cpu")
    described = routes.KernelSettings(route, crossover=64).describe(torch.device("cpu"), getattr(torch, dtype))
    (said,) = re.findall(r"products in [\w ]+", as_text(plan, 200))
    assert re.match(r"products in [\w ]+?(?=,| by torch)", routes.summarize(described))[0] == said


def on_avx2(monkeypatch, rate: float | None = None) -> None:
    """A CPU without products of 16-bit floats, whose products take so many operations a second, and others 1e11."""
    monkeypatch.setattr(devices, "processor", lambda: Processor(("avx2", "fma3"), 2))
    monkeypatch.setattr(devices, "cpu_rates", lambda dtype, threads: CpuRates(0, 1e11, 1e10))
    monkeypatch.setattr(devices, "integer_rate", lambda threads: ProductRate(0, rate) if rate else None)


def test_products_in_integers_have_a_rate_of_their_own(run_of, monkeypatch):
    times = {}
    for rate in (None, 1e11, 2e11):
        on_avx2(monkeypatch, rate)
        run = run_of(MIXTRAL, quantization={"compute_dtype": "bfloat16"})
        times[rate] = make_plan(run, device="cpu").time
    assert times[1e11].seconds == pytest.approx(times[None].seconds)
    assert times[1e11].flops == times[2e11].flops == times[None].flops
    # Products with weights are nearly all of it; attention and adapter are as fast as they were.
    assert 0.5 < times[2e11].seconds / times[None].seconds < 0.55
    assert "at 0.1 TFLOP/s, 0.2 in integers (measured)" in as_text(make_plan(run, device="cpu"), 500)


@pytest.mark.parametrize("sections", [{}, {"kernels": {"route": "dequant_gemm"}}])
def test_products_in_floats_have_one_rate_though_integers_are_faster(run_of, monkeypatch, sections):
    on_avx2(monkeypatch, 2e11)
    dtype = "bfloat16" if sections else "float32"
    time = make_plan(run_of(MIXTRAL, quantization={"compute_dtype": dtype}, **sections), device="cpu").time
    assert time.rates.integer_flops_per_second is None


# --- changes as lines of a run file ---------------------------------------------------------------------------------


def test_changes_come_as_lines_of_a_run_file(run_of, tmp_path):
    training = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    data = {"train": "rows.jsonl", "max_length": 320, "merge_accumulation": False}
    run = run_of(MIXTRAL, training=training, data=data, memory_budget="28GB")
    plan = make_plan(run, device="cuda")
    values = run.model_dump()
    for section, changed in yaml.safe_load(plan.yaml).items():
        values[section] = {**values[section], **changed} if isinstance(changed, dict) else changed
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    changed = make_plan(load_config(path), device="cuda")
    assert changed.fits
    assert changed.memory.peak_bytes == plan.smallest_peak_bytes
    assert [change["yaml"] for change in plan.to_json()["what_to_change"]] == [c.yaml for c in plan.what_to_change]


def test_keys_of_one_section_stand_together():
    settings = {"training.a": 1, "placement": "host", "training.b": True}
    assert as_yaml(settings) == "training:\n  a: 1\n  b: true\nplacement: host\n"
