"""The recipe: what of a model is held in 4 bits, and how, said once."""

from pathlib import Path

import torch

from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.reader import open_checkpoint
from expertune.checkpoint.recipe import Recipe, linears_to_quantize, read_recipe
from expertune.config import QuantizationConfig
from expertune.kernels.nf4 import BLOCK_SIZE


def test_block_size_of_a_run_file_and_of_a_folder_is_that_of_the_codec() -> None:
    assert QuantizationConfig().block_size == Recipe().to_json()["block_size"] == BLOCK_SIZE


def test_sixteen_bit_checkpoint_is_held_as_the_run_file_asks(mixtral: Path) -> None:
    model = build_meta_model(mixtral, torch.bfloat16)
    keys = open_checkpoint(mixtral).tensors
    recipe = read_recipe(model, read_names(model), keys, QuantizationConfig(double_quantization=False), mixtral)
    assert recipe.to_json() == {"scheme": "nf4", "double_quantization": False, "block_size": 64}
    assert recipe.linears.keys() == linears_to_quantize(model).keys()
    assert [(piece.key, piece.format) for piece in recipe.pieces] == [(key, None) for key in keys]
