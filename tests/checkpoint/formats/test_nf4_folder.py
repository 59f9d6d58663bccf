"""An NF4 folder loads to the model that its source loads to; a damaged one is refused by the name of its file."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from expertune.checkpoint.formats.nf4_folder import read_nf4_folder
from expertune.checkpoint.load import LoadedModel, LoadOptions, load_model
from expertune.checkpoint.reader import TensorEntry, read_header
from expertune.checkpoint.verified import verify
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ConfigError
from expertune.experts.module import Nf4Experts
from expertune.storage import hash_file
from tests.checkpoint.conftest import FolderOf, Rewrite
from tests.checkpoint.nf4_folders import assert_same_bytes, quantized, seal, weights
from tests.tiny_models import FAMILIES, load_tiny, random_rows, save_tiny_model


@pytest.fixture(scope="module")
def folder(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(mixtral, tmp_path_factory.mktemp("quantized") / "mixtral")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def logits(loaded: LoadedModel) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return loaded.model(random_rows(3, 16)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_folder_loads_to_the_bytes_and_logits_of_its_source(
    family: str, family_folder: FolderOf, tmp_path: Path
) -> None:
    source = family_folder(family)
    ours, direct = load_tiny(quantized(source, tmp_path / "out")), load_tiny(source)
    assert_same_bytes(ours, direct)
    assert torch.equal(logits(ours), logits(direct))
    assert ours.names.expert_on_disk(next(iter(ours.names.specs)), 1, "down") == direct.names.expert_on_disk(
        next(iter(direct.names.specs)), 1, "down"
    )
    assert not any(parameter.requires_grad for parameter in ours.model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_folder_loads_in_any_dtype_as_its_source_does(
    family: str, dtype: torch.dtype, family_folder: FolderOf, tmp_path: Path
) -> None:
    source = family_folder(family)
    ours, direct = load_tiny(quantized(source, tmp_path / "out"), dtype), load_tiny(source, dtype)
    assert_same_bytes(ours, direct)
    for name, tensor in direct.model.state_dict().items():
        assert ours.model.state_dict()[name].dtype == tensor.dtype, name
    assert torch.equal(logits(ours), logits(direct))


def test_source_of_mixed_dtypes_loads_to_the_same_values(rewrite: Rewrite, tmp_path: Path) -> None:
    """A tensor that is stored wider than the config says keeps its digits on the way through the folder."""
    key = "model.layers.0.block_sparse_moe.gate.weight"
    source = rewrite(lambda tensors: tensors.update({key: tensors[key].float() + 1e-6}))
    ours, direct = load_tiny(quantized(source, tmp_path / "out")), load_tiny(source)
    assert_same_bytes(ours, direct)


def test_rest_is_written_in_the_dtype_that_was_asked_for(mixtral: Path, tmp_path: Path) -> None:
    out = quantized(mixtral, tmp_path / "out", dtype="float32")
    dtypes = {entry.key: entry.dtype for entry in read_nf4_folder(out).index.tensors.values()}
    assert dtypes["model.embed_tokens.weight"] == dtypes["model.layers.0.mlp.gate.weight"] == torch.float32
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


def test_scales_stay_float32_without_double_quantization(mixtral: Path, tmp_path: Path) -> None:
    settings = QuantizationConfig(double_quantization=False)
    out = quantized(mixtral, tmp_path / "out", quantization=settings)
    ours = load_tiny(out)
    experts = ours.model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, Nf4Experts)
    assert experts.down.absmax.dtype == torch.float32
    assert torch.equal(logits(ours), logits(load_tiny(mixtral, double_quantization=False)))


def test_tied_head_is_stored_once_and_loaded_tied(rewrite: Rewrite, tmp_path: Path) -> None:
    source = rewrite(lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True)
    out = quantized(source, tmp_path / "out")
    assert "lm_head.weight" not in read_nf4_folder(out).index.tensors
    loaded = load_tiny(out)
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert torch.equal(logits(loaded), logits(load_tiny(source)))


def test_tied_head_that_the_source_stores_too_is_stored_once(rewrite: Rewrite, tmp_path: Path) -> None:
    source = rewrite(
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
        tie_word_embeddings=True,
    )
    out = quantized(source, tmp_path / "out")
    assert "lm_head.weight" not in read_nf4_folder(out).index.tensors
    assert torch.equal(logits(load_tiny(out)), logits(load_tiny(source)))


def test_tensor_without_a_place_is_left_out_and_noted(rewrite: Rewrite, folder: Path, tmp_path: Path) -> None:
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    out = quantized(rewrite(lambda tensors: tensors.update({key: torch.ones(4)})), tmp_path / "out")
    assert json.loads((out / "expertune.json").read_text(encoding="utf-8"))["left_out"] == [key]
    assert weights(out) == weights(folder)


# ---- the format


@pytest.mark.parametrize("num_experts", [3, 4])
def test_buffers_of_an_experts_module_lie_side_by_side_at_multiples_of_64_bytes(
    num_experts: int, tmp_path: Path
) -> None:
    source = save_tiny_model(tmp_path / "source", "mixtral", num_local_experts=num_experts)
    stored = read_nf4_folder(quantized(source, tmp_path / "out"))
    assert stored.experts == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    for number, module in enumerate(stored.experts):
        file, entries = stored.experts_entries(module)
        assert file.name == f"layer-0000{number}.safetensors"
        assert [*entries] == [
            f"{stack}.{buffer}"
            for stack in ("gate_up", "down")
            for buffer in ("packed", "absmax", "nested_absmax", "offset")
        ]
        previous = None
        for entry in entries.values():
            assert entry.start % 64 == 0
            if previous is not None:
                assert 0 <= entry.start - (previous.start + previous.nbytes) < 64
            previous = entry


def test_linears_have_the_names_and_tensors_that_bitsandbytes_saves(mixtral: Path, folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj"
    weight = load_file(mixtral / "model.safetensors")[f"{name}.weight"]
    theirs = bnb.nn.Linear4bit(64, weight.shape[0], bias=False, quant_type="nf4", compress_statistics=True)
    theirs.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to("cpu")
    stored = load_file(folder / "layer-00001.safetensors")
    for key, tensor in theirs.state_dict(prefix=f"{name}.").items():
        assert torch.equal(stored.pop(key), tensor), key
    assert not any(key.startswith(name) for key in stored)


def test_every_file_has_its_size_and_sha256_in_the_manifest(mixtral: Path, folder: Path) -> None:
    manifest = json.loads((folder / "expertune.json").read_text(encoding="utf-8"))
    on_disk = {path.name for path in folder.iterdir()} - {"expertune.json", "README.md"}
    assert manifest["files"].keys() == on_disk
    for name, record in manifest["files"].items():
        found = hash_file(folder / name)
        assert (record["sha256"], record["bytes"]) == (found.sha256, found.nbytes)
    shard = hash_file(mixtral / "model.safetensors")
    assert manifest["source"]["shards"] == {"model.safetensors": {"sha256": shard.sha256, "bytes": shard.nbytes}}
    assert manifest["source"]["model"] == str(mixtral.resolve())
    assert verify(folder) == len(on_disk)


def test_config_names_the_method_and_is_the_sources_otherwise(mixtral: Path, folder: Path) -> None:
    ours = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert ours.pop("quantization_config") == {
        "quant_method": "expertune",
        "scheme": "nf4",
        "double_quantization": True,
        "block_size": 64,
    }
    assert ours == json.loads((mixtral / "config.json").read_text(encoding="utf-8"))
    assert (folder / "generation_config.json").read_bytes() == (mixtral / "generation_config.json").read_bytes()


def test_tensors_are_those_that_the_index_names(folder: Path) -> None:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    for name in weights(folder):
        inside = set(load_file(folder / name))
        assert inside == {key for key, file in weight_map.items() if file == name}
    assert {"layer-00000.safetensors", "layer-00001.safetensors", "rest.safetensors"} == set(weight_map.values())


# ---- placement's way in


def test_experts_can_be_given_as_views_of_the_file(folder: Path) -> None:
    given: list[str] = []

    def mapped(name: str, entries: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        given.append(name)
        storage = torch.from_file(str(next(iter(entries.values())).shard), size=_size(entries), dtype=torch.uint8)
        return {
            key: storage[entry.start : entry.start + entry.nbytes].view(entry.dtype).view(entry.shape)
            for key, entry in entries.items()
        }

    loaded = load_model(folder, QuantizationConfig(), torch.float32, "cpu", options=LoadOptions(mapped))
    assert given == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    experts = loaded.model.get_submodule(given[0])
    assert isinstance(experts, Nf4Experts)
    assert experts.gate_up.packed.untyped_storage().data_ptr() == experts.down.packed.untyped_storage().data_ptr()
    assert torch.equal(logits(loaded), logits(load_tiny(folder)))


def _size(entries: Mapping[str, TensorEntry]) -> int:
    return next(iter(entries.values())).shard.stat().st_size


# ---- errors


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "expertune.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["layer-00001.safetensors", "rest.safetensors"])
@pytest.mark.parametrize(("damage", "message"), [(Path.unlink, "missing"), (cut, "damaged: .* were written")])
def test_file_that_is_missing_or_cut_off_is_named(
    name: str, damage: Callable[[Path], None], message: str, copy: Path
) -> None:
    damage(copy / name)
    with pytest.raises(CheckpointError, match=rf"{name}: .*{message}"):
        load_tiny(copy)


def test_damaged_header_is_named(copy: Path) -> None:
    path = copy / "layer-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[12] ^= 255
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"layer-00001\.safetensors: the safetensors header is damaged"):
        load_tiny(copy)


def test_manifest_of_another_version_is_refused(copy: Path) -> None:
    rewrite_manifest(copy, format_version=2)
    with pytest.raises(CheckpointError, match=r"expertune\.json: format version 2, this Expertune reads 1"):
        load_tiny(copy)


def test_manifest_of_an_unknown_scheme_is_refused(copy: Path) -> None:
    rewrite_manifest(copy, quantization={"scheme": "auto", "double_quantization": True})
    with pytest.raises(CheckpointError, match=r"expertune\.json: quantization\.scheme is 'auto', which is none of nf4"):
        load_tiny(copy)


def test_manifest_that_is_no_json_is_refused(copy: Path) -> None:
    (copy / "expertune.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"expertune\.json: damaged: not valid JSON"):
        load_tiny(copy)


def test_folder_that_has_lost_its_manifest_says_so(copy: Path) -> None:
    (copy / "expertune.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"an NF4 folder that has lost its expertune\.json; copy the whole folder"
    ):
        load_tiny(copy)


@pytest.mark.parametrize("section", ["files", "quantization", "source"])
def test_manifest_without_a_section_is_refused(section: str, copy: Path) -> None:
    rewrite_manifest(copy, **{section: None})
    with pytest.raises(CheckpointError, match=rf"expertune\.json: damaged: {section} is missing"):
        load_tiny(copy)


def test_unfinished_folder_says_how_to_resume(copy: Path) -> None:
    (copy / "expertune.json").rename(copy / "expertune.partial.json")
    with pytest.raises(CheckpointError, match=r"unfinished; the `expertune quantize` command that started it"):
        load_tiny(copy)


KEYS = [
    "model.norm.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.experts.down.absmax",
    "model.layers.0.self_attn.q_proj.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_tensor_that_is_missing_or_of_another_shape_is_named(key: str, change: str, copy: Path) -> None:
    """Files of the right size with other tensors in them: by somebody's own tool, say."""
    for path in copy.glob("*.safetensors"):
        tensors = load_file(path)
        if key in tensors:
            value = tensors.pop(key)
            if change == "shape":
                tensors[key] = torch.cat([value, value])
            save_file(tensors, path)
    if change == "missing":
        index = copy / "model.safetensors.index.json"
        values = json.loads(index.read_text(encoding="utf-8"))
        del values["weight_map"][key]
        index.write_text(json.dumps(values), encoding="utf-8")
    seal(copy)
    with pytest.raises(CheckpointError, match=rf"(missing tensors: |tensor ){key}"):
        load_tiny(copy)


def test_verify_names_the_file_in_which_one_bit_has_changed(copy: Path) -> None:
    path = copy / "layer-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    (copy / "rest.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"changed since it was written: layer-00000\.safetensors, rest\.safetensors \(missing\);"
    ):
        verify(copy)


def test_verify_of_something_else_says_what_is_missing(mixtral: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder"):
        verify(mixtral / "nowhere")
    with pytest.raises(CheckpointError, match=r"no expertune\.json here; is it an NF4 folder"):
        verify(mixtral)


def test_run_file_that_contradicts_the_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"double_quantization is false, but .* was quantized with it"):
        load_tiny(folder, double_quantization=False)


def test_config_of_another_model_is_refused(copy: Path) -> None:
    path = copy / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | {"num_local_experts": 8}), encoding="utf-8")
    seal(copy)
    with pytest.raises(CheckpointError, match=r"experts\.gate_up\.packed has shape .* quantize the model again"):
        load_tiny(copy)


def test_model_says_nothing_of_the_folder_once_it_is_loaded(folder: Path) -> None:
    model: nn.Module = load_tiny(folder).model
    assert getattr(model.config, "quantization_config", None) is None


def test_headers_hold_no_gaps_for_other_readers(folder: Path) -> None:
    for name in weights(folder):
        entries = list(read_header(folder / name).values())
        for before, after in itertools.pairwise(entries):
            assert before.start + before.nbytes == after.start
