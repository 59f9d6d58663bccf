"""A checkpoint of any layout loads to the same 4-bit model; a wrong one is refused by the name of its tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertune.checkpoint.load import LoadedModel
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.reader import Memory, TensorEntry
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertune.experts.module import Nf4Experts
from tests.checkpoint.conftest import FolderOf, Rewrite, write_shards
from tests.processes import run_program
from tests.tiny_models import FAMILIES, changed, dequantized, frozen_bytes, load_tiny, random_rows, stock_model

Tensors = dict[str, Tensor]
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def assert_same_bytes(one: LoadedModel, other: LoadedModel) -> None:
    assert changed(frozen_bytes(one.model), frozen_bytes(other.model)) == []


def assert_same_logits(loaded: LoadedModel, folder: Path) -> None:
    """Logits are about 3; products of other shapes are summed in another order, a few units in the last place off."""
    ids = random_rows(3, 16)
    with torch.no_grad():
        logits, expected = loaded.model(ids).logits, dequantized(loaded, folder)(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_over_the_dequantized_weights(family: str, family_folder: FolderOf) -> None:
    folder = family_folder(family)
    loaded = load_tiny(folder)
    assert loaded.unexpected == []
    assert_same_logits(loaded, folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_that_bitsandbytes_gives_for_stock_transformers_weights(
    family: str, family_folder: FolderOf
) -> None:
    """Whatever the names on disk, each matrix lies where transformers itself would put it."""
    folder = family_folder(family)
    loaded, stock = load_tiny(folder), stock_model(folder, torch.bfloat16)

    def theirs(matrix: Tensor) -> Tensor:
        return bnb.functional.quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=True)[0]

    compared = 0
    for name, module in loaded.model.named_modules():
        if isinstance(module, Nf4Experts):
            original = stock.get_submodule(name)
            inner = len(module.spec.projections) - 1
            gate_up = original.get_parameter("gate_up_proj").unflatten(1, (inner, -1)).flatten(0, 1)
            for stack, matrices in ((module.gate_up, gate_up), (module.down, original.get_parameter("down_proj"))):
                for packed, matrix in zip(stack.packed, matrices, strict=True):
                    assert torch.equal(packed.flatten(), theirs(matrix).flatten())
                    compared += 1
        elif isinstance(module, bnb.nn.Linear4bit):
            weight = stock.get_submodule(name).get_parameter("weight")
            assert torch.equal(module.weight.data.flatten(), theirs(weight).flatten())
            compared += 1
    assert compared >= 2 * 4 + 2 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_what_stays_unquantized_has_stock_transformers_values_and_dtypes(
    family: str, dtype: torch.dtype, family_folder: FolderOf
) -> None:
    """A router's correction bias, for one, decides between experts and stays in float32."""
    folder = family_folder(family)
    loaded, stock = load_tiny(folder, dtype).model, dict(stock_model(folder, dtype).state_dict())
    four_bit = tuple(n for n, m in loaded.named_modules() if isinstance(m, Nf4Experts | bnb.nn.Linear4bit))
    compared = 0
    for name, tensor in loaded.state_dict().items():
        if not name.startswith(four_bit):
            assert tensor.dtype == stock[name].dtype, name
            assert torch.equal(tensor, stock[name]), name
            compared += 1
    assert compared >= 7


def test_everything_is_frozen_and_in_evaluation_mode(loaded_mixtral: LoadedModel) -> None:
    assert not any(parameter.requires_grad for parameter in loaded_mixtral.model.parameters())
    assert not any(module.training for module in loaded_mixtral.model.modules())


def test_no_expert_and_no_decoder_linear_is_left_in_sixteen_bits(loaded_mixtral: LoadedModel) -> None:
    wide = [name for name, p in loaded_mixtral.model.named_parameters() if p.dtype != torch.uint8 and p.ndim > 1]
    assert wide == [
        "model.embed_tokens.weight",
        "model.layers.0.mlp.gate.weight",
        "model.layers.1.mlp.gate.weight",
        "lm_head.weight",
    ]


def test_biases_of_quantized_linears_are_kept(family_folder: FolderOf) -> None:
    folder = family_folder("qwen2_moe")
    loaded, stock = load_tiny(folder).model, stock_model(folder)
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = loaded.get_submodule(f"model.layers.1.self_attn.{name}")
        assert isinstance(linear, bnb.nn.Linear4bit)
        assert torch.equal(linear.bias, stock.get_submodule(f"model.layers.1.self_attn.{name}").get_parameter("bias"))


def test_without_double_quantization_scales_are_float32(mixtral: Path) -> None:
    loaded = load_tiny(mixtral, double_quantization=False)
    experts = loaded.model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(experts, Nf4Experts)
    assert experts.down.absmax.dtype == torch.float32
    assert_same_logits(loaded, mixtral)


# ---- layouts


def test_shards_in_any_order_load_to_the_same_bytes(rewrite: Rewrite, loaded_mixtral: LoadedModel) -> None:
    keys: list[str] = []

    def backwards(tensors: Tensors) -> None:
        keys.extend(tensors)
        for key in reversed(keys):
            tensors[key] = tensors.pop(key)

    folder = rewrite(backwards, shard_of=lambda key: len(keys) - keys.index(key))
    assert_same_bytes(load_tiny(folder), loaded_mixtral)


def test_shards_without_an_index_load_to_the_same_bytes(rewrite: Rewrite, loaded_mixtral: LoadedModel) -> None:
    folder = rewrite(shard_of=lambda key: sum(map(ord, key)) % 3, index=False)
    assert_same_bytes(load_tiny(folder), loaded_mixtral)


def test_one_experts_three_matrices_in_three_shards_load_to_the_same_bytes(
    rewrite: Rewrite, loaded_mixtral: LoadedModel
) -> None:
    shards = {"w1.weight": 1, "w2.weight": 2, "w3.weight": 3}
    folder = rewrite(shard_of=lambda key: next((n for leaf, n in shards.items() if key.endswith(leaf)), 0))
    assert_same_bytes(load_tiny(folder), loaded_mixtral)


@pytest.fixture(scope="module")
def tensors(mixtral: Path) -> Tensors:
    return load_file(mixtral / "model.safetensors")


@settings(max_examples=6)
@given(data=st.data())
def test_any_split_into_shards_loads_to_the_same_bytes(
    data: st.DataObject,
    tensors: Tensors,
    mixtral: Path,
    loaded_mixtral: LoadedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("split")
    order = data.draw(st.permutations(list(tensors)))
    shards = data.draw(st.lists(st.integers(0, 4), min_size=len(order), max_size=len(order)))
    shard_of = dict(zip(order, shards, strict=True))
    write_shards(folder, {key: tensors[key] for key in order}, shard_of.__getitem__)
    (folder / "config.json").write_bytes((mixtral / "config.json").read_bytes())
    assert_same_bytes(load_tiny(folder), loaded_mixtral)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_are_fused_on_disk_load_to_the_same_bytes_and_are_read_once(
    family: str, family_folder: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_part, parts = TensorEntry.read_part, []

    def noted(entry: TensorEntry, index: int, *memory: Memory) -> Tensor:
        parts.append((entry.key, index))
        return read_part(entry, index, *memory)

    folder = family_folder(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, save_original_format=False)
    fused = load_file(tmp_path / "model.safetensors")
    assert any(key.endswith("experts.gate_up_proj") for key in fused)
    expected = load_tiny(folder)
    monkeypatch.setattr(TensorEntry, "read_part", noted)
    assert_same_bytes(load_tiny(tmp_path), expected)
    assert parts
    assert len(set(parts)) == len(parts)


def test_checkpoint_of_the_base_model_without_a_prefix_loads_to_the_same_bytes(
    rewrite: Rewrite, loaded_mixtral: LoadedModel
) -> None:
    def strip(tensors: Tensors) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("model.")] = tensors.pop(key)

    assert_same_bytes(load_tiny(rewrite(strip)), loaded_mixtral)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wider_source_of_the_same_values_loads_to_the_same_bytes(
    dtype: torch.dtype, rewrite: Rewrite, loaded_mixtral: LoadedModel
) -> None:
    def widen(tensors: Tensors) -> None:
        tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items()})

    assert_same_bytes(load_tiny(rewrite(widen)), loaded_mixtral)


def test_tied_head_takes_the_embeddings(rewrite: Rewrite, mixtral: Path) -> None:
    folder = rewrite(lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True)
    loaded = load_tiny(folder)
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight
    assert_same_logits(loaded, folder)


def test_tensor_without_a_place_is_reported_and_left_out(rewrite: Rewrite, loaded_mixtral: LoadedModel) -> None:
    folder = rewrite(lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    loaded = load_tiny(folder)
    assert loaded.unexpected == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert_same_bytes(loaded, loaded_mixtral)


# ---- errors


def replace(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({key: change(tensors[key])})


@pytest.mark.parametrize("key", [EXPERT, Q_PROJ, NORM, "lm_head.weight"])
def test_missing_tensor_is_named_as_on_disk(key: str, rewrite: Rewrite) -> None:
    with pytest.raises(CheckpointError, match=rf"missing tensors: {key}$"):
        load_tiny(rewrite(lambda tensors: tensors.pop(key)))


def test_many_missing_tensors_are_counted(rewrite: Rewrite) -> None:
    def drop(tensors: Tensors) -> None:
        for key in [key for key in tensors if ".experts.1." in key]:
            del tensors[key]

    with pytest.raises(CheckpointError, match=r"experts\.1\.w1\.weight, .* and 3 more$"):
        load_tiny(rewrite(drop))


def test_missing_buffer_that_decides_about_routing_is_named(family_folder: FolderOf, tmp_path: Path) -> None:
    folder = family_folder("deepseek_v3")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.e_score_correction_bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"missing tensors: model\.layers\.1\.mlp\.gate\.e_score_correction_bias"):
        load_tiny(tmp_path)


@pytest.mark.parametrize("key", [EXPERT, Q_PROJ, NORM])
def test_tensor_of_another_shape_is_named(key: str, rewrite: Rewrite) -> None:
    with pytest.raises(CheckpointError, match=rf"tensor {key}.*shape"):
        load_tiny(rewrite(replace(key, lambda tensor: torch.cat([tensor, tensor]))))


def test_fused_stack_of_other_experts_is_named(family_folder: FolderOf, tmp_path: Path) -> None:
    folder = family_folder("mixtral")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(
        tmp_path, save_original_format=False
    )
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in tensors if key.endswith("experts.down_proj"))
    save_file(tensors | {key: tensors[key][:3].contiguous()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{key} has shape \(3, 64, 128\), expected 4 experts first"):
        load_tiny(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [EXPERT, Q_PROJ, NORM, "model.embed_tokens.weight"])
def test_tensor_that_is_not_finite_is_named(key: str, bad: float, rewrite: Rewrite) -> None:
    def spoil(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[5] = bad
        return spoilt

    with pytest.raises(CheckpointError, match=rf"tensor {key}.* NaN or infinite"):
        load_tiny(rewrite(replace(key, spoil)))


def test_expert_beyond_the_models_number_is_named(rewrite: Rewrite) -> None:
    key = EXPERT.replace("experts.2", "experts.4")
    with pytest.raises(CheckpointError, match=rf"{key} belongs to expert 4, but the model has 4"):
        load_tiny(rewrite(lambda tensors: tensors.update({key: tensors[EXPERT].clone()})))


def test_one_weight_under_two_names_is_refused_with_both(rewrite: Rewrite) -> None:
    fused = "model.layers.1.mlp.experts.down_proj"
    with pytest.raises(CheckpointError, match=r"tensors .* and .* both belong to model\.layers\.1\.mlp\.experts"):
        load_tiny(rewrite(lambda tensors: tensors.update({fused: torch.zeros(4, 64, 128)})))


def test_truncated_shard_is_refused_before_anything_is_built(rewrite: Rewrite) -> None:
    folder = rewrite()
    shard = next(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"truncated: [\d,]+ bytes of [\d,]+, [\d,]+ are missing, from tensor"):
        load_tiny(folder)


@pytest.mark.parametrize("key", [EXPERT, Q_PROJ])
def test_packed_bytes_in_place_of_weights_are_refused_as_quantized(key: str, rewrite: Rewrite) -> None:
    def pack(tensor: Tensor) -> Tensor:
        return bnb.functional.quantize_4bit(tensor, quant_type="nf4")[0]

    with pytest.raises(UnsupportedModelError, match=rf"tensor {key} is uint8; .* already quantized"):
        load_tiny(rewrite(replace(key, pack)))


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq"])
def test_config_that_says_quantized_is_refused_with_its_method(method: str, rewrite: Rewrite) -> None:
    folder = rewrite(quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedModelError, match=rf"already quantized \({method}\)"):
        load_tiny(folder)


def test_folder_without_a_config_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no config\.json here"):
        load_tiny(tmp_path)


@pytest.mark.parametrize("text", ["not JSON", "{}", '{"model_type": "no-such-family"}', "[]"])
def test_config_that_describes_no_model_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json: (transformers cannot build this model|damaged: )"):
        build_meta_model(tmp_path, torch.float32)


def test_dense_model_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no experts"):
        load_tiny(tmp_path)


# ---- frozen stays frozen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forwards_in_evaluation_and_training_leave_every_frozen_byte(dtype: torch.dtype, mixtral: Path) -> None:
    """bitsandbytes repacks weights for evaluation on CPUs with AVX512-BF16, and rounds their scales for good."""
    model = load_tiny(mixtral, dtype).model
    before = frozen_bytes(model)
    ids = random_rows()
    with torch.no_grad():
        first = model.eval()(ids).logits
        model.train()(ids)
        assert torch.equal(model.eval()(ids).logits, first)
    assert changed(before, frozen_bytes(model)) == []


def test_two_loads_give_identical_bytes(mixtral: Path, loaded_mixtral: LoadedModel) -> None:
    assert_same_bytes(load_tiny(mixtral), loaded_mixtral)


# ---- memory

MEASURE = """
import sys
import torch
from expertune.checkpoint.load import load_model
from expertune.config import QuantizationConfig
from tests.memory import Peak

load_model(sys.argv[1], QuantizationConfig(), torch.bfloat16, "cpu")  # imports and pools are not weights
with Peak() as peak:
    loaded = load_model(sys.argv[2], QuantizationConfig(), torch.bfloat16, "cpu")
print(peak.bytes)
"""


@pytest.fixture
def large_folder(mixtral: Path, tmp_path: Path) -> Any:
    """A Mixtral of 100 million expert weights in one layer, 200 MB in bfloat16."""
    config = json.loads((mixtral / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 1024, "intermediate_size": 4096, "num_local_experts": 8, "num_hidden_layers": 1}
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_meta_model(folder, torch.bfloat16).config)
    noise = torch.randn(4096, 1024, dtype=torch.bfloat16)
    experts = "model.layers.0.block_sparse_moe.experts"
    shapes = {"w1": (4096, 1024), "w2": (1024, 4096), "w3": (4096, 1024)}
    for expert in range(8):
        content = {f"{experts}.{expert}.{leaf}.weight": noise.view(shape).clone() for leaf, shape in shapes.items()}
        save_file(content, folder / f"expert-{expert}.safetensors")
    rest = {
        name.replace(".mlp.", ".block_sparse_moe."): torch.ones(parameter.shape, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters()
        if ".experts." not in name
    }
    save_file(rest, folder / "rest.safetensors")
    yield folder
    for path in folder.glob("*.safetensors"):
        path.unlink()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_never_holds_more_than_the_four_bit_model_and_a_few_matrices(mixtral: Path, large_folder: Path) -> None:
    sixteen_bit = sum(path.stat().st_size for path in large_folder.glob("*.safetensors"))
    ended = run_program(MEASURE, str(mixtral), str(large_folder))
    assert ended.status == 0, ended.err[-4000:]
    increase = int(ended.out)
    expert_weights = 8 * 3 * 4096 * 1024
    rest = sixteen_bit - 2 * expert_weights
    four_bit = expert_weights * (0.5 + 1 / 64 + 4 / 64 / 256)
    # Beyond what stays: one matrix of 8 MiB with the checks on it, half a dozen tiles of 4 MiB, and what the allocator
    # keeps back of them (50 MiB in all, give or take 2).
    assert four_bit <= increase <= four_bit + rest + 64 * 2**20
    assert increase < 0.65 * sixteen_bit
