"""Adapters that begin as the correction of what 4 bits lost: the best of their rank, whatever the scale and order."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertune.adapt.attach import attach
from expertune.adapt.initial import Correction, low_rank
from expertune.adapt.live import LiveAdapter, LivePair
from expertune.adapt.peft_model import ExpertPeftModel
from expertune.checkpoint.matrices import SourceMatrices
from expertune.checkpoint.moments import Moments, Place, collect_moments
from expertune.config import LoraSection, QuantizationConfig
from expertune.errors import CheckpointError
from expertune.experts.lora import ExpertsLora
from tests.tiny_models import copied, load_tiny

TEXT = torch.randint(3, 96, (1, 400), generator=torch.Generator().manual_seed(5))
SETTINGS = {"r": 6, "alpha": 21.0, "targets": ["attention", "experts"], "rank_pattern": {"w2": 3}}


@pytest.fixture(scope="module")
def folder(family_folder) -> Path:
    return family_folder("mixtral")


@pytest.fixture(scope="module")
def matrices(folder: Path) -> dict[Place, Tensor]:
    found: dict[Place, Tensor] = {}
    SourceMatrices(folder, QuantizationConfig()).stream(lambda place, matrix: found.update({place: matrix.float()}))
    return found


@pytest.fixture(scope="module")
def loaded(folder: Path):
    return load_tiny(folder)


@pytest.fixture(scope="module")
def moments(loaded) -> Moments:
    return collect_moments(loaded.model, [{"input_ids": TEXT}])


def test_features_of_a_matrix_that_the_sample_never_meets_count_alike(loaded, moments: Moments) -> None:
    model, layer = copied(loaded).model, "model.layers.0"
    unused = {"q": f"{layer}.self_attn.q_proj", "experts": f"{layer}.mlp.experts"}
    # As a family has them whose decoder layers hold experts for images beside those for text.
    model.add_module(
        "images", torch.nn.ModuleDict({key: deepcopy(model.get_submodule(name)) for key, name in unused.items()})
    )
    found = collect_moments(model, [{"input_ids": TEXT}])
    for place in (Place("images.q"), Place("images.experts", "gate", 1), Place("images.experts", "down", 3)):
        width = 128 if place.projection == "down" else 64
        assert found.of(place, width, "here").eq(1).all()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in moments.tensors.items())


def attached(loaded, folder: Path) -> ExpertPeftModel:
    return attach(copied(loaded), LoraSection(**SETTINGS), str(folder)).eval()


def corrected(model: ExpertPeftModel, matrices: dict[Place, Tensor], moments: Moments | None = None) -> Correction:
    made = Correction(model.get_base_model(), model.names, 0, moments)
    for place, matrix in matrices.items():
        made.take(place, matrix)
    return made


def pairs(model: ExpertPeftModel) -> dict[str, LivePair]:
    return {pair.name: pair for pair in LiveAdapter(model.get_base_model(), model.names).pairs()}


@torch.no_grad()
def lost(model: ExpertPeftModel, place: Place, matrix: Tensor) -> Tensor:
    """What 4 bits lost of a matrix."""
    layer = model.get_base_model().get_submodule(place.module)
    if isinstance(layer, ExpertsLora):
        return matrix - layer.base_layer.dequantize(place.expert, place.projection, torch.float32)
    return matrix - layer.get_base_layer()(torch.eye(matrix.shape[1])).T


def test_every_matrix_gets_the_best_correction_of_its_rank(loaded, folder: Path, matrices: dict[Place, Tensor]) -> None:
    model = attached(loaded, folder)
    made, held = corrected(model, matrices), pairs(model)
    assert made.experts.count + made.linears.count == len(held) == len(matrices)
    for place, matrix in matrices.items():
        pair, error = held[place.on_disk(model.names)], lost(model, place, matrix)
        left = torch.linalg.vector_norm(error - pair.scale * pair.b.detach() @ pair.a.detach())
        beyond = torch.linalg.svdvals(error)[len(pair.a) :].norm()
        torch.testing.assert_close(left, beyond, rtol=1e-3, atol=1e-6)


def test_rows_of_a_have_the_length_that_a_fresh_adapter_has(
    loaded, folder: Path, matrices: dict[Place, Tensor]
) -> None:
    model = attached(loaded, folder)
    before = torch.stack([pair.a.norm(dim=1).mean() for pair in pairs(model).values()]).mean()
    corrected(model, matrices)
    for pair in pairs(model).values():
        torch.testing.assert_close(pair.a.norm(dim=1), before.expand(len(pair.a)), rtol=0.1, atol=0)


def test_factors_do_not_depend_on_the_order_of_the_files(loaded, folder: Path, matrices: dict[Place, Tensor]) -> None:
    forwards, backwards = attached(loaded, folder), attached(loaded, folder)
    corrected(forwards, matrices)
    corrected(backwards, dict(reversed(matrices.items())))
    for one, other in zip(pairs(forwards).values(), pairs(backwards).values(), strict=True):
        assert torch.equal(one.a, other.a)
        assert torch.equal(one.b, other.b)


def test_a_sample_moves_the_correction_to_what_is_used(
    loaded, folder: Path, matrices: dict[Place, Tensor], moments: Moments
) -> None:
    plain, weighted = attached(loaded, folder), attached(loaded, folder)
    corrected(plain, matrices)
    corrected(weighted, matrices, moments)
    for place, matrix in matrices.items():
        root = moments.of(place, matrix.shape[1], "here").sqrt()
        errors = []
        for model in (plain, weighted):
            pair = pairs(model)[place.on_disk(model.names)]
            errors.append(
                float(((lost(model, place, matrix) - pair.scale * pair.b.detach() @ pair.a.detach()) * root).norm())
            )
        assert errors[1] <= errors[0] * (1 + 1e-5)


def test_moments_are_those_of_the_tokens_that_an_expert_sees(loaded, moments: Moments) -> None:
    name = next(iter(loaded.names.specs))
    seen: list[tuple[Tensor, ...]] = []
    handle = loaded.model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args))
    loaded.model(input_ids=TEXT)
    handle.remove()
    hidden, index = seen[0][:2]
    of_expert = hidden[(index == 1).any(dim=1)].detach()
    found = moments.of(Place(name, "gate", 1), hidden.shape[1], "here")
    # The layer's mean is mixed in as 32 tokens.
    chosen = torch.cat([hidden[(index == expert).any(dim=1)].detach() for expert in range(int(index.max()) + 1)])
    expected = (of_expert.square().sum(0) + 32 * chosen.square().mean(0)) / (len(of_expert) + 32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_calibration_of_another_model_is_refused(moments: Moments, tmp_path: Path) -> None:
    moments.save(tmp_path / "calibration.safetensors")
    again = Moments.load(tmp_path / "calibration.safetensors")
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in moments.tensors.items())
    name = next(iter(moments.tensors))
    with pytest.raises(CheckpointError, match="it is another model's"):
        again.of(Place(name), 17, "file")
    with pytest.raises(CheckpointError, match="it is another model's"):
        again.of(Place("model.layers.99.self_attn.q_proj"), 64, "file")
    (tmp_path / "calibration.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Moments.load(tmp_path / "calibration.safetensors")


def test_a_large_matrix_is_approximated_almost_as_well_by_iterating() -> None:
    # A flat spectrum, as the error of quantizing has one, is the hardest to find a subspace of.
    matrix = torch.randn(900, 600, generator=torch.Generator().manual_seed(3))
    a, b = low_rank(matrix, 16, torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(matrix)
    found, best = (
        1 - float((matrix - b @ a).norm() / matrix.norm()) ** 2,
        float(values[:16].square().sum() / matrix.norm() ** 2),
    )
    assert found > 0.9 * best
    again = low_rank(matrix, 16, torch.Generator().manual_seed(1))
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])


def test_a_rank_beyond_the_matrix_leaves_nothing() -> None:
    matrix = torch.randn(8, 5)
    a, b = low_rank(matrix, 16, torch.Generator())
    assert a.shape == (5, 5)
    torch.testing.assert_close(b @ a, matrix, rtol=1e-4, atol=1e-5)
