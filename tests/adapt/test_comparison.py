"""What the preflight check compares: every position of whole sequences, and every byte that experts hold in memory."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertune.adapt.comparison import BaseForward, base_forward, probe_logits
from expertune.adapt.few_tokens import choose_tokens
from expertune.adapt.frozen_bytes import _checksum, expert_checksums, first_changed
from expertune.adapt.preflight import preflight
from expertune.checkpoint.load import LoadedModel
from expertune.errors import PreflightError
from expertune.experts.module import Nf4Experts
from expertune.placement.experts import Placement
from tests.adapt.conftest import adapt
from tests.families.build import tiny_config
from tests.placement.test_experts import everywhere, placed
from tests.tiny_models import VOCABULARY, load_tiny, save_random, save_tiny_model

EXPERTS = "model.layers.1.mlp.experts"
LENGTH = 128
Batch = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def resident(folder: Path, tmp_path: Path) -> tuple[LoadedModel, Placement]:
    return placed(folder, tmp_path)


@pytest.fixture
def on_disk(resident: tuple[LoadedModel, Placement]) -> tuple[LoadedModel, Placement]:
    resident[1].move(everywhere(resident[1], "disk"))
    return resident


def one_sequence(length: int = LENGTH) -> Batch:
    ids = torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def check(loaded: LoadedModel, base: BaseForward, batch: Batch | None = None) -> dict[str, Any]:
    model = adapt(loaded, targets=["attention", "experts"], dropout=0.0)
    return preflight(model, batch or base.batch, base)


def experts_of(loaded: LoadedModel) -> Nf4Experts:
    experts = loaded.model.get_submodule(EXPERTS)
    assert isinstance(experts, Nf4Experts)
    return experts


# ---- positions


def drifts_at(position: int) -> Callable[..., Tensor]:
    """A hook of a module that gives other numbers each time, from a position on."""
    calls: list[int] = []

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        calls.append(1)
        drifted = output.clone()
        drifted[:, position:] += 1e-3 * len(calls)
        return drifted

    return hook


@pytest.mark.parametrize("position", [33, LENGTH - 1])
@pytest.mark.parametrize("part", ["input_layernorm", "self_attn", "mlp"])
def test_drift_late_in_a_long_sequence_is_told_with_experts_on_disk(
    part: str, position: int, on_disk: tuple[LoadedModel, Placement]
) -> None:
    loaded, _ = on_disk
    base = base_forward(loaded.model, one_sequence())
    hook = drifts_at(position)
    module = loaded.model.get_submodule(f"model.layers.1.{part}")
    module.register_forward_hook(
        lambda module, inputs, output: (
            (hook(module, inputs, output[0]), *output[1:])
            if isinstance(output, tuple)
            else hook(module, inputs, output)
        )
    )
    with pytest.raises(PreflightError, match="the model is not repeatable"):
        check(loaded, base)


def test_drift_of_experts_in_late_tokens_is_told_with_experts_on_disk(
    on_disk: tuple[LoadedModel, Placement],
) -> None:
    loaded, _ = on_disk
    base = base_forward(loaded.model, one_sequence())
    experts_of(loaded).register_forward_hook(
        lambda module, inputs, output: torch.cat([output[:-1], output[-1:] + 1e-3 * torch.randn_like(output[-1:])])
    )
    with pytest.raises(PreflightError, match=r"two forwards .* differ by .* not repeatable"):
        check(loaded, base)


def padded(batch: Batch) -> Batch:
    mask = torch.ones_like(batch["input_ids"])
    mask[:, :100] = 0
    return batch | {"attention_mask": mask}


@pytest.mark.parametrize("make", [dict, padded], ids=["one sequence", "padded"])
@pytest.mark.parametrize("where", ["device", "disk"])
def test_all_tokens_are_compared_and_experts_on_disk_compute_a_few_each(
    where: Any, make: Callable[[Batch], Batch], resident: tuple[LoadedModel, Placement]
) -> None:
    loaded, placement = resident
    placement.move(everywhere(placement, where))
    tokens: dict[bool, set[int]] = {True: set(), False: set()}
    experts = experts_of(loaded)
    forward = experts.forward

    def count(hidden: Tensor, *others: Any) -> Tensor:
        if not experts.passed_by:
            tokens[torch.is_grad_enabled()].add(len(hidden))
        return forward(hidden, *others)

    experts.forward = count
    base = base_forward(loaded.model, make(one_sequence()))
    found = check(loaded, base)["effective"]
    assert base.logits.shape == (1, LENGTH, VOCABULARY)
    assert found["tokens"] == LENGTH
    if where == "device":
        assert tokens == {True: {LENGTH}, False: {LENGTH}}
        assert found["expert_tokens"] == LENGTH
    else:
        assert max(tokens[True] | tokens[False]) <= 4 * experts.num_experts
        assert max(tokens[False]) <= found["expert_tokens"] <= 4 * experts.num_experts


def test_experts_give_the_tokens_that_they_compute_what_they_give_in_any_forward_and_others_zero(
    resident: tuple[LoadedModel, Placement],
) -> None:
    loaded, placement = resident
    batch = one_sequence(40)
    few = probe_logits(loaded.model, batch, enough=2)
    indices: dict[nn.Module, Tensor] = {}
    for experts in placement.experts.values():
        experts.register_forward_pre_hook(lambda module, inputs: indices.update({module: inputs[1]}))

        def chosen_alone(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            tokens_S = choose_tokens(indices[module], enough=2)
            assert 0 < len(tokens_S) < 40
            return torch.zeros_like(output).index_copy(0, tokens_S, output[tokens_S])

        experts.register_forward_hook(chosen_alone)
    torch.testing.assert_close(few, probe_logits(loaded.model, batch), rtol=1e-5, atol=1e-5)


# ---- bytes that no token reaches


def unreached(loaded: LoadedModel) -> tuple[BaseForward, int]:
    """A forward of few tokens, and an expert that none of them reaches."""
    reached: set[int] = set()
    handle = experts_of(loaded).register_forward_pre_hook(
        lambda module, inputs: reached.update(inputs[1].flatten().tolist())
    )
    base = base_forward(loaded.model, one_sequence(1))
    handle.remove()
    return base, min(set(range(4)) - reached)


@pytest.mark.parametrize("what", ["packed", "absmax", "nested_absmax", "offset"])
@pytest.mark.parametrize("where", ["device", "host"])
def test_byte_of_an_expert_that_no_token_reaches_is_compared(
    where: Any, what: str, resident: tuple[LoadedModel, Placement]
) -> None:
    loaded, placement = resident
    placement.separate_host = True
    placement.move(everywhere(placement, where))
    base, expert = unreached(loaded)
    with torch.no_grad():
        # Through `data`, as nothing that torch counts would show it.
        getattr(experts_of(loaded).down, what).data[expert].view(-1).view(torch.uint8)[1] ^= 1
    with pytest.raises(PreflightError, match=rf"{EXPERTS}\S*: some bytes of its experts .* changed the base"):
        check(loaded, base, one_sequence())


def test_bias_of_an_expert_is_compared(tmp_path: Path) -> None:
    loaded = load_tiny(save_random(tmp_path, tiny_config("gpt_oss")))
    before = expert_checksums(loaded.model)
    assert first_changed(loaded.model, before) is None
    with torch.no_grad():
        experts_of(loaded).down_proj_bias[3, 5] += 0.125
    assert first_changed(loaded.model, before) == EXPERTS


def test_same_experts_in_another_order_are_told(resident: tuple[LoadedModel, Placement]) -> None:
    loaded, _ = resident
    before = expert_checksums(loaded.model)
    with torch.no_grad():
        for tensor in experts_of(loaded).down.bytes:
            tensor.copy_(tensor.flip(0).clone())
    assert first_changed(loaded.model, before) == EXPERTS


@pytest.mark.parametrize("rows", [1, 5])
def test_words_in_another_order_within_a_row_of_the_checksum_are_told(rows: int) -> None:
    one, other = torch.nn.Module(), torch.nn.Module()
    one.register_buffer("held", torch.randint(0, 256, (rows, 64, 8), dtype=torch.uint8))
    other.register_buffer("held", one.held.flip(1))
    assert _checksum(one) != _checksum(other)


def test_one_less_and_one_more_in_two_words_is_told() -> None:
    one, other = torch.nn.Module(), torch.nn.Module()
    one.register_buffer("held", torch.arange(640))
    other.register_buffer("held", one.held + (one.held == 70).long() - (one.held == 75).long())
    assert _checksum(one) != _checksum(other)


def test_checksums_are_the_same_wherever_experts_are_by_now(resident: tuple[LoadedModel, Placement]) -> None:
    loaded, placement = resident
    placement.separate_host = True
    before = expert_checksums(loaded.model)
    assert len(before) == len(placement.experts)
    placement.move(everywhere(placement, "host"))
    assert expert_checksums(loaded.model) == before
    placement.move(everywhere(placement, "disk"))
    assert expert_checksums(loaded.model) == {}
    assert first_changed(loaded.model, before) is None


@pytest.mark.parametrize("changed", [None, 0, 511, 512, 1022])
def test_checksum_is_of_every_byte_wherever_a_tensor_begins_in_its_memory(changed: int | None) -> None:
    values = torch.randint(0, 256, (1024,), dtype=torch.uint8)
    one, other = torch.nn.Module(), torch.nn.Module()
    one.register_buffer("held", values[1:])
    other.register_buffer("held", values[1:].clone())
    if changed is not None:
        other.held[changed] ^= 0x80
    assert (_checksum(one) == _checksum(other)) == (changed is None)


# ---- memory


@pytest.mark.parametrize("order", ["one after the other", "in turns"])
def test_no_more_than_three_logits_are_there_at_once_and_those_with_a_loss_beside_the_bases_alone(
    order: str, resident: tuple[LoadedModel, Placement]
) -> None:
    """Which is what a plan counts: it knows the loss as the highest."""
    loaded, placement = resident
    if order == "in turns":
        placement.move(everywhere(placement, "disk"))
    base = base_forward(loaded.model, one_sequence())
    alive: list[weakref.ref[Tensor]] = []
    most = {True: 0, False: 0}

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        alive.append(weakref.ref(output))
        there = sum(each() is not None for each in alive)
        is_training = torch.is_grad_enabled()
        most[is_training] = max(most[is_training], there)

    loaded.model.get_output_embeddings().register_forward_hook(count)
    check(loaded, base)
    assert most == {True: 1, False: 2}
    assert sum(each() is not None for each in alive) == 0
