"""What each of several ranks holds and sends, and how they hold the experts where the run file leaves that open."""

import json

import pytest

import expertune
from expertune.errors import ConfigError
from expertune.gpus import ETHERNET_100, ETHERNET_400, INFINITY_FABRIC, NVLINK, NVLINK_3, NVLINK_5, PCIE
from expertune.planning.communication import Traffic
from expertune.planning.devices import Machine
from expertune.planning.distribution import Distribution
from expertune.planning.plan import plan_for
from expertune.planning.ranks import ModePlan, choose_mode

from .conftest import TUTORIAL_LORA
from .test_fit import shown

MIXTRAL = "mixtral-8x7b-v0.1"

# Factors of rank 8 on all experts of Mixtral-8x7B, and on attention and output head, in float32.
OF_EXPERTS = 113_246_208 * 4
OF_OTHERS = (120_350_720 - 113_246_208) * 4


@pytest.fixture(scope="module")
def made():
    """Plans that tests of this module have in common."""
    return {}


@pytest.fixture
def planned(run_of, made):
    """A plan of Mixtral-8x7B for several devices, 320 tokens on each."""

    def plan(devices, gpu="h100", **sections):
        key = json.dumps([devices, gpu, sections])
        if key not in made:
            sections = {"lora": TUTORIAL_LORA, "placement": "auto", "memory_budget": None} | sections
            config = run_of(MIXTRAL, **sections)
            made[key] = plan_for(config, Machine.of(config, gpu=gpu, devices=devices))
        return made[key]

    return plan


@pytest.fixture
def modes_of(planned):
    def modes(*args, **kwargs):
        return {mode.distribution.mode: mode for mode in planned(*args, **kwargs).ranks.modes}

    return modes


def test_replicated_experts_average_all_gradients(modes_of):
    # A ring all_reduce sends each byte to 3/4 of the ranks, twice.
    traffic = modes_of(4)["replicate"].traffic
    assert traffic == Traffic(gradient_bytes=(OF_EXPERTS + OF_OTHERS) * 2 * 3 // 4)


def test_tokens_travel_to_shared_out_experts_whose_gradients_stay(modes_of):
    parallel = modes_of(4)["parallel"]
    # 320 tokens, each for 3/4 of 52/28 other ranks in 32 layers: five hidden states of 4096 numbers in bfloat16, the
    # router's two float32 weights three times, two numbers of 8 bytes; and in each layer 3 counts of 8 bytes.
    each = round(320 * 0.75 * 52 / 28 * (5 * 8192 + 3 * 8 + 2 * 8)) + 3 * 8
    assert parallel.traffic == Traffic(gradient_bytes=OF_OTHERS * 2 * 3 // 4, token_bytes=32 * each)
    assert parallel.experts_bytes == modes_of(4)["replicate"].experts_bytes // 4


def test_slices_are_gathered_for_each_pass_and_two_layers_held(modes_of, planned):
    shard = modes_of(4)["shard"]
    layer = modes_of(4)["replicate"].experts_bytes // 32
    assert 0 <= 4 * shard.experts_bytes - 32 * layer < 32 * 4 * 8 * 16  # buffers are cut at multiples of 16 bytes
    gathers = 31 * 2
    assert shard.traffic.gradient_bytes == (OF_EXPERTS + OF_OTHERS) * 2 * 3 // 4
    assert shard.traffic.weight_bytes == pytest.approx(gathers * layer * 3 / 4, rel=1e-6)
    plan = planned(4, distributed={"experts": "shard"})
    assert plan.memory.components["slots"] == pytest.approx(2 * layer, rel=1e-5)
    assert plan.weights.experts_bytes == shard.experts_bytes


def test_two_by_two_ranks_average_the_experts_that_two_of_them_have(modes_of):
    parallel = modes_of(4, distributed={"experts": "auto", "expert_parallel_size": 2})["parallel"]
    assert parallel.distribution == Distribution("parallel", 4, 2)
    assert parallel.traffic.gradient_bytes == OF_OTHERS * 2 * 3 // 4 + OF_EXPERTS // 2


def test_one_process_sends_nothing_and_holds_no_bucket(run_of):
    config = run_of(MIXTRAL, lora=TUTORIAL_LORA)
    plan = plan_for(config, Machine.of(config, gpu="h100", devices=1))
    assert plan.ranks is None
    assert plan.to_json()["ranks"] is None
    assert "average" not in plan.memory.phases


def test_gradients_are_averaged_in_a_bucket_of_32_mib_or_the_largest_tensor(planned):
    # A factor of all experts in a layer: 8 x 8 x 14336 float32 numbers, less than a bucket.
    assert planned(4).memory.phases["average"]["bucket"] == 2**25
    # Of rank 128, 16 times as large.
    wide = planned(4, lora=TUTORIAL_LORA | {"r": 128})
    assert wide.memory.phases["average"]["bucket"] == 8 * 128 * 14336 * 4
    # An adapter that is smaller than a bucket.
    few = planned(4, lora={"r": 8, "targets": ["lm_head"]})
    assert few.memory.phases["average"]["bucket"] == 288_768 * 4


def test_what_is_shown_fits_the_terminal(planned):
    plan = planned(4, gpu="rtx-4090")
    for width in (60, 120):
        lines = shown(plan, width).splitlines()
        assert max(map(len, lines)) <= width
        assert any(line.startswith("parallel") and "fits" in line for line in lines)
        assert "…" not in "".join(lines)


# --- which mode is taken -------------------------------------------------------------------------------------------


def mode(name, seconds, fits=True, offloads=False, peak=1):
    return ModePlan(
        Distribution(name, 4, 4 if name == "parallel" else 1), peak, 1, 0, fits, offloads, Traffic(), seconds
    )


def chosen(*modes, asked="auto"):
    found = choose_mode(asked, modes, NVLINK)
    return found.chosen.distribution.mode, found.reason


def test_auto_replicates_where_all_experts_fit_whatever_is_faster():
    assert chosen(mode("replicate", 9), mode("parallel", 1)) == ("replicate", "all experts fit on each device")


def test_auto_takes_the_faster_of_the_others_where_they_do_not():
    name, reason = chosen(mode("replicate", 1, fits=False), mode("shard", 3), mode("parallel", 2))
    assert name == "parallel"
    assert reason == "not all experts fit on each device, and over NVLink 4 this is expected to be faster than shard"


def test_auto_keeps_experts_on_the_devices_before_it_offloads_them():
    name, reason = chosen(mode("replicate", 1, offloads=True), mode("parallel", 2))
    assert (name, reason) == ("parallel", "not all experts fit on each device")


def test_where_nothing_fits_the_smallest_peak_is_shown():
    name, reason = chosen(mode("replicate", 1, fits=False, peak=9), mode("parallel", 2, fits=False, peak=5))
    assert (name, reason) == ("parallel", "no mode fits, and this one lacks least")


def test_what_the_run_file_says_is_taken():
    assert chosen(mode("replicate", 1), mode("parallel", 2), asked="parallel") == (
        "parallel",
        "as distributed.experts is set",
    )


def test_plan_of_a_run_takes_its_mode_and_says_why(planned):
    on_large = planned(4)
    assert on_large.ranks.line == "4, experts: replicate; all experts fit on each device"
    on_small = planned(4, gpu="rtx-4090")
    assert on_small.ranks.chosen.distribution.mode == "parallel"
    # All else in the plan is of that mode.
    assert on_small.weights.experts_bytes == on_small.ranks.chosen.experts_bytes
    assert on_small.memory.peak_bytes == on_small.ranks.chosen.peak_bytes
    assert on_small.time.tokens == 4 * 320
    # Save for the files, which are those of one process.
    assert on_small.disk == on_large.disk


def test_an_optimizer_that_mixes_experts_is_not_offered_with_shared_out_ones(modes_of):
    training = {"per_device_train_batch_size": 1, "optim": "adafactor"}
    assert "parallel" not in modes_of(4, training=training)
    assert "parallel" in modes_of(4)


@pytest.mark.parametrize(
    ("gpu", "devices", "link"),
    [("h100", 8, NVLINK), ("rtx-4090", 8, PCIE), ("h100", 16, ETHERNET_400), ("rtx-4090", 9, ETHERNET_100)],
)
def test_up_to_eight_devices_are_in_one_machine(run_of, gpu, devices, link):
    assert Machine.of(run_of(MIXTRAL), gpu=gpu, devices=devices).link == link


@pytest.mark.parametrize(("gpu", "link"), [("a100-80gb", NVLINK_3), ("b200", NVLINK_5), ("mi300x", INFINITY_FABRIC)])
def test_each_gpu_has_the_link_of_its_generation(planned, gpu, link):
    plan = planned(4, gpu=gpu)
    assert plan.ranks.link == link
    assert link.name in plan.to_json()["ranks"]["modes"][0]["link_seconds"]
    assert link.short in shown(plan, 120)


def test_eight_devices_on_two_machines_are_connected_by_a_network(run_of):
    config = run_of(MIXTRAL)
    assert Machine.of(config, gpu="h100", devices=8, local_size=4).link == ETHERNET_400
    assert Machine.of(config, gpu="h100", devices=8, local_size=8).link == NVLINK


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 100_000_000])
def test_number_of_devices_that_no_run_has_is_refused(run_of, count):
    with pytest.raises(ConfigError, match=f"devices is {count}: a run can be planned for 1 to 65,536"):
        expertune.plan(run_of(MIXTRAL), devices=count)


def test_ranks_that_do_not_divide_are_refused(planned):
    with pytest.raises(ConfigError, match="expert_parallel_size is 4, and 6 processes are no multiple of it"):
        planned(6, distributed={"expert_parallel_size": 4})


def test_more_ranks_than_experts_are_refused_where_they_are_asked_to_share_them(planned):
    with pytest.raises(ConfigError, match="shares 8 experts out to 16 processes"):
        planned(16, distributed={"experts": "parallel"})
    assert planned(16).ranks.modes[-1].distribution == Distribution("parallel", 16, 8)


def test_processes_on_cpus_are_planned_with_networks_alone(run_of):
    config = run_of(MIXTRAL)
    plan = plan_for(config, Machine.of(config, device="cpu", memory="64GB", devices=2))
    assert plan.ranks.link == ETHERNET_100
    assert "NVLink" not in shown(plan, 80)
    assert "PCIe" not in shown(plan, 80)
