"""What is exported: an adapter on a tiny model, its factors of the size that training gives them."""

import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from expertune.adapt.attach import attach
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.load import LoadedModel
from expertune.config import LoraSection, parse_config
from expertune.data import TokenizedExample
from expertune.exporting import programs
from expertune.exporting.engines.stock import scale
from expertune.exporting.opening import read_source
from expertune.exporting.source import ExportSource
from expertune.run.context import RunContext
from expertune.run.progress import Bars
from expertune.run.record import RunRecord
from tests.adapt.conftest import train_a_little
from tests.processes import ENGINES, RUN, run_program
from tests.tiny_models import copied, load_tiny, random_rows, stock_model


def nothing(*_: Any) -> None:
    """Progress that nobody looks at."""


def source_of(loaded: LoadedModel, model: Path, folder: Path, onto: str = "source", **lora: Any) -> ExportSource:
    """A source with an adapter that is written here, and a few examples of random tokens."""
    adapted = attach(copied(loaded), LoraSection(**{"r": 4, "alpha": 8, "targets": ["experts"], **lora}), str(model))
    train_a_little(adapted)
    adapted.save_pretrained(str(folder / "adapter"))
    config = parse_config({"model": str(model), "data": {"train": "rows.jsonl"}, "output_dir": str(folder)})
    context = RunContext(config, RunRecord.start(folder), torch.device("cpu"), Bars(Console(file=io.StringIO())))
    source = read_source(context, folder / "adapter", ModelSource(model), onto)
    source.__dict__["plain_tokens"] = range(3, source.model.config.get_text_config().vocab_size)
    rows = random_rows(4, 24).tolist()
    source.__dict__["examples"] = [TokenizedExample(row, row, "here", "", "", len(row)) for row in rows]
    return source


@torch.no_grad()
def base_and_adapter(source: ExportSource, model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A stock model in float32 with the adapter added to its parameters, and DoRA's magnitudes, each rounded."""
    magnitudes = dict(source.magnitudes())
    for name, left, right in source.updates():
        parameter = model.get_parameter(name)
        values = parameter + left @ right
        if name in magnitudes:
            scale(values, magnitudes[name])
        parameter.copy_(values.to(dtype))
    return model


@pytest.fixture(scope="session")
def mixtral_source(tmp_path_factory: pytest.TempPathFactory, family_folder: Any) -> ExportSource:
    folder = family_folder("mixtral")
    targets = ["attention", "experts", "router"]
    return source_of(load_tiny(folder), folder, tmp_path_factory.mktemp("run"), targets=targets, rslora=True)


@pytest.fixture(scope="module")
def copied_processes() -> Iterator[None]:
    """The programs run in copies of a process that has imported what they import, and nothing of ours but in one."""
    own = "trained.py"

    def run(command: Sequence[str], seconds: float) -> tuple[int, str]:
        assert command[0] == sys.executable
        program = Path(command[1])
        code = f"import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path({str(program)!r}, {{}}, '__main__')"
        if program.name != own:
            code = f"import sys; assert 'expertune' not in sys.modules; {code}"
        imports = RUN if program.name == own else ENGINES
        ended = run_program(code, *command[1:], folder=Path(command[-1]).parent, imports=imports, HF_HUB_OFFLINE="1")
        return ended.status, ended.err

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "start", run)
        yield


__all__ = ["stock_model"]
