"""Adapters for mlx-lm, run in mlx-lm: it computes what stock transformers does with base and adapter."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import expertune.exporting.engines
from expertune.checkpoint.formats.mxfp4 import dequantize_mxfp4
from expertune.errors import ConfigError, ExportError
from expertune.exporting import programs
from expertune.exporting.formats import Options, make_format
from expertune.exporting.mlx import make
from expertune.exporting.source import ExportSource
from tests.checkpoint.formats.test_mxfp4 import pack_blocks
from tests.exporting.sources import random_source
from tests.families.build import tiny_config
from tests.tiny_models import FolderOf, save_random, save_tiny_model, stock_model

installed = pytest.mark.skipif(find_spec("mlx_lm") is None, reason="needs mlx-lm: pip install 'expertune[mlx]'")
EMBEDDED = Path(expertune.__file__).parent / "assets" / "tiny-mixtral"
PROGRAM = Path(expertune.exporting.engines.__file__).parent / "mlx_runtime.py"
pytestmark = pytest.mark.usefixtures("copied_processes")
PROMPTS = [[5, 17, 3, 60, 9, 33, 71], [40, 8, 90, 12]]
TOLERANCE = 1e-4

Tensors = dict[str, Tensor]


def swap_gate_and_up(tensors: Tensors, lora: dict[str, object]) -> None:
    """w1's factors for w3, and the other way round."""
    for name in [name for name in tensors if ".gate_proj." in name]:
        other = name.replace("gate_proj", "up_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def drop_an_expert(tensors: Tensors, lora: dict[str, object]) -> None:
    for name in [name for name in tensors if "switch_mlp" in name and name.endswith("lora_b")]:
        tensors[name][1] = 0


def halve_alpha(tensors: Tensors, lora: dict[str, object]) -> None:
    lora["scale"] = lora["scale"] / 2  # type: ignore[operator]


def transpose_b(tensors: Tensors, lora: dict[str, object]) -> None:
    for name in [name for name in tensors if name.endswith("lora_b")]:
        tensors[name] = tensors[name].mT.contiguous().view(tensors[name].shape)


DAMAGES = (swap_gate_and_up, drop_an_expert, halve_alpha, transpose_b)


def published(folder: Path) -> Path:
    """Keys of `config.json` as published models have them, which mlx-lm reads."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    scaling = None if rope["rope_type"] == "default" else rope
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "num_experts": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def written(source: ExportSource, folder: Path, name: str = "mlx") -> Path:
    folder.mkdir()
    form = make(name, Options())
    form.require(source)
    form.write(source, folder, lambda *_: None)
    return folder


def damaged(folder: Path, to: Path, damage: Callable[[Tensors, dict[str, object]], None]) -> Path:
    shutil.copytree(folder, to)
    tensors = load_file(folder / "adapters.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    damage(tensors, config["lora_parameters"])
    save_file(tensors, to / "adapters.safetensors", {"format": "mlx"})
    (to / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return to


@torch.no_grad()
def reference(source: ExportSource, dtype: torch.dtype = torch.float32) -> Tensor:
    """Log-probabilities of stock transformers with scale * B @ A added to its parameters, rounded to a dtype."""
    model = stock_model(source.base.folder)
    for name, left, right in source.updates():
        parameter = model.get_parameter(name)
        parameter.copy_((parameter + left @ right).to(dtype))
    return torch.cat([model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in PROMPTS])


def answered(cases: dict[str, dict[str, str]], scratch: Path) -> Tensors:
    """Log-probabilities of each case, by one process of mlx-lm."""
    request = scratch / "request.json"
    request.write_text(json.dumps({"prompts": PROMPTS, "cases": cases}), encoding="utf-8")
    status, errors = programs.start([sys.executable, str(PROGRAM), str(request)], 900)
    assert status == 0, errors
    return {name: load_file(scratch / f"{name}.safetensors")["logprobs"] for name in cases}


def adapted(source: ExportSource, scratch: Path) -> dict[str, str]:
    """The case of an adapter."""
    return {"model": str(source.base.folder), "adapter": str(written(source, scratch))}


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, copied_processes: None
) -> tuple[dict[str, ExportSource], Tensors]:
    """Sources by name, and log-probabilities of their exports, right and damaged."""
    scratch = tmp_path_factory.mktemp("mlx")
    sources = {
        family: random_source(published(save_tiny_model(scratch / family, family)))
        for family in ("mixtral", "granitemoe")
    }
    cases = {name: adapted(source, scratch / f"{name}-adapter") for name, source in sources.items()}
    for damage in DAMAGES:
        folder = damaged(scratch / "mixtral-adapter", scratch / damage.__name__, damage)
        cases[damage.__name__] = cases["mixtral"] | {"adapter": str(folder)}
    return sources, answered(cases, scratch)


@installed
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("mixtral", id="experts by themselves on the disk, ranks and scales that differ"),
        pytest.param("granitemoe", id="experts stacked on the disk, gate and up in one"),
    ],
)
def test_mlx_lm_computes_base_and_adapter_as_transformers_does(
    answers: tuple[dict[str, ExportSource], Tensors], name: str
) -> None:
    sources, found = answers
    assert_same(found[name], reference(sources[name]))


@installed
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.replace("_", " "))
def test_wrong_adapter_is_told_apart_in_mlx_lm(
    answers: tuple[dict[str, ExportSource], Tensors], damage: Callable[..., None]
) -> None:
    sources, found = answers
    assert torch.dist(found[damage.__name__], reference(sources["mixtral"]), p=torch.inf) > 100 * TOLERANCE


@installed
@pytest.mark.slow
def test_mlx_lm_computes_other_exports_as_transformers_does(tmp_path: Path) -> None:
    """One projection of one layer; experts in MXFP4 with alternating output features; a merged model."""
    folder = published(save_tiny_model(tmp_path / "qwen3_moe", "qwen3_moe"))
    part = random_source(folder, ("gate",), (), lambda name: ".1." in name)
    packed, plain = random_source(mxfp4_folder(tmp_path)), random_source(tmp_path / "dequantized")
    merged = random_source(EMBEDDED)
    cases = {"part": adapted(part, tmp_path / "part"), "packed": adapted(packed, tmp_path / "packed-adapter")}
    cases["base"] = {"model": str(packed.base.folder)}
    cases["merged"] = {"model": str(written(merged, tmp_path / "merged-model", "mlx-merged"))}
    found = answered(cases, tmp_path)
    assert_same(found["part"], reference(part))
    # mlx-lm's rotary embedding differs a little where it is scaled, with an adapter and without.
    allowed = 2 * torch.dist(found["base"], reference(plain.only(lambda _: False)), p=torch.inf)
    assert torch.dist(found["packed"], reference(plain), p=torch.inf) <= allowed < 0.01
    assert_same(found["merged"], reference(merged, torch.bfloat16))


def mxfp4_folder(scratch: Path) -> Path:
    """A model that is published with its experts in MXFP4; beside it `dequantized`, the same values in 16 bits."""
    plain, packed = save_random(scratch / "dequantized", tiny_config("gpt_oss")), scratch / "packed"
    shutil.copytree(plain, packed)
    tensors, values = (load_file(plain / "model.safetensors") for _ in range(2))
    for key in [key for key in tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales = pack_blocks(tensors.pop(key).transpose(1, 2))
        tensors |= {f"{key}_blocks": blocks, f"{key}_scales": scales}
        values[key] = dequantize_mxfp4(blocks, scales).transpose(1, 2).to(torch.bfloat16).contiguous()
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    config = json.loads((published(packed) / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return packed


@installed
@pytest.mark.slow
def test_module_that_mlx_lm_holds_otherwise_is_refused_by_name(family_folder: FolderOf) -> None:
    source = random_source(published(family_folder("deepseek_v3")), linears=("kv_b_proj",))
    with pytest.raises(ExportError, match=r"mlx-lm holds model\.layers\.0\.self_attn\.kv_b_proj otherwise than"):
        make("mlx", Options()).require(source)


@installed
@pytest.mark.slow
def test_family_that_mlx_lm_lacks_is_refused_by_name(tmp_path: Path) -> None:
    source = random_source(save_random(tmp_path / "model", tiny_config("flex_olmo")))
    with pytest.raises(ExportError, match="mlx-lm cannot take this: ValueError: Model type flex_olmo not supported"):
        make("mlx", Options()).require(source)


@pytest.mark.skipif(find_spec("mlx_lm") is not None, reason="mlx-lm is installed")
def test_export_without_mlx_lm_says_how_to_install_it(family_folder: FolderOf) -> None:
    source = random_source(family_folder("mixtral"))
    with pytest.raises(ExportError, match=r"not installed: pip install 'expertune\[mlx\]' .*glibc 2\.35"):
        make("mlx", Options()).require(source)


@pytest.mark.parametrize("name", ["mlx", "mlx-merged", "vllm", "peft"])
def test_base_that_a_format_has_no_choice_of_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"--base dequantized: --to {name} has no choice of it; merged, gguf have"):
        make_format(name, Options("dequantized"))
