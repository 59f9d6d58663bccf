"""What is to be written of an NF4 folder, one file after the other: which weights go into which, and in what order."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from expertune.checkpoint.formats.interface import Piece
from expertune.checkpoint.formats.nf4_folder import REST
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.recipe import Recipe

# Of a 4-bit linear, beside its weight and scales: the codebooks and the state's JSON.
_LINEAR_STATE_BYTES = 2048


@dataclass
class Job:
    """One file of the folder: a decoder layer, or all the rest.

    Attributes:
        file: its name.
        layer: the layer's live name; None for the rest.
        pieces: the source's weights that go into it.
    """

    file: str
    layer: str | None
    pieces: list[Piece] = field(default_factory=list)

    def shards(self, weight_map: dict[str, str]) -> set[str]:
        """Names of the shards that hold them."""
        return {weight_map[key] for piece in self.pieces for key in piece.parts.values()}


def make_jobs(layers: list[str], names: NameMap, pieces: Sequence[Piece]) -> list[Job]:
    """A job for each decoder layer in model order, and one for the rest."""
    jobs = {layer: Job(f"layer-{number:05d}.safetensors", layer) for number, layer in enumerate(layers)}
    rest = Job(REST, None)
    for piece in pieces:
        path = names.locate(piece.key).name.split(".")
        owner = next((layer for end in range(1, len(path)) if (layer := ".".join(path[:end])) in jobs), None)
        (rest if owner is None else jobs[owner]).pieces.append(piece)
    return [*jobs.values(), rest]


def few_shards_at_once(jobs: list[Job], weight_map: dict[str, str]) -> list[Job]:
    """The jobs in an order that opens few new shards for each: next is always the one that needs the fewest."""
    left, ordered = list(jobs), []
    here: set[str] = set()
    needs = {job.file: job.shards(weight_map) for job in jobs}
    while left:
        job = min(left, key=lambda job: len(needs[job.file] - here))
        left.remove(job)
        ordered.append(job)
        here = (here | needs[job.file]) & set().union(*(needs[other.file] for other in left))
    return ordered


def estimate_bytes(model: nn.Module, job: Job, layers: list[str], recipe: Recipe) -> int:
    """Bytes of a file, from shapes: exact but for the header and dtypes that differ from the config's."""
    prefixes = tuple(f"{layer}." for layer in layers)
    total = 0
    for name, tensor in saved_tensors(model).items():
        if name.startswith(f"{job.layer}.") if job.layer else not name.startswith(prefixes):
            if name.removesuffix(".weight") in recipe.linears and name.endswith(".weight"):
                total += int(tensor.numel() * recipe.bytes_per_weight) + _LINEAR_STATE_BYTES
            else:
                total += tensor.nbytes
    return total


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and persistent buffers by live name."""
    saved = model.state_dict().keys()
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    return tensors | {name: buffer for name, buffer in model.named_buffers() if name in saved}
