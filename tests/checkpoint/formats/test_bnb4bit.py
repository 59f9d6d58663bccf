"""What is quantized already: bitsandbytes' bytes are taken as they are, MXFP4 blocks by their values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from safetensors.torch import load_file
from torch import Tensor

from expertune.checkpoint.load import LoadedModel
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertune.experts.module import Nf4Experts
from expertune.layers.nf4_linear import Nf4Linear
from tests.checkpoint.conftest import Rewrite
from tests.checkpoint.nf4_folders import assert_same_bytes, quantized
from tests.tiny_models import load_tiny, random_rows

Tensors = dict[str, Tensor]
BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_quant_storage": "uint8",
}
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
ROUTER = "model.layers.0.block_sparse_moe.gate.weight"


def is_packed(key: str) -> bool:
    """The linears that bitsandbytes packs by default: experts and attention."""
    return ".experts." in key or "_proj.weight" in key


def pack(tensors: Tensors, chosen: Callable[[str], bool] = is_packed, double: bool = True, **settings: Any) -> None:
    """Replace weights by what bitsandbytes saves of them."""
    for key in [key for key in tensors if chosen(key)]:
        arguments = {"quant_type": "nf4", "blocksize": 64} | settings
        packed, state = quantize_4bit(tensors[key].contiguous(), compress_statistics=double, **arguments)
        tensors[key] = packed
        tensors.update({f"{key}.{part}": value for part, value in state.as_dict(packed=True).items()})


def logits(loaded: LoadedModel) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return loaded.model(random_rows(3, 16)).logits


@pytest.mark.parametrize("double", [True, False])
def test_bitsandbytes_bytes_are_taken_as_they_are(double: bool, rewrite: Rewrite, mixtral: Path) -> None:
    """Every byte of every expert and linear is the file's; loading the 16-bit source would give the same."""
    folder = rewrite(lambda tensors: pack(tensors, double=double), quantization_config=BITSANDBYTES)
    loaded, stored = load_tiny(folder), load_file(next(folder.glob("*.safetensors")))
    leaves = {"gate": "w1", "up": "w3", "down": "w2"}
    compared = 0
    for layer in (0, 1):
        experts = loaded.model.get_submodule(f"model.layers.{layer}.mlp.experts")
        assert isinstance(experts, Nf4Experts)
        for expert in range(4):
            for projection, leaf in leaves.items():
                key = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}.weight"
                stack, index = experts.locate(expert, projection)
                assert torch.equal(stack.packed[index].flatten(), stored[key].flatten())
                assert torch.equal(stack.absmax[index], stored[f"{key}.absmax"])
                if double:
                    assert torch.equal(stack.nested_absmax[index], stored[f"{key}.nested_absmax"])
                    state = json.loads(bytes(stored[f"{key}.quant_state.bitsandbytes__nf4"].numpy()))
                    assert stack.offset[index].item() == state["nested_offset"]
                compared += 1
    assert compared == 24
    direct = load_tiny(mixtral, double_quantization=double)
    assert torch.equal(logits(loaded), logits(direct))
    if double:
        assert_same_bytes(loaded, direct)


def test_state_in_other_shards_than_its_weight_is_found(rewrite: Rewrite, mixtral: Path) -> None:
    folder = rewrite(pack, shard_of=lambda key: sum(map(ord, key)) % 4, quantization_config=BITSANDBYTES)
    assert_same_bytes(load_tiny(folder), load_tiny(mixtral))


def test_which_linears_are_four_bit_is_as_in_the_file(rewrite: Rewrite) -> None:
    """With `llm_int8_skip_modules`, say: what was left in 16 bits stays in 16 bits, experts aside."""

    def skip(key: str) -> bool:
        return is_packed(key) and "v_proj" not in key

    folder = rewrite(lambda tensors: pack(tensors, skip), quantization_config=BITSANDBYTES)
    model = load_tiny(folder).model
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    four_bit = {name.rpartition(".")[2] for name, module in linears.items() if isinstance(module, Nf4Linear)}
    assert four_bit == {"q_proj", "k_proj", "o_proj"}
    original = load_file(next(folder.glob("*.safetensors")))["model.layers.1.self_attn.v_proj.weight"]
    assert torch.equal(linears["model.layers.1.self_attn.v_proj"].weight, original.float())


def test_experts_that_were_left_in_sixteen_bits_are_quantized(rewrite: Rewrite, mixtral: Path) -> None:
    """As transformers 5 writes them: it packs linears only, and experts are none there."""
    folder = rewrite(lambda tensors: pack(tensors, lambda key: "_proj.weight" in key), quantization_config=BITSANDBYTES)
    assert_same_bytes(load_tiny(folder), load_tiny(mixtral))


def test_router_that_was_packed_as_a_linear_keeps_its_values(rewrite: Rewrite) -> None:
    def with_router(tensors: Tensors) -> None:
        pack(tensors, lambda key: is_packed(key) or key == ROUTER)

    folder = rewrite(with_router, quantization_config=BITSANDBYTES)
    stored = load_file(next(folder.glob("*.safetensors")))
    stats = {key.removeprefix(f"{ROUTER}."): value for key, value in stored.items() if key.startswith(f"{ROUTER}.")}
    state = bnb.functional.QuantState.from_dict(stats, torch.device("cpu"))
    expected = bnb.functional.dequantize_4bit(stored[ROUTER], state)
    router = load_tiny(folder).model.get_parameter("model.layers.0.mlp.gate.weight")
    assert torch.equal(router, expected.float())


def test_nf4_folder_of_a_bitsandbytes_checkpoint_holds_the_same_bytes(rewrite: Rewrite, tmp_path: Path) -> None:
    def skip(key: str) -> bool:
        return is_packed(key) and "v_proj" not in key

    folder = rewrite(
        lambda tensors: pack(tensors, skip),
        shard_of=lambda key: sum(map(ord, key)) % 3,
        quantization_config=BITSANDBYTES,
    )
    out = quantized(folder, tmp_path / "out")
    assert_same_bytes(load_tiny(out), load_tiny(folder))
    assert torch.equal(logits(load_tiny(out)), logits(load_tiny(folder)))


def test_run_file_that_contradicts_the_checkpoint_is_refused(rewrite: Rewrite) -> None:
    folder = rewrite(pack, quantization_config=BITSANDBYTES)
    with pytest.raises(ConfigError, match=r"double_quantization is false, but .* was quantized with it"):
        load_tiny(folder, double_quantization=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, r"bitsandbytes, fp4"),
        ({"load_in_4bit": False, "load_in_8bit": True}, r"bitsandbytes, 8 bits"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, r"bitsandbytes, packed into bfloat16"),
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_other_methods_are_refused_by_name(changes: dict[str, Any], message: str, rewrite: Rewrite) -> None:
    folder = rewrite(quantization_config=BITSANDBYTES | changes)
    with pytest.raises(UnsupportedModelError, match=rf"already quantized \({message}\), .* give the 16-bit one"):
        load_tiny(folder)


def test_other_block_sizes_are_refused(rewrite: Rewrite) -> None:
    folder = rewrite(lambda tensors: pack(tensors, blocksize=128), quantization_config=BITSANDBYTES)
    with pytest.raises(UnsupportedModelError, match="has blocks of 128, and of 256"):
        load_tiny(folder)


def test_fp4_tensors_are_refused_whatever_the_config_says(rewrite: Rewrite) -> None:
    folder = rewrite(lambda tensors: pack(tensors, quant_type="fp4"), quantization_config=BITSANDBYTES)
    with pytest.raises(UnsupportedModelError, match="4-bit values of another kind than nf4"):
        load_tiny(folder)


def test_experts_some_of_which_have_scales_in_8_bits_are_held_with_float32_scales(rewrite: Rewrite) -> None:
    def mix(tensors: Tensors) -> None:
        pack(tensors, lambda key: key == EXPERT, double=False)
        pack(tensors, lambda key: is_packed(key) and not key.startswith(EXPERT))

    folder = rewrite(mix, quantization_config=BITSANDBYTES)
    model, stored = load_tiny(folder).model, load_file(next(folder.glob("*.safetensors")))
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert isinstance(experts, Nf4Experts)
    single, double = experts.locate(2, "up"), experts.locate(1, "up")
    assert torch.equal(single[0].absmax[single[1]], stored[f"{EXPERT}.absmax"])
    other = EXPERT.replace("experts.2", "experts.1")
    state = bnb.functional.QuantState.from_dict(
        {key.removeprefix(f"{other}."): value for key, value in stored.items() if key.startswith(f"{other}.")},
        torch.device("cpu"),
    )
    assert stored[f"{other}.absmax"].dtype == torch.uint8
    scales = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(double[0].absmax[double[1]], scales)
    assert torch.equal(double[0].packed[double[1]].flatten(), stored[other].flatten())


@pytest.mark.parametrize("key", [EXPERT, Q_PROJ])
@pytest.mark.parametrize("part", ["absmax", "quant_map", "quant_state.bitsandbytes__nf4", "nested_absmax"])
def test_missing_part_of_a_state_is_named_with_its_weight(key: str, part: str, rewrite: Rewrite) -> None:
    def drop(tensors: Tensors) -> None:
        pack(tensors)
        del tensors[f"{key}.{part}"]

    with pytest.raises((CheckpointError, UnsupportedModelError), match=key):
        load_tiny(rewrite(drop, quantization_config=BITSANDBYTES))


@pytest.mark.parametrize("key", [EXPERT, Q_PROJ])
def test_another_codebook_is_refused(key: str, rewrite: Rewrite) -> None:
    def change(tensors: Tensors) -> None:
        pack(tensors)
        tensors[f"{key}.quant_map"] = tensors[f"{key}.quant_map"] + 0.01

    with pytest.raises(UnsupportedModelError, match=rf"the quant_map of {key} is not bitsandbytes' own"):
        load_tiny(rewrite(change, quantization_config=BITSANDBYTES))


@pytest.mark.parametrize("key", [EXPERT, Q_PROJ])
def test_matrix_of_another_shape_is_named(key: str, rewrite: Rewrite) -> None:
    def change(tensors: Tensors) -> None:
        tensors[key] = torch.cat([tensors[key], tensors[key]])
        pack(tensors)

    with pytest.raises(CheckpointError, match=rf"tensor {key} has shape .* expect"):
        load_tiny(rewrite(change, quantization_config=BITSANDBYTES))


def test_missing_expert_is_named(rewrite: Rewrite) -> None:
    def drop(tensors: Tensors) -> None:
        pack(tensors)
        for key in [key for key in tensors if key.startswith(EXPERT)]:
            del tensors[key]

    with pytest.raises(CheckpointError, match=rf"missing tensors: {EXPERT}$"):
        load_tiny(rewrite(drop, quantization_config=BITSANDBYTES))
