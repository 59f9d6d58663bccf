"""What an export starts from, of any tiny model: random factors of ranks and scales that differ, and token ids."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from expertune.adapt.factors import AdapterFactors, Factors
from expertune.adapt.files import AdapterFile
from expertune.checkpoint.fingerprint import read_fingerprint
from expertune.checkpoint.held import Held
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.meta import build_meta_model
from expertune.checkpoint.names import read_names
from expertune.checkpoint.reader import open_checkpoint
from expertune.config import RunConfig
from expertune.data.examples import TokenizedExample
from expertune.exporting.source import ExportSource
from expertune.run.context import RunContext
from expertune.run.progress import Bars
from expertune.run.record import RunRecord

LINEARS = ("q_proj", "o_proj")
RANKS = {"gate": 3, "up": 3, "down": 5}
SCALES = {"gate": 2.0, "up": 2.0, "down": 0.7}


def random_source(
    folder: Path,
    projections: Sequence[str] = ("gate", "up", "down"),
    linears: Sequence[str] = LINEARS,
    adapts: Callable[[str], bool] = lambda _: True,
) -> ExportSource:
    """An adapter of a model folder, as a run would have left it.

    Args:
        folder: the model.
        projections: which of the experts it changes.
        linears: last parts of the names of linears that it changes; of these scales are 2, and ranks 4.
        adapts: whether a module, by its live name, is changed.
    """
    torch.manual_seed(1)
    model = build_meta_model(folder, torch.bfloat16, False, shapes_only=True)
    names, index = read_names(model), open_checkpoint(folder)
    found = AdapterFactors()
    for name in filter(adapts, names.live_modules()):
        if name.rpartition(".")[2] in linears:
            outputs, inputs = model.get_submodule(name).weight.shape
            found.linears[name] = Factors(torch.randn(4, inputs) / inputs**0.5, torch.randn(outputs, 4) / 16, 2.0)
    for module, spec in names.specs.items():
        for projection in projections if adapts(module) else ():
            (outputs, inputs), rank = spec.shape(projection), RANKS[projection]
            a = torch.randn(spec.num_experts, rank, inputs) / inputs**0.5
            b = torch.randn(spec.num_experts, outputs, rank) / 8
            pairs = [Factors(*pair, SCALES[projection]) for pair in zip(a, b, strict=True)]
            found.experts.setdefault(module, {})[projection] = pairs
    config = RunConfig(model=str(folder), data={"train": "rows.jsonl"}, output_dir=str(folder / "run"))
    bars = Bars(Console(file=io.StringIO()))
    context = RunContext(config, RunRecord(folder / "run" / "run.json", {}), torch.device("cpu"), bars)
    source = ExportSource(
        context=context,
        adapter=AdapterFile({}, {}, None, {}, str(folder / "adapter")),
        base=ModelSource(folder),
        index=index,
        model=model,
        names=names,
        fingerprint=read_fingerprint(folder, index.tensors, model, names, Held()),
        factors=found,
    )
    source.__dict__["plain_tokens"] = range(3, model.config.get_text_config().vocab_size)
    ids = [torch.randint(3, model.config.get_text_config().vocab_size, (12,)).tolist() for _ in range(4)]
    source.__dict__["examples"] = [TokenizedExample(each, each, "row", "", "", len(each)) for each in ids]
    return source
