"""Experts offloaded to the host or to disk: the same bytes, the same results, two layers at a time."""

import copy
import re
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from expertune.adapt.attach import attach
from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.reader import read_header
from expertune.config import ExpertsSection, LoraSection
from expertune.experts.module import Nf4Experts
from expertune.experts.replay import with_replay
from expertune.kernels.nf4 import Nf4Bytes
from expertune.placement import Location
from expertune.placement.experts import Placement, expert_reader, placement_of
from tests.tiny_models import load_tiny, random_rows, save_tiny_model

LAYERS = 4
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A layer's packed experts take 3 MB, so that pages show.
    return save_tiny_model(
        tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS, hidden_size=256, intermediate_size=1024, head_dim=64
    )


def placed(folder: Path, tmp_path: Path) -> tuple[LoadedModel, Placement]:
    """A loaded model whose experts also lie in a file for each layer."""
    loaded = load_tiny(folder)
    modules = {name: module for name, module in loaded.model.named_modules() if isinstance(module, Nf4Experts)}
    files = {}
    for number, (name, module) in enumerate(modules.items()):
        keys = [f"{stack}.{field}" for stack in ("gate_up", "down") for field in Nf4Bytes._fields]
        tensors = dict(zip(keys, (*module.gate_up.bytes, *module.down.bytes), strict=True))
        path = tmp_path / f"layer-{number}.safetensors"
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)
        path.chmod(0o444)
        header = read_header(path)
        files[name] = [header[key] for key in keys]
    placement = Placement(modules, CPU, files)
    loaded.model.expert_placement = placement
    return loaded, placement


def step(model: nn.Module, checkpointing: bool) -> list[Tensor]:
    """Loss and gradients of a step that trains what lies around the experts."""
    torch.manual_seed(1)
    rows = random_rows()
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable(with_replay(None))
    leaves = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = model(input_ids=rows, labels=rows, use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_identical(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def everywhere(placement: Placement, location: Location) -> dict[str, Location]:
    return dict.fromkeys(placement.experts, location)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "no checkpointing"])
@pytest.mark.parametrize(
    ("location", "separate_host"),
    [("disk", False), ("disk", True), ("host", True)],
    ids=["mapped", "disk to slots", "host to slots"],
)
def test_step_is_byte_identical_wherever_experts_are_held_and_takes_two_transfers_of_each_layer(
    folder: Path, tmp_path: Path, location: Location, separate_host: bool, checkpointing: bool
) -> None:
    loaded, placement = placed(folder, tmp_path)
    expected = step(loaded.model, checkpointing)
    # What a GPU does with offloaded layers, with the CPU as the device that computes.
    placement.separate_host = separate_host
    placement.move(everywhere(placement, location))
    assert_identical(step(loaded.model, checkpointing), expected)
    first = placement.describe()
    assert first["layers"] == {location: LAYERS}
    # The last layer of forward is the first of backward, and the last of backward the first of the next step.
    assert first["transfers"] == 2 * LAYERS - 1
    assert_identical(step(loaded.model, checkpointing), expected)
    assert placement.describe()["transfers"] == first["transfers"] + 2 * LAYERS - 2


@pytest.mark.parametrize(
    "separate_host", [pytest.param(False, id="mapped", marks=pytest.mark.slow), pytest.param(True, id="disk to slots")]
)
@pytest.mark.parametrize("kind", ["dora", "some experts"])
def test_steps_of_an_adapter_are_byte_identical_where_experts_are_on_disk(
    folder: Path, tmp_path: Path, kind: str, separate_host: bool
) -> None:
    loaded, placement = placed(folder, tmp_path)
    placement.separate_host = separate_host
    some = ExpertsSection(share=0.5, layers={name: [2, 0] for name in placement.experts})
    lora = LoraSection(r=2, targets=["experts"], use_dora=kind == "dora", experts=some if kind != "dora" else None)
    resident, on_disk = [], []
    for losses, location in ((resident, "device"), (on_disk, "disk")):
        placement.move(everywhere(placement, cast("Location", location)))
        torch.manual_seed(1)
        model, rows = attach(copy.deepcopy(loaded), lora, str(folder)), random_rows()
        model.train().activation_checkpointing_enable()
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        for _ in range(3):  # norms are those of the factors of each step
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert on_disk == resident
    assert len(set(resident)) == 3
    assert placement.describe()["transfers"] > 3 * LAYERS


def test_recomputation_without_replay_shares_its_transfer_with_backward(folder: Path, tmp_path: Path) -> None:
    loaded, placement = placed(folder, tmp_path)
    expected = step(loaded.model, checkpointing=True)
    placement.move(everywhere(placement, "disk"))
    loaded.model.activation_checkpointing_enable({"use_reentrant": False})
    assert_identical(step(loaded.model, checkpointing=False), expected)
    assert placement.describe()["transfers"] == 2 * LAYERS - 1


def test_evaluation_prefetches_the_first_layer_while_the_last_one_computes(folder: Path, tmp_path: Path) -> None:
    loaded, placement = placed(folder, tmp_path)
    rows = random_rows()
    with torch.no_grad():
        expected = loaded.model(rows, use_cache=False).logits
        placement.move(everywhere(placement, "disk"))
        for _ in range(2):
            assert torch.equal(loaded.model(rows, use_cache=False).logits, expected)
    assert placement.describe()["transfers"] == 2 * LAYERS + 1


def test_layers_may_be_held_at_different_locations(folder: Path, tmp_path: Path) -> None:
    loaded, placement = placed(folder, tmp_path)
    expected = step(loaded.model, checkpointing=True)
    first, *_, last = placement.experts
    placement.move({first: "disk", last: "disk"})
    assert_identical(step(loaded.model, checkpointing=True), expected)
    assert placement.describe()["layers"] == {"disk": 2, "device": LAYERS - 2}
    placement.move(everywhere(placement, "device"))
    assert_identical(step(loaded.model, checkpointing=True), expected)
    assert placement.describe() == {"layers": {"device": 4}, "streamed_bytes": 0, "transfers": 0, "waited_seconds": 0.0}


def test_layer_without_a_file_cannot_be_offloaded_to_disk(folder: Path) -> None:
    loaded = load_tiny(folder)
    modules = {name: module for name, module in loaded.model.named_modules() if isinstance(module, Nf4Experts)}
    placement = Placement(modules, CPU)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: no NF4 folder holds these experts"):
        placement.move(everywhere(placement, "disk"))


def test_location_that_nobody_handles_is_refused_and_not_taken_for_the_device(folder: Path) -> None:
    loaded = load_tiny(folder)
    modules = {name: module for name, module in loaded.model.named_modules() if isinstance(module, Nf4Experts)}
    placement = Placement(modules, CPU)
    elsewhere = dict.fromkeys(modules, cast("Location", "ranks"))
    with pytest.raises(AssertionError, match="ranks"):
        placement.move(elsewhere)
    with pytest.raises(AssertionError, match="ranks"):
        expert_reader(elsewhere, CPU)(next(iter(modules)), {})


def resident_bytes(folder: Path) -> dict[str, int]:
    """Resident bytes of each mapped file in a folder."""
    found: dict[str, int] = {}
    name = None
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = Path(line.split(maxsplit=5)[-1])
            name = path.name if path.parent == folder else None
        elif name and line.startswith("Rss:"):
            found[name] = found.get(name, 0) + 1024 * int(line.split()[1])
    return found


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="resident pages by file are read from /proc")
def test_no_more_than_the_layer_in_use_is_resident_of_those_on_disk(folder: Path, tmp_path: Path) -> None:
    loaded, placement = placed(folder, tmp_path)
    placement.move(everywhere(placement, "disk"))
    seen: list[int] = []

    def look(*_: object) -> None:
        seen.append(sum(resident > 2**20 for resident in resident_bytes(tmp_path).values()))

    for module in placement.experts.values():
        module.register_forward_hook(look)
    step(loaded.model, checkpointing=True)
    assert len(seen) >= LAYERS
    assert max(seen) == 1


def test_model_moved_or_copied_leaves_bytes_on_disk_where_they_are(folder: Path, tmp_path: Path) -> None:
    loaded, placement = placed(folder, tmp_path)
    placement.move(everywhere(placement, "disk"))
    before = next(iter(placement.experts.values())).gate_up.packed.data_ptr()
    loaded.model.to(torch.bfloat16)
    assert next(iter(placement.experts.values())).gate_up.packed.data_ptr() == before
    loaded.model.to(torch.float32)
    rows = random_rows()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(loaded.model)(rows).logits, loaded.model(rows).logits)


def test_offload_more_moves_half_of_what_is_resident_until_nothing_is_left(folder: Path, tmp_path: Path) -> None:
    loaded, placement = placed(folder, tmp_path)
    expected = step(loaded.model, checkpointing=True)
    assert placement_of(loaded.model) is placement
    assert placement.offload_more() == "experts of 2 layers are offloaded to disk"
    assert_identical(step(loaded.model, checkpointing=True), expected)
    assert placement.offload_more() == "experts of 1 layer are offloaded to disk"
    assert placement.offload_more() == "experts of 1 layer are offloaded to disk"
    assert placement.offload_more() is None
    assert_identical(step(loaded.model, checkpointing=True), expected)


def test_offload_more_moves_to_the_host_where_its_memory_is_separate(folder: Path, tmp_path: Path) -> None:
    loaded, placement = placed(folder, tmp_path)
    expected = step(loaded.model, checkpointing=True)
    placement.separate_host = True
    assert placement.offload_more() == "experts of 2 layers are offloaded to the host"
    assert placement.describe()["layers"] == {"host": 2, "device": 2}
    assert_identical(step(loaded.model, checkpointing=True), expected)
    assert [placement.offload_more() for _ in range(3)][-1] == "experts of 2 layers are offloaded to disk"
    assert_identical(step(loaded.model, checkpointing=True), expected)


def test_model_without_a_placement_has_none(folder: Path) -> None:
    assert placement_of(load_tiny(folder).model) is None


@pytest.mark.parametrize("location", ["host", "disk"])
def test_adapters_of_offloaded_experts_live_where_the_experts_compute(
    folder: Path, tmp_path: Path, location: Location
) -> None:
    loaded, on_cpu = placed(folder, tmp_path)
    # The meta device stands for any that is not the host.
    placement = Placement(on_cpu.experts, torch.device("meta"), on_cpu.files)
    placement.move(everywhere(placement, location))
    assert {module.down.packed.device for module in placement.experts.values()} == {CPU}
    model = attach(loaded, LoraSection(r=2, targets=["w1", "w2", "w3"]), str(folder))
    factors = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert len(factors) == 6 * LAYERS
    assert {factor.device.type for factor in factors} == {"meta"}
