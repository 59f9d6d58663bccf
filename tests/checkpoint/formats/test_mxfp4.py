"""Checkpoints in MXFP4: experts stay as they are, or are dequantized exactly and quantized like any other."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from expertune.adapt.attach import attach
from expertune.checkpoint.formats.mxfp4 import dequantize_mxfp4
from expertune.checkpoint.formats.nf4_folder import read_nf4_folder
from expertune.checkpoint.load import LoadedModel, fingerprint_of, load_model
from expertune.config import LoraSection, QuantizationConfig
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from expertune.experts.module import Nf4Experts
from tests.checkpoint.nf4_folders import assert_same_bytes, quantized
from tests.families.build import tiny_config
from tests.tiny_models import load_tiny, random_rows

Tensors = dict[str, Tensor]
NAME = "model.layers.1.mlp.experts"
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack_blocks(weights_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """What a publisher would do: blocks of 32, a power of two each, the nearest of 16 values, the first one low."""
    blocks = weights_ENK.float().unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(blocks.abs().amax(-1).clamp_min(1e-30))) - 2
    scaled = blocks / torch.exp2(exponent)[..., None]
    magnitude = (scaled.abs()[..., None] - VALUES).abs().argmin(-1)
    codes = (magnitude + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), (exponent + 127).to(torch.uint8)


@pytest.fixture(scope="module")
def sixteen_bit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of a family that is published so: interleaved rows, transposed weights, biases."""
    folder = tmp_path_factory.mktemp("sixteen-bit")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("gpt_oss"), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def packed(sixteen_bit: Path, tmp_path: Path) -> Callable[..., Path]:
    """The same model with its experts in MXFP4, changed as a test wants it."""

    def write(change: Callable[[Tensors], object] = lambda tensors: None) -> Path:
        folder = tmp_path / "packed"
        folder.mkdir()
        tensors = load_file(sixteen_bit / "model.safetensors")
        for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
            blocks, scales = pack_blocks(tensors.pop(key).transpose(1, 2))
            tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        values = json.loads((sixteen_bit / "config.json").read_text(encoding="utf-8"))
        values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
        return folder

    return write


def dequantized_by_transformers(folder: Path, dtype: torch.dtype) -> Tensors:
    """Experts' weights as transformers itself reads the blocks, under live names."""
    tensors = load_file(folder / "model.safetensors")
    return {
        key.removesuffix("_blocks"): convert_moe_packed_tensors(
            tensors[key], tensors[key.replace("_blocks", "_scales")], dtype=dtype
        )
        for key in tensors
        if key.endswith("_blocks")
    }


def stock(sixteen_bit: Path, folder: Path, loaded: LoadedModel) -> PreTrainedModel:
    """transformers' own model over transformers' own dequantizing; attention as the 4-bit model has it."""
    model = AutoModelForCausalLM.from_pretrained(sixteen_bit, dtype=torch.float32, experts_implementation="eager")
    from tests.tiny_models import linear_weight

    with torch.no_grad():
        for name, weights in dequantized_by_transformers(folder, torch.float32).items():
            model.get_parameter(name).copy_(weights)
        for name, module in loaded.model.named_modules():
            if type(module).__name__ == "Nf4Linear":
                model.get_parameter(f"{name}.weight").copy_(linear_weight(module))
    return model.eval()


def logits(model: PreTrainedModel) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(random_rows(3, 16)).logits


def test_every_block_dequantizes_as_in_transformers() -> None:
    blocks = torch.randint(0, 256, (3, 8, 4, 16), dtype=torch.uint8)
    scales = torch.randint(90, 160, (3, 8, 4), dtype=torch.uint8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)
    assert torch.equal(dequantize_mxfp4(blocks, scales), theirs)


def test_blocks_are_kept_and_logits_are_those_of_stock_transformers_over_them(
    packed: Callable[..., Path], sixteen_bit: Path
) -> None:
    folder = packed()
    loaded = load_tiny(folder)
    assert loaded.unexpected == []
    experts = loaded.model.get_submodule(NAME)
    assert isinstance(experts, Nf4Experts)
    assert experts.gate_up.scheme == experts.down.scheme == "mxfp4"
    stored = load_file(folder / "model.safetensors")
    assert experts.gate_up.nbytes == sum(stored[f"{NAME}.gate_up_proj_{part}"].nbytes for part in ("blocks", "scales"))
    for name, weights in dequantized_by_transformers(folder, torch.float32).items():
        module = loaded.model.get_submodule(name.rpartition(".")[0])
        assert isinstance(module, Nf4Experts)
        for expert, live in enumerate(weights):
            rows = live.T
            parts = {"gate": rows[0::2], "up": rows[1::2]} if "gate_up" in name else {"down": rows}
            for projection, matrix in parts.items():
                assert torch.equal(module.dequantize(expert, projection, torch.float32), matrix)
    torch.testing.assert_close(logits(loaded.model), logits(stock(sixteen_bit, folder, loaded)), rtol=1e-5, atol=2e-5)


def test_scheme_nf4_quantizes_the_dequantized_values(
    packed: Callable[..., Path], sixteen_bit: Path, tmp_path: Path
) -> None:
    folder = packed()
    dequantized = tmp_path / "dequantized"
    dequantized.mkdir()
    tensors = load_file(sixteen_bit / "model.safetensors")
    save_file(
        tensors
        | {name: value.contiguous() for name, value in dequantized_by_transformers(folder, torch.float32).items()},
        dequantized / "model.safetensors",
        metadata={"format": "pt"},
    )
    (dequantized / "config.json").write_bytes((sixteen_bit / "config.json").read_bytes())
    assert_same_bytes(load_tiny(folder, scheme="nf4"), load_tiny(dequantized))


@pytest.mark.parametrize("scheme", ["auto", "nf4"])
def test_nf4_folder_holds_the_same_bytes_and_names_the_scheme(
    scheme: str, packed: Callable[..., Path], tmp_path: Path
) -> None:
    folder = packed()
    out = quantized(folder, tmp_path / "out", quantization=QuantizationConfig.model_validate({"scheme": scheme}))
    assert read_nf4_folder(out).scheme == ("mxfp4" if scheme == "auto" else "nf4")
    direct = load_tiny(folder, scheme=scheme)
    assert_same_bytes(load_tiny(out), direct)
    assert fingerprint_of(out).differences(direct.fingerprint) == []
    assert direct.fingerprint.held.scheme == ("mxfp4" if scheme == "auto" else "nf4")
    assert torch.equal(logits(load_tiny(out).model), logits(direct.model))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(direct.model))


def test_folder_that_keeps_mxfp4_is_no_nf4_for_a_run_that_asks_for_it(
    packed: Callable[..., Path], tmp_path: Path
) -> None:
    out = quantized(packed(), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"quantization\.scheme is nf4, but .* holds mxfp4"):
        load_model(out, QuantizationConfig(scheme="nf4"), torch.float32, "cpu")


def test_no_other_scales_are_chosen_for_blocks_that_are_kept(packed: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=r"quantization\.fit is mse, but .* is in 4 bits already"):
        load_model(packed(), QuantizationConfig(fit="mse"), torch.float32, "cpu")


def test_adapters_learn_on_kept_blocks(packed: Callable[..., Path]) -> None:
    folder = packed()
    model = attach(load_tiny(folder), LoraSection(r=4, targets=["experts"]), str(folder)).train()
    ids = random_rows(2, 10)
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_blocks_without_scales_are_named(packed: Callable[..., Path]) -> None:
    folder = packed(lambda tensors: tensors.pop(f"{NAME}.down_proj_scales"))
    with pytest.raises(CheckpointError, match=rf"tensor {NAME}\.down_proj_blocks has no .*_scales"):
        load_tiny(folder)


@pytest.mark.parametrize("scheme", ["auto", "nf4"])
def test_scales_of_another_shape_are_named(scheme: str, packed: Callable[..., Path]) -> None:
    key = f"{NAME}.down_proj_scales"
    folder = packed(lambda tensors: tensors.update({key: tensors[key][:, :-1].contiguous()}))
    with pytest.raises(CheckpointError, match=rf"{NAME}\.down_proj_blocks of .* does not fit scales"):
        load_tiny(folder, scheme=scheme)


def test_blocks_of_more_experts_than_the_model_has_are_named(packed: Callable[..., Path]) -> None:
    def double(tensors: Tensors) -> None:
        for part in ("blocks", "scales"):
            key = f"{NAME}.down_proj_{part}"
            tensors[key] = torch.cat([tensors[key], tensors[key]])

    with pytest.raises(CheckpointError, match=rf"tensor {NAME}\.down_proj_blocks holds .* weights, expected"):
        load_tiny(packed(double))


def test_missing_stack_is_named(packed: Callable[..., Path]) -> None:
    def drop(tensors: Tensors) -> None:
        for part in ("blocks", "scales"):
            del tensors[f"{NAME}.down_proj_{part}"]

    with pytest.raises(CheckpointError, match=r"missing tensors: model\.layers\.1\.mlp\.experts"):
        load_tiny(packed(drop))


def test_blocks_in_a_checkpoint_that_does_not_say_so_are_refused(packed: Callable[..., Path]) -> None:
    folder = packed()
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del values["quantization_config"]
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises((CheckpointError, UnsupportedModelError)):
        load_tiny(folder)
