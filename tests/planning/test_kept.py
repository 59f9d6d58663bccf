"""How many expert layers keep gate and up for backward, and what that does to the plan."""

from dataclasses import replace

import pytest

from expertune.config import parse_config
from expertune.errors import ConfigError
from expertune.planning import make_plan
from expertune.planning.devices import Machine
from expertune.planning.kept import choose_kept
from expertune.planning.placement import PlannedPlacement
from expertune.planning.plan import Started, plan_for
from expertune.text import format_size

from .conftest import TUTORIAL_LORA
from .test_fit import HUNGRY, MIXTRAL, shown

# Of a layer: two experts for each of 320 tokens, gate and up in float32.
OF_LAYER = 320 * 2 * 2 * 14336 * 4
FLOAT32 = {"compute_dtype": "float32"}
GB = 10**9


@pytest.fixture
def run(run_of):
    """Mixtral on a CPU; keyword arguments are sections of the run file."""
    return lambda **sections: run_of(MIXTRAL, **{"quantization": FLOAT32, "lora": TUTORIAL_LORA} | sections)


def plan_of(config, **arguments):
    return make_plan(config, device="cpu", **arguments)


def notes_of(plan):
    """What a plan notes of gate and up."""
    return [note for note in plan.notes if "gate and up" in note]


def test_half_of_what_a_run_leaves_free_is_for_gate_and_up(run):
    without = plan_of(run(kernels={"keep": 0}))
    assert without.kept.layers == 0
    assert without.kept.line is None
    plan = plan_of(run(memory_budget=without.memory.peak_bytes + 12 * OF_LAYER))
    assert (plan.kept.layers, plan.kept.of_layers, plan.kept.num_bytes) == (6, 32, 6 * OF_LAYER)
    assert plan.memory.phases["layer"]["gate_up"] == 6 * OF_LAYER
    assert plan.kept.peak_bytes_without == without.memory.peak_bytes
    assert plan.memory.peak_bytes <= without.memory.peak_bytes + 6 * OF_LAYER
    assert "half of what is free" in plan.kept.reason


def test_all_layers_keep_them_where_there_is_plenty(run):
    plan = plan_of(run(memory_budget="200GB"))
    assert plan.kept.layers == plan.kept.of_layers == 32
    assert plan.kept.reason is None
    text = shown(plan, 120)
    assert "gate and up of all 32 expert layers" in text
    assert "peak without gate and up" in text


def test_a_size_bounds_what_is_kept_and_so_does_the_memory(run):
    peak = plan_of(run(kernels={"keep": 0})).memory.peak_bytes
    plan = plan_of(run(kernels={"keep": 3 * OF_LAYER + 1}, memory_budget=peak + 12 * OF_LAYER))
    assert (plan.kept.layers, plan.kept.reason) == (3, "kernels.keep is 220 MB")
    scarce = plan_of(run(kernels={"keep": "50GB"}, memory_budget=peak + 12 * OF_LAYER))
    assert scarce.kept.layers == 12
    assert scarce.fits
    assert plan_of(run(kernels={"keep": "50GB"}, memory_budget=peak - 1)).kept.layers == 0


@pytest.mark.parametrize("keep", ["-1", "some", "12"])
def test_a_size_that_is_none_is_refused_by_the_key(run_of, keep):
    with pytest.raises(ConfigError, match=r"kernels\.keep"):
        run_of(MIXTRAL, kernels={"keep": keep})


@pytest.mark.parametrize("keep", [0, "0", "1GiB", "auto"])
def test_a_size_may_be_none_at_all(keep):
    config = parse_config({"model": "m", "data": {"train": "a.jsonl"}, "output_dir": "o", "kernels": {"keep": keep}})
    assert config.kernels.keep_bytes == {"1GiB": 2**30, "auto": None}.get(keep, 0)


@pytest.mark.parametrize(
    ("device", "sections"),
    [
        ("cuda", {}),
        ("cpu", {"quantization": {"compute_dtype": "float16"}}),
        ("cpu", {"lora": {"r": 8, "use_dora": True}}),
    ],
)
def test_nothing_is_planned_for_where_layers_compute_them_again(run, device, sections):
    plan = make_plan(run(memory_budget="200GB", **sections), device=device)
    assert plan.kept.layers == 0
    assert "again" in plan.kept.reason
    assert "gate_up" not in plan.memory.phases["layer"]


@pytest.mark.parametrize("budget", ["28GB", "30GB", "34GB", "40GB", "60GB"])
def test_nothing_else_is_decided_otherwise_for_their_sake(run, budget):
    kept, without = (
        plan_of(run(memory_budget=budget, training=HUNGRY, kernels={"keep": keep})) for keep in ("auto", 0)
    )
    assert kept.micro_batch == without.micro_batch
    assert kept.planned == without.planned
    assert kept.fits == without.fits
    assert kept.changed_settings == without.changed_settings
    assert kept.kept.layers == 0 or kept.fits


def test_they_are_held_from_forward_to_backward_and_in_no_other_phase(run):
    data = {"train": "a.jsonl", "eval": "b.jsonl", "max_length": 320}
    sections = {"objective": "dpo", "data": data, "lora": {"r": 8}}
    plan = plan_of(run(memory_budget="200GB", **sections))
    holds = {phase for phase, components in plan.memory.phases.items() if "gate_up" in components}
    assert holds == {"loss", "layer", "reference"}
    assert plan.kept.num_bytes == 2 * 32 * OF_LAYER  # of both sides of a pair


def test_a_step_is_spared_two_of_eight_products_of_each_layer_that_keeps_them(run):
    times = [plan_of(run(memory_budget="200GB", kernels={"keep": keep})).time for keep in (0, 16 * OF_LAYER, "auto")]
    product = 2 * 320 * 2 * 14336 * 4096
    none, half, all_ = (time.flops for time in times)
    assert none - half == pytest.approx(16 * 2 * product, rel=1e-12)
    assert none - all_ == pytest.approx(32 * 2 * product, rel=1e-12)
    assert times[2].seconds < times[1].seconds < times[0].seconds


def test_what_is_mapped_finds_room_in_the_page_cache_first(run):
    plan = plan_of(run(memory_budget="200GB", kernels={"keep": 0}))
    workload = replace(plan.pace.cost.workload, kept_layers=0)
    mapped = PlannedPlacement({}, offloaded=(750 * 10**6,) * 32)

    def layers(free, placement):
        return choose_kept(
            workload, placement, None, 10 * GB + free, lambda w: 10 * GB + w.kept_layers * OF_LAYER
        ).layers

    assert layers(20 * GB, PlannedPlacement({})) == 32
    assert layers(20 * GB, mapped) == 0
    assert layers(24 * GB + 8 * OF_LAYER, mapped) == 4


def test_a_resumed_run_keeps_as_many_as_before_or_fewer_where_memory_has_gone(run):
    peak = plan_of(run(kernels={"keep": 0})).memory.peak_bytes
    again = plan_of(run(memory_budget="200GB"), started=Started(kept_layers=5))
    assert (again.kept.layers, again.kept.reason) == (5, "as the run started")
    # Records of releases that kept nothing have no number.
    assert plan_of(run(memory_budget="200GB"), started=Started()).kept.layers == 0
    fewer = plan_of(run(memory_budget=peak + 3 * OF_LAYER), started=Started(kept_layers=5))
    assert fewer.kept.layers == 3
    assert "4 would take more than what is free" in fewer.kept.reason


def test_a_plan_says_that_a_resumed_run_keeps_fewer_and_is_no_more_the_same_to_the_byte(run):
    peak = plan_of(run(kernels={"keep": 0})).memory.peak_bytes
    fewer = plan_of(run(memory_budget=peak + 3 * OF_LAYER), started=Started(kept_layers=5))
    assert notes_of(fewer) == [fewer.kept.note]
    text = " ".join(shown(fewer, 120).split())
    assert "note: 3 of 32 expert layers keep gate and up, and the run started with 5: 4 would take more than" in text
    assert "continues to rounding" in text
    assert not notes_of(plan_of(run(memory_budget="200GB"), started=Started(kept_layers=5)))


@pytest.mark.parametrize(
    ("device", "sections", "why"),
    [
        ("cuda", {}, ": on a GPU"),
        ("cpu", {"quantization": {"compute_dtype": "float16"}}, ": in float16"),
        ("cpu", {"lora": {"r": 8, "use_dora": True}}, ": with DoRA"),
        ("cpu", {"memory_budget": "30GB", "training": {"per_device_train_batch_size": 40}}, ": 1 would take more than"),
        ("cpu", {"kernels": {"keep": "1MB"}}, ""),
    ],
)
def test_a_size_that_keeps_nothing_is_noted_with_the_reason_and_auto_is_silent(run, device, sections, why):
    asked = {"memory_budget": "200GB", "kernels": {"keep": "20GB"}} | sections
    plan = make_plan(run(**asked), device=device)
    assert plan.kept.layers == 0
    (note,) = notes_of(plan)
    size = asked["kernels"]["keep"].replace("GB", ".00 GB").replace("1MB", "1 MB")
    assert note.startswith(f"kernels.keep: {size} keeps nothing{why}")
    assert "gate and up of one expert layer take" in note
    for silent in ("auto", 0):
        if asked["kernels"]["keep"] != "1MB":
            assert not notes_of(make_plan(run(**asked | {"kernels": {"keep": silent}}), device=device))


def test_the_size_of_one_layer_is_named_where_the_run_file_has_less(run):
    (note,) = notes_of(plan_of(run(memory_budget="200GB", kernels={"keep": OF_LAYER - 1})))
    assert note.endswith(f"gate and up of one expert layer take {format_size(OF_LAYER)}")
    assert plan_of(run(memory_budget="200GB", kernels={"keep": OF_LAYER})).kept.layers == 1


def test_where_experts_are_shared_out_a_rank_may_receive_the_tokens_of_all(run):
    def plan(keep, ranks=2):
        config = run(memory_budget="200GB", kernels={"keep": keep}, distributed={"experts": "parallel"})
        return plan_for(config, Machine.of(config, "cpu", devices=ranks))

    auto = plan("auto")
    assert auto.kept.layers == 0
    assert "a rank can receive 2 times its own tokens" in auto.kept.reason
    assert not notes_of(auto)
    sized = plan(7 * OF_LAYER)
    assert (sized.kept.layers, sized.kept.num_bytes) == (3, 6 * OF_LAYER)
    assert sized.memory.phases["layer"]["gate_up"] == 6 * OF_LAYER
    # Of eight experts on eight ranks each has one, and a token chooses it once at most.
    assert plan(9 * OF_LAYER, ranks=8).kept.num_bytes == 2 * 4 * OF_LAYER


def test_layers_before_the_first_adapted_one_are_not_counted(run):
    targets = [f"model.layers.{layer}.self_attn.q_proj" for layer in (29, 31)]
    plan = plan_of(run(memory_budget="200GB", lora={"r": 8, "targets": targets}))
    assert (plan.kept.layers, plan.kept.of_layers, plan.kept.num_bytes) == (3, 3, 3 * OF_LAYER)
    assert plan.kept.reason is None
