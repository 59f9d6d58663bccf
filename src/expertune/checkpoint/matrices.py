"""The matrices that a model holds in 4 bits, as its 16-bit checkpoint has them: one after the other, never all of them.

They come as they are read, in the order of the files, by the code that quantizes them at a load. The model that is
trained is not touched.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from expertune.checkpoint.formats.nf4_folder import ABSMAX
from expertune.checkpoint.load import swap_experts
from expertune.checkpoint.loader import FLOATS, Loader
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.moments import Place
from expertune.checkpoint.names import read_names
from expertune.checkpoint.reader import TensorEntry, open_checkpoint
from expertune.checkpoint.recipe import read_recipe
from expertune.config import QuantizationConfig

Take = Callable[[Place, Tensor], None]
"""What is done with a matrix [out_features, in_features] of the checkpoint's dtype."""


@dataclass(frozen=True)
class SourceMatrices:
    """The checkpoint of a run.

    Attributes:
        folder: where it lies; it is not in 4 bits.
        quantization: how a run holds it.
        trust_remote_code: run Python that ships with the model.
    """

    folder: Path
    quantization: QuantizationConfig
    trust_remote_code: bool = False

    def stream(self, take: Take, progress: Callable[[int, int], None] = lambda *_: None) -> None:
        """Call `take` once for each matrix that is held in 4 bits; `progress` gets bytes read and in all.

        Raises:
            CheckpointError: a tensor is missing or damaged; names it.
        """
        index = open_checkpoint(self.folder)
        model = build_meta_model(self.folder, torch.bfloat16, self.trust_remote_code, shapes_only=True)
        names = read_names(model)
        recipe = read_recipe(model, names, index.tensors, self.quantization, index.folder)
        swap_experts(model, recipe, "meta")
        as_is = replace(recipe, fit=ABSMAX)  # nothing is quantized here
        reader = _Reader(model, names, as_is, torch.bfloat16, torch.device("cpu"))
        reader.take, reader.progress = take, progress
        reader.stream(index)


class _Reader(Loader):
    """A loader that hands matrices out in place of placing them, and reads nothing else."""

    take: Take

    def _write(self, entry: TensorEntry, module: str, expert: int, projection: str, matrix: Tensor) -> None:
        self.take(Place(module, projection, expert), _as_float(matrix))

    def _place(self, entry: TensorEntry, name: str, converted: Tensor | None = None) -> bool:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self.recipe.linears:
            self.take(Place(module), _as_float(entry.read() if converted is None else converted))
        return True


def _as_float(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype in FLOATS.values() else matrix.float()
