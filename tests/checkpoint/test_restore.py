"""Tensors of an NF4 folder that are held in another dtype than they are stored in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from expertune.checkpoint import restore
from expertune.checkpoint.reader import Memory, read_header


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensor_that_is_read_in_pieces_is_the_one_that_is_read_whole(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore, "_PIECE_BYTES", 64)
    shapes = {"stack": (7, 5, 3), "scalar": (), "vector": (100,), "empty": (0, 4), "wide": (3, 1000)}
    tensors = {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    memory = Memory()
    for name, entry in read_header(tmp_path / "model.safetensors").items():
        placed = restore._read_as(dtype, entry, torch.device("cpu"), memory)
        assert placed.dtype == dtype
        assert torch.equal(placed, tensors[name].to(dtype))
