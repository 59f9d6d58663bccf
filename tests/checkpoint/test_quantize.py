"""Quantizing into a folder: shards in any order, in little memory, or one clear sentence why not."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from expertune.checkpoint import quantize as quantize_module
from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.verified import verify
from expertune.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.checkpoint.conftest import Rewrite
from tests.checkpoint.nf4_folders import contents, quantized, weights
from tests.processes import run_program

Tensors = dict[str, Tensor]
NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="module")
def folder(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What comes of the tiny Mixtral when nothing goes wrong."""
    return quantized(mixtral, tmp_path_factory.mktemp("quantized") / "mixtral")


@pytest.mark.parametrize("num_shards", [1, 5])
def test_shards_in_any_order_give_identical_files(num_shards: int, rewrite: Rewrite, folder: Path) -> None:
    def backwards(tensors: Tensors) -> None:
        for key in list(reversed(tensors)):
            tensors[key] = tensors.pop(key)

    source = rewrite(backwards, shard_of=lambda key: sum(map(ord, key)) % num_shards)
    assert weights(quantized(source, source.parent / "out")) == weights(folder)


def test_small_files_come_along_and_code_only_where_it_is_trusted(rewrite: Rewrite, tmp_path: Path) -> None:
    source = rewrite()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "modeling.py",
        "x.bin",
    ):
        (source / name).write_text("{}", encoding="utf-8")
    out = quantized(source, tmp_path / "out")
    copied = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "merges.txt"} < copied
    assert not {"modeling.py", "x.bin"} & copied
    assert (quantized(source, tmp_path / "trusted", trust_remote_code=True) / "modeling.py").is_file()
    assert verify(out) == len(copied) - 2  # the manifest, and what people may write to: README.md


# ---- room


def test_too_little_room_is_refused_before_anything_is_written(
    mixtral: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(CheckpointError, match=r"\d+ bytes are needed \(0\.2 MB\), and 0\.0 MB are free"):
        quantize(str(mixtral), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- places that cannot be written


def test_folder_that_holds_something_else_is_left_alone(mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds something else; choose a new or an empty folder"):
        quantize(str(mixtral), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_empty_folder_is_taken(mixtral: Path, folder: Path, tmp_path: Path) -> None:
    assert contents(quantized(mixtral, tmp_path)) == contents(folder)


def test_file_in_place_of_the_folder_is_refused(mixtral: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(CheckpointError, match="out: a file; choose a folder to write"):
        quantize(str(mixtral), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"cannot be written or read"):
        quantize(str(mixtral), tmp_path / "out" / "below")


def test_folder_that_may_not_be_written_is_named(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def refuse(path: Path, values: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(quantize_module, "write_json", refuse)
    with pytest.raises(CheckpointError, match=rf"{out}/.*: cannot be written or read \(Permission denied\)"):
        quantize(str(mixtral), out)


def test_model_and_folder_may_not_be_one(rewrite: Rewrite) -> None:
    source = rewrite()
    with pytest.raises(CheckpointError, match="the model itself lies here"):
        quantize(str(source), source)


def test_nf4_folder_is_not_quantized_again(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="already an NF4 folder"):
        quantize(str(folder), tmp_path / "out")


# ---- sources that are wrong


@pytest.mark.parametrize("key", [NORM, "model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.norm.weight"])
def test_missing_tensor_is_named_and_its_file_not_written(key: str, rewrite: Rewrite, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=rf"missing tensors: {key}\. \d finished files? (is|are) kept in .*out, and"
    ):
        quantize(str(rewrite(lambda tensors: tensors.pop(key))), tmp_path / "out")
    file = "rest.safetensors" if key == "model.norm.weight" else "layer-00001.safetensors"
    assert not (tmp_path / "out" / file).exists()


@pytest.mark.parametrize("key", [NORM, "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_weight_that_is_not_finite_is_named_and_nothing_half_written(
    key: str, rewrite: Rewrite, tmp_path: Path
) -> None:
    source = rewrite(lambda tensors: tensors[key].view(-1)[5].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=rf"tensor {key}.* NaN or infinite"):
        quantize(str(source), tmp_path / "out")
    assert list((tmp_path / "out").glob(".*")) == []


def test_source_without_a_config_or_of_another_method_is_refused(rewrite: Rewrite, tmp_path: Path) -> None:
    source = rewrite(quantization_config={"quant_method": "awq"})
    with pytest.raises(UnsupportedModelError, match=r"already quantized \(awq\)"):
        quantize(str(source), tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json here"):
        quantize(str(source), tmp_path / "out")


# ---- memory

MEASURE = """
import sys
from expertune.checkpoint.quantize import quantize
from tests.memory import Peak

quantize(sys.argv[1], sys.argv[2] + "-warm")  # imports and pools are not weights
with Peak() as peak:
    quantize(sys.argv[3], sys.argv[2])
print(peak.bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_quantizing_never_holds_more_than_one_layer_and_one_tensor(mixtral: Path, tmp_path: Path) -> None:
    """Two layers of 25 MiB in 4 bits, of matrices of 4 MiB, and embeddings and head of 32 MiB each."""
    source = tmp_path / "large"
    source.mkdir()
    values = json.loads((mixtral / "config.json").read_text(encoding="utf-8"))
    values |= {"hidden_size": 1024, "intermediate_size": 2048, "num_local_experts": 8, "num_hidden_layers": 2}
    (source / "config.json").write_text(json.dumps(values | {"vocab_size": 16384}), encoding="utf-8")
    noise = torch.randn(16384 * 1024).bfloat16()
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (16384, 1024),
        "lm_head.weight": (16384, 1024),
        "model.norm.weight": (1024,),
    }
    for number in range(2):
        layer = f"model.layers.{number}"
        heads = 1024 // values["num_attention_heads"] * values["num_key_value_heads"]
        shapes |= {f"{layer}.input_layernorm.weight": (1024,), f"{layer}.post_attention_layernorm.weight": (1024,)}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (1024, 1024) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (heads, 1024) for name in "kv"}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (8, 1024)
        for expert in range(8):
            name = f"{layer}.block_sparse_moe.experts.{expert}"
            shapes |= {f"{name}.w1.weight": (2048, 1024), f"{name}.w2.weight": (1024, 2048)}
            shapes[f"{name}.w3.weight"] = (2048, 1024)
    tensors = {key: noise[: torch.Size(shape).numel()].view(shape) for key, shape in shapes.items()}
    for number in range(4):  # every layer is spread over all four shards
        part = {key: tensor.clone() for key, tensor in list(tensors.items())[number::4]}
        save_file(part, source / f"model-{number}.safetensors")
    ended = run_program(MEASURE, str(mixtral), str(tmp_path / "out"), str(source))
    assert ended.status == 0, ended.err[-4000:]
    layer = 8 * 3 * 1024 * 2048 * (0.5 + 1 / 64)
    # Both layers, or embeddings and head, would be more. Beyond one layer: a matrix, tiles of 4 MiB, and what the
    # allocator keeps back of them.
    assert layer <= int(ended.out) <= layer + 48 * 2**20
