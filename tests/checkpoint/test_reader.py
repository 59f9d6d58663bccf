"""Safetensors folders are read tensor by tensor; whatever is wrong with one is named by file and tensor."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from expertune.checkpoint import reader
from expertune.checkpoint.reader import INDEX_NAME, Memory, open_checkpoint, read_header
from expertune.errors import CheckpointError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_reads_back_to_the_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = (torch.arange(24) % 3).reshape(2, 3, 4).to(dtype)
    save_file({"one": torch.zeros(3), "many": tensor}, tmp_path / "model.safetensors")
    entry = open_checkpoint(tmp_path).tensors["many"]
    assert (entry.shape, entry.dtype, entry.numel, entry.nbytes) == ((2, 3, 4), dtype, 24, 24 * dtype.itemsize)
    assert torch.equal(entry.read().view(torch.uint8), tensor.view(torch.uint8))
    assert torch.equal(entry.read_part(1).view(torch.uint8), tensor[1].view(torch.uint8))


def test_scalars_and_empty_tensors_read_back(tmp_path: Path) -> None:
    save_file({"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4)}, tmp_path / "model.safetensors")
    tensors = open_checkpoint(tmp_path).tensors
    assert tensors["scalar"].read() == torch.tensor(2.5)
    assert tensors["empty"].read().shape == (0, 4)


def test_large_tensor_that_is_read_in_parts_at_once_is_the_same_and_its_end_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_PART_BYTES", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    tensor, path = torch.arange(3001), tmp_path / "model.safetensors"
    save_file({"small": torch.ones(7), "large": tensor}, path)
    entry = open_checkpoint(tmp_path).tensors["large"]
    assert torch.equal(entry.read(), tensor)
    path.write_bytes(path.read_bytes()[: entry.start + entry.nbytes - 1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the file ends inside tensor large"):
        entry.read()


def test_tensors_that_are_read_into_the_same_memory_take_turns_in_it(tmp_path: Path) -> None:
    save_file({"one": torch.arange(6), "two": torch.ones(2, 2), "three": torch.arange(40)}, tmp_path / "a.safetensors")
    tensors, memory = open_checkpoint(tmp_path).tensors, Memory()
    one = tensors["one"].read(memory)
    assert torch.equal(one, torch.arange(6))
    two = tensors["two"].read(memory)
    assert torch.equal(two, torch.ones(2, 2))
    assert two.data_ptr() == one.data_ptr()
    assert torch.equal(tensors["three"].read(memory), torch.arange(40))


def test_tensors_of_all_shards_are_listed_with_their_total_size(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(5, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    index = open_checkpoint(tmp_path)
    assert list(index.tensors) == ["a", "b"]
    assert index.nbytes == 24 + 10


def test_shards_that_the_index_does_not_name_are_not_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "model-1.safetensors"}}', encoding="utf-8")
    assert not open_checkpoint(tmp_path).tensors["a"].read().any()


def test_adapter_files_beside_the_model_are_no_shards(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert not open_checkpoint(tmp_path).tensors["a"].read().any()


def test_truncated_file_is_refused_with_the_tensor_that_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"first": torch.zeros(64), "second": torch.zeros(64)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    said = (
        f"{path}: truncated: {len(content) - 4:,} bytes of {len(content):,}, 4 are missing, from tensor second on; "
        "copy it again from where it came"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("folder", "fix"),
    [
        ("model", "copy it again from where it came$"),
        (
            "hub/models--owner--a-name/snapshots/0123abc",
            "`hf download owner/a-name model.safetensors --revision 0123abc --force-download`$",
        ),
    ],
)
def test_damaged_file_of_the_hubs_cache_has_the_command_that_replaces_it(folder: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / folder / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"cut off")
    with pytest.raises(CheckpointError, match=fix):
        open_checkpoint(path.parent)


def test_file_that_shrinks_after_its_header_was_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(64)}, path)
    entry = open_checkpoint(tmp_path).tensors["a"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="the file ends inside tensor a"):
        entry.read()


def raw_file(header: bytes, data: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def header_of(**value: Any) -> bytes:
    return json.dumps({"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | value}).encode()


DAMAGED = {
    "empty": (b"", "not a safetensors file"),
    "seven bytes": (b"\0" * 7, "not a safetensors file"),
    "header length in big-endian": (struct.pack(">Q", 60) + header_of(), "not a safetensors file"),
    "header longer than the file": (raw_file(header_of(), length=10_000), "not a safetensors file"),
    "header of no length": (raw_file(b"", length=0), "not a safetensors file"),
    "a pickle": (b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s." * 40, "not a safetensors file"),
    "a page of HTML": (b"<!DOCTYPE html><html>" * 40, "not a safetensors file"),
    "header that is no JSON": (raw_file(b'{"t": nonsense}'), "header is damaged"),
    "header that is no UTF-8": (raw_file(b'{"\xff\xfe": 1}   '), "header is damaged"),
    "header that is a list": (raw_file(b'["t", "u"]'), "not a mapping of tensors"),
    "one name twice": (
        raw_file(b'{"t": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "t": {}}'),
        "t is there twice",
    ),
    "entry that is no mapping": (raw_file(b'{"t": [1, 2]}'), "header of tensor t is damaged"),
    "unknown dtype": (raw_file(header_of(dtype="F4")), "header of tensor t is damaged or of unknown dtype"),
    "entry without a shape": (
        raw_file(b'{"t": {"dtype": "F32", "data_offsets": [0, 16]}}'),
        "header of tensor t is damaged",
    ),
    "offsets that are no numbers": (raw_file(header_of(data_offsets=["a", "b"])), "header of tensor t is damaged"),
    "offsets that are nothing": (raw_file(header_of(data_offsets=[None, 16])), "header of tensor t is damaged"),
    "one offset": (raw_file(header_of(data_offsets=[0])), "header of tensor t is damaged"),
    "shape that does not fill the bytes": (raw_file(header_of(shape=[5])), r"tensor t of shape \(5,\)"),
    "negative shape": (raw_file(header_of(shape=[-2, -2])), "header of tensor t is damaged"),
    "negative offsets": (raw_file(header_of(data_offsets=[-16, 0])), "tensor t"),
    "offsets the wrong way round": (raw_file(header_of(data_offsets=[16, 0])), "tensor t"),
    "tensor behind the end": (raw_file(header_of(data_offsets=[100, 116])), "from tensor t on"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_file_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    content, message = DAMAGED[damage]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: .*{message}"):
        read_header(path)


def test_file_of_the_same_make_without_the_damage_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file(header_of()))
    assert torch.equal(read_header(path)["t"].read(), torch.zeros(4))


def test_shard_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a file"):
        open_checkpoint(tmp_path)


def two_shards(folder: Path) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(2)}, folder / "two.safetensors")
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


def test_tensor_in_two_shards_is_refused_with_both_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"a is stored twice, in one\.safetensors and two\.safetensors"):
        open_checkpoint(tmp_path)


def test_shard_that_the_index_names_and_that_is_missing_is_told(tmp_path: Path) -> None:
    write_index(two_shards(tmp_path), {"a": "one.safetensors", "b": "two.safetensors"})
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors: shard is missing"):
        open_checkpoint(tmp_path)


def test_tensor_that_the_index_names_and_no_shard_has_is_told(tmp_path: Path) -> None:
    write_index(two_shards(tmp_path), {"a": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor c is missing"):
        open_checkpoint(tmp_path)


def test_tensor_in_another_shard_than_the_index_says_is_told(tmp_path: Path) -> None:
    write_index(two_shards(tmp_path), {"a": "two.safetensors", "b": "one.safetensors"})
    with pytest.raises(CheckpointError, match=r"places tensor . in .*, but it lies in"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not JSON", "damaged: not valid JSON"),
        ('{"metadata": {}}', "names no tensors"),
        ("[]", "damaged: expected a mapping, got list"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": ["a"]}', "names no tensors"),
        ('{"weight_map": {"a": 5}}', "tensor a lies in 5, which is no file name"),
        ('{"weight_map": {"a": "../one.safetensors"}}', "which is no file name"),
    ],
)
def test_damaged_index_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (two_shards(tmp_path) / INDEX_NAME).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_folder_of_pickles_is_refused_and_never_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch harm'\ntR.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("make", [lambda folder: folder, lambda folder: folder / "elsewhere"])
def test_folder_without_weights_is_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors weights here|no such folder"):
        open_checkpoint(make(tmp_path))
