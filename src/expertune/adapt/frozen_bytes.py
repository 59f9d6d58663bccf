"""Checksums of what experts hold, from before and after an adapter is attached: of all bytes, without a copy of them.

Adding up numbers takes as long as reading them, on any device: a hash that no one could forge would take ten times as
long on a CPU, and nothing here is forged.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from expertune.experts.module import Nf4Experts
from expertune.placement.experts import placement_of

# Words of 8 bytes that are added up to one: whatever is moved, is moved across more than these.
_WORDS = 64

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


def _added_up(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of a tensor's words, `_WORDS` at a time in order, and what bytes are left of it."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:  # which cannot be looked at as words
        flat = flat.clone()
    whole = flat.numel() // (8 * _WORDS) * (8 * _WORDS)
    return flat[:whole].view(torch.int64).view(-1, _WORDS).sum(dim=1), flat[whole:]
