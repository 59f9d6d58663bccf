"""Checksums of what experts hold, from before and after an adapter is attached: of all bytes, without a copy of them.

Words are added up along the rows and the columns of a table, and the sums are hashed in order, so that words which are
exchanged show wherever they are. A hash that no one could forge would take three times as long on a CPU, and nothing
here is forged.
"""

import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from expertune.experts.module import Nf4Experts
from expertune.placement.experts import placement_of

# Words of 8 bytes to a row; bytes to a table, which is copied where words do not begin where its bytes do.
_WORDS = 64
_TABLE_BYTES = 2**26

Checksums = Mapping[Nf4Experts, str]


def expert_checksums(model: nn.Module) -> Checksums:
    """A checksum of all bytes that each experts module holds in memory: packed weights, scales, biases, norms.

    Modules on disk are left out: reading them takes as long as a pass over the model, and their files are mapped for
    reading alone.
    """
    placement = placement_of(model)
    locations = placement.locations if placement else {}
    on_disk = {placement.experts[name] for name, to in locations.items() if to == "disk"} if placement else set()
    experts = (module for module in model.modules() if isinstance(module, Nf4Experts) and module not in on_disk)
    return {module: _checksum(module) for module in experts}


def first_changed(model: nn.Module, before: Checksums) -> str | None:
    """The name of the first experts module that holds other bytes than before, or None.

    Those that have been offloaded to disk meanwhile are left out.
    """
    now = expert_checksums(model)
    changed = {module for module, checksum in now.items() if before.get(module, checksum) != checksum}
    return next((name for name, module in model.named_modules() if module in changed), None)


def _checksum(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.numel():
            for part in _added_up(tensor):
                sha.update(part.cpu().numpy().data)
    return sha.hexdigest()


def _added_up(tensor: Tensor) -> Iterator[Tensor]:
    """Sums of a tensor's words by row and by column of each table, and the bytes after its last row."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    for table in flat.split(_TABLE_BYTES):
        whole = table.numel() // (8 * _WORDS) * (8 * _WORDS)
        aligned = table.clone() if table.storage_offset() % 8 else table
        words = aligned[:whole].view(torch.int64).view(-1, _WORDS)
        yield from (words.sum(dim=1), words.sum(dim=0), table[whole:])
