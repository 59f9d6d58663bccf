"""What the drivers of GPU peers have in common: a guard, a model folder with a tokenizer, and a look at what was built.

Imports nothing but torch and the standard library: it serves environments of different ages.
"""

import argparse
import gzip
import importlib.util
import tempfile
from pathlib import Path

import torch
from torch import nn

TOKENIZER = Path(__file__).resolve().parents[2] / "tests" / "data" / "files" / "mixtral-tokenizer"
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def require(args: argparse.Namespace, *modules: str) -> None:
    """End the driver, saying what is missing.

    Raises:
        SystemExit: a module cannot be found, or the device is not a GPU.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{', '.join(missing)} not installed; see benchmarks/README.md")
    if args.device != "cuda" or not torch.cuda.is_available():
        raise SystemExit("this peer needs a CUDA GPU: --device cuda, on a machine that has one")


def with_tokenizer(model: Path) -> Path:
    """A folder with links to the model's files and Mixtral's tokenizer, which these peers load together.

    The tokenizer decides nothing here: the batch holds token ids.
    """
    folder = Path(tempfile.mkdtemp(prefix="peer-model-"))
    for source in model.iterdir():
        (folder / source.name).symlink_to(source.resolve())
    for source in TOKENIZER.iterdir():
        content = source.read_bytes()
        plain = gzip.decompress(content) if source.suffix == ".gz" else content
        (folder / source.name.removesuffix(".gz")).write_bytes(plain)
    return folder


def require_trained_experts(model: nn.Module) -> None:
    """End the driver where no expert has an adapter: its speed would be that of another task.

    Raises:
        SystemExit: no parameter of an expert trains.
    """
    if not any(".experts." in name and tensor.requires_grad for name, tensor in model.named_parameters()):
        raise SystemExit("the peer put no adapter on the experts")


def describe(model: nn.Module) -> list[str]:
    """Notes on what the peer built: how its experts are held, and what trains in them.

    Read from the model, so that a peer that leaves its experts in 16 bits or without adapters says so in the result.
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    experts = [(name, tensor) for name, tensor in named if ".experts." in name]
    trained = [tensor for name, tensor in experts if tensor.requires_grad]
    frozen_bytes = sum(tensor.nbytes for _, tensor in experts if not tensor.requires_grad)
    wide = sum(t.nbytes for _, t in experts if not t.requires_grad and t.is_floating_point() and t.dim() >= 3)
    return [
        f"experts: {frozen_bytes / 1e9:.3f} GB frozen, of which {wide / 1e9:.3f} GB in 16 bits or more",
        f"experts: {sum(tensor.numel() for tensor in trained)} weights of {len(trained)} factors train",
        "the adapter is as the peer begins it (B at zero): its loss is the base model's, and its gradient not ours",
    ]
