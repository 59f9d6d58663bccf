"""Experts that bitsandbytes packed as stacks or in lists of linears: their bytes are taken, wherever a row belongs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from expertune.checkpoint.load import LoadedModel
from expertune.config import parse_config
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertune.experts.contract import find_experts, read_spec
from expertune.experts.module import Nf4Experts
from expertune.planning import make_plan
from tests.checkpoint.nf4_folders import assert_same_bytes, quantized
from tests.families import build
from tests.planning.test_counts import resident_bytes
from tests.tiny_models import load_tiny, random_rows, save_random, stock_model, tiny_config

Tensors = dict[str, Tensor]

# Sizes at which 256 scales end with each matrix, and at which they run on into the next.
WHOLE_GROUPS = {"hidden_size": 128, "intermediate_size": 128, "moe_intermediate_size": 128}
CUT_GROUPS = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64}


def config_of(kind: str, sizes: dict[str, int]) -> PretrainedConfig:
    if kind in ("mixtral", "qwen3_moe"):
        return tiny_config(kind, **sizes)
    config = build.tiny_config(kind)
    for name, size in sizes.items():
        if hasattr(config, name):
            setattr(config, name, size)
    return config


def save(folder: Path, config: PretrainedConfig, tensors: Tensors) -> Path:
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def packed_stacks(tmp_path: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """A float32 model whose stacks of experts bitsandbytes packed, and its folder as transformers saves it."""

    def make(config: PretrainedConfig, double: bool) -> tuple[Path, PreTrainedModel]:
        model = stock_model(save_random(tmp_path / "source", config))
        for _, experts in list(find_experts(model)):
            for weight in read_spec("", experts).weight_names:
                replace_parameter_4bit(experts, weight, compress_statistics=double, quant_type="nf4", blocksize=64)
        model.save_pretrained(tmp_path / "packed", save_original_format=False)
        return tmp_path / "packed", model

    return make


def stored_state(stored: Tensors, key: str) -> QuantState:
    parts = {name.removeprefix(f"{key}."): value for name, value in stored.items() if name.startswith(f"{key}.")}
    return QuantState.from_dict(parts, torch.device("cpu"))


def scales_of(stored: Tensors, key: str) -> Tensor:
    """Float32 scales of a packed weight, as bitsandbytes' own code has them."""
    state = stored_state(stored, key)
    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax


def held(experts: Nf4Experts, projections: tuple[str, ...], expert: int) -> tuple[Tensor, Tensor]:
    """Codes [N, K/2] and scales, as they are held, [N, K/64] of some projections of an expert, one after the other."""
    places = [experts.locate(expert, projection) for projection in projections]
    codes = torch.cat([stack.packed[index] for stack, index in places])
    return codes, torch.cat([stack.absmax[index].view(stack.out_features, -1) for stack, index in places])


def planned_bytes(folder: Path) -> int:
    run = {
        "model": str(folder),
        "data": {"train": "rows.jsonl"},
        "quantization": {"compute_dtype": "float32"},
        "output_dir": "run",
    }
    return make_plan(parse_config(run), device="cpu").weights.frozen_bytes


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model(input_ids=random_rows(3, 16), use_cache=False).logits


def experts_of(loaded: LoadedModel) -> list[tuple[str, Nf4Experts]]:
    found = [(name, module) for name, module in loaded.model.named_modules() if isinstance(module, Nf4Experts)]
    assert found
    return found


@pytest.mark.parametrize(
    ("kind", "sizes", "double"),
    [
        ("mixtral", CUT_GROUPS, False),
        ("mixtral", CUT_GROUPS, True),
        ("mixtral", WHOLE_GROUPS, True),
        ("qwen3_moe", CUT_GROUPS, True),
        ("qwen3_moe", WHOLE_GROUPS, True),
        ("nemotron_h", {}, True),  # no gate
    ],
)
def test_stacks_that_bitsandbytes_packed_keep_their_bytes_and_logits(
    kind: str, sizes: dict[str, int], double: bool, packed_stacks: Callable[..., tuple[Path, PreTrainedModel]]
) -> None:
    folder, theirs = packed_stacks(config_of(kind, sizes), double)
    loaded, stored = load_tiny(folder), load_file(folder / "model.safetensors")
    assert loaded.unexpected == []
    keeps = double and sizes == WHOLE_GROUPS
    for name, experts in experts_of(loaded):
        for weight, projections in zip(
            experts.spec.weight_names, (experts.spec.projections[:-1], ("down",)), strict=True
        ):
            key = next(key for key in stored if key.endswith(f"{name.removeprefix('model.')}.{weight}"))
            codes = stored[key].view(experts.num_experts, -1)
            scales = stored[f"{key}.absmax"] if keeps else scales_of(stored, key)
            for expert in range(experts.num_experts):
                held_codes, held_scales = held(experts, projections, expert)
                assert torch.equal(held_codes.flatten(), codes[expert])
                assert torch.equal(held_scales.flatten(), scales.view(experts.num_experts, -1)[expert])
            if keeps:
                stack, _ = experts.locate(0, projections[0])
                assert torch.equal(stack.nested_absmax.flatten(), stored[f"{key}.nested_absmax"])
                assert set(stack.offset.tolist()) == {stored_state(stored, key).offset.item()}
    expected = logits(theirs)
    torch.testing.assert_close(logits(loaded.model), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_nf4_folder_of_packed_stacks_holds_the_same_bytes(
    packed_stacks: Callable[..., tuple[Path, PreTrainedModel]], tmp_path: Path
) -> None:
    folder, _ = packed_stacks(config_of("qwen3_moe", CUT_GROUPS), True)
    out = quantized(folder, tmp_path / "out")
    assert json.loads((out / "expertune.json").read_text())["quantization"]["double_quantization"] is False
    assert_same_bytes(load_tiny(out), load_tiny(folder))


def test_stack_that_was_packed_as_one_matrix_is_the_same(
    packed_stacks: Callable[..., tuple[Path, PreTrainedModel]], tmp_path: Path
) -> None:
    folder, _ = packed_stacks(config_of("mixtral", CUT_GROUPS), True)
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("gate_up_proj.quant_state.bitsandbytes__nf4")]:
        state = json.loads(bytes(tensors[key].numpy()))
        experts, rows, columns = state["shape"]
        flat = json.dumps(state | {"shape": [experts * rows, columns]}).encode()
        tensors[key] = torch.tensor(list(flat), dtype=torch.uint8)
    flattened = save(tmp_path / "flat", AutoConfig.from_pretrained(folder), tensors)
    assert_same_bytes(load_tiny(flattened), load_tiny(folder))


def test_stack_of_another_shape_is_named(
    packed_stacks: Callable[..., tuple[Path, PreTrainedModel]],
) -> None:
    folder, _ = packed_stacks(config_of("mixtral", CUT_GROUPS), True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": 8}))
    with pytest.raises(
        CheckpointError, match=r"experts\.(gate_up|down)_proj has shape \(4, .* expected shape \(8, .* or \("
    ):
        load_tiny(folder)


def test_8_bit_scales_that_cross_experts_cannot_be_asked_for(
    packed_stacks: Callable[..., tuple[Path, PreTrainedModel]],
) -> None:
    folder, _ = packed_stacks(config_of("mixtral", CUT_GROUPS), True)
    with pytest.raises(ConfigError, match=r"double_quantization is true, but .* gives float32 scales; remove the key"):
        load_tiny(folder, double_quantization=True)


@pytest.mark.parametrize("sizes", [CUT_GROUPS, WHOLE_GROUPS])
def test_plan_of_packed_stacks_counts_the_bytes_that_loading_gives(
    sizes: dict[str, int],
    packed_stacks: Callable[..., tuple[Path, PreTrainedModel]],
) -> None:
    folder, _ = packed_stacks(config_of("mixtral", sizes), True)
    assert planned_bytes(folder) == resident_bytes(load_tiny(folder).model)


def test_stacks_packed_across_output_features_are_refused_or_quantized_again_where_asked(
    packed_stacks: Callable[..., tuple[Path, PreTrainedModel]], tmp_path: Path
) -> None:
    config = build.tiny_config("gpt_oss")
    folder, theirs = packed_stacks(config, True)
    with pytest.raises(
        UnsupportedModelError, match=r"experts\.\w+_proj packs all experts from the other side.*scheme to nf4"
    ):
        load_tiny(folder)
    dequantized = {
        f"{module}.{weight}": getattr(experts, weight).detach()
        for module, experts in find_experts(theirs)
        for weight in ("gate_up_proj", "down_proj")
    }
    assert len(dequantized) == 2 * config.num_hidden_layers
    rest = {key: value for key, value in load_file(folder / "model.safetensors").items() if "experts" not in key}
    biases = {key: value for key, value in theirs.state_dict().items() if key.endswith("_proj_bias")}
    dense = save(tmp_path / "dense", AutoConfig.from_pretrained(folder), rest | biases | dequantized)
    again, expected = load_tiny(folder, scheme="nf4"), load_tiny(dense)
    for (_, one), (_, other) in zip(experts_of(again), experts_of(expected), strict=True):
        for stack in ("gate_up", "down"):
            assert all(map(torch.equal, one.get_submodule(stack).bytes, other.get_submodule(stack).bytes))


def in_lists(tensors: Tensors, transposed: bool) -> Tensors:
    """Stacks of experts as a list of linears each, and routers as linears in a module."""
    lists: Tensors = {}
    for key, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts\.(?:gate_up|down)_proj)(_bias)?", key)
        if found and found[2]:
            lists |= {f"{found[1]}s.{expert}.bias": each.contiguous() for expert, each in enumerate(tensor)}
        elif found:
            linears = tensor.mT if transposed else tensor
            lists |= {f"{found[1]}s.{expert}.weight": each.contiguous() for expert, each in enumerate(linears)}
        else:
            lists[re.sub(r"\.mlp\.(router|gate)\.(weight|bias)$", r".mlp.\1.linear.\2", key)] = tensor
    return lists


def pack(tensors: Tensors, double: bool) -> Tensors:
    """The same with every linear of experts as a `Linear4bit` saves it."""
    packed = dict(tensors)
    for key, tensor in tensors.items():
        if re.search(r"_projs\.\d+\.weight$", key):
            packed[key], state = quantize_4bit(tensor, compress_statistics=double, quant_type="nf4", blocksize=64)
            packed |= {f"{key}.{part}": value for part, value in state.as_dict(packed=True).items()}
    return packed


@pytest.fixture(params=["gpt_oss", "qwen3_moe"])
def listed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[PreTrainedModel, Tensors]:
    """A model whose stacks are transposed and alternate gate and up, and one without either; its tensors, in lists."""
    config = config_of(request.param, {} if request.param == "gpt_oss" else CUT_GROUPS)
    model = stock_model(save_random(tmp_path / "source", config), torch.bfloat16)
    lists = in_lists(model.state_dict(), transposed=request.param == "gpt_oss")
    assert sum("_projs." in key for key in lists) > 8
    assert any(".linear.weight" in key for key in lists)
    return model, lists


@pytest.mark.parametrize("double", [True, False])
def test_lists_of_4_bit_linears_keep_their_bytes_and_logits(
    double: bool, listed: tuple[PreTrainedModel, Tensors], tmp_path: Path
) -> None:
    model, lists = listed
    stored = pack(lists, double)
    loaded = load_tiny(save(tmp_path / "packed", model.config, stored))
    assert loaded.unexpected == []
    expected = stock_model(tmp_path / "source")
    for name, experts in experts_of(loaded):
        spec = experts.spec
        for weight, projections in zip(spec.weight_names, (spec.projections[:-1], ("down",)), strict=True):
            for expert in range(experts.num_experts):
                key = f"{name}.{weight}s.{expert}.weight"
                rows = lists[key].shape[0]
                order = torch.arange(rows)
                if not spec.is_concatenated and weight == "gate_up_proj":
                    order = torch.cat([order[::2], order[1::2]])
                codes, scales = held(experts, projections, expert)
                assert torch.equal(codes, stored[key].view(rows, -1)[order])
                assert torch.equal(scales, scales_of(stored, key).view(rows, -1)[order])
                state = stored_state(stored, key)
                state.dtype = torch.float32  # the dtype of the products here
                dequantized = dequantize_4bit(stored[key], state)
                stack = expected.get_submodule(name).get_parameter(weight)
                with torch.no_grad():
                    stack[expert] = dequantized.T if spec.is_transposed else dequantized
    torch.testing.assert_close(logits(loaded.model), logits(expected), rtol=1e-5, atol=1e-5)


def test_nf4_folder_and_plan_of_listed_linears_have_the_same_bytes(
    listed: tuple[PreTrainedModel, Tensors], tmp_path: Path
) -> None:
    folder = save(tmp_path / "packed", listed[0].config, pack(listed[1], True))
    assert planned_bytes(folder) == resident_bytes(load_tiny(folder).model)
    assert_same_bytes(load_tiny(quantized(folder, tmp_path / "out")), load_tiny(folder))


def test_lists_in_16_bits_are_quantized_as_the_stacks_are(
    listed: tuple[PreTrainedModel, Tensors], tmp_path: Path
) -> None:
    folder = save(tmp_path / "lists", listed[0].config, listed[1])
    assert_same_bytes(load_tiny(folder), load_tiny(tmp_path / "source"))


def test_missing_linear_of_a_list_is_told(listed: tuple[PreTrainedModel, Tensors], tmp_path: Path) -> None:
    model, lists = listed
    packed = {key: value for key, value in pack(lists, True).items() if ".1.mlp.experts.down_projs.3." not in key}
    message = (
        r"experts\.down_proj_bias, made of .*down_projs\.0\.bias and its like, has shape \(3, 64\)"
        if any(key.endswith("_projs.0.bias") for key in lists)
        else r"missing tensors: model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight$"
    )
    with pytest.raises(CheckpointError, match=message):
        load_tiny(save(tmp_path / "packed", model.config, packed))
