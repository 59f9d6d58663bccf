"""What a run's exports are worth: loss and task score of each on the run's evaluation examples, side by side.

    python benchmarks/export_quality.py RUN_DIR --json OUT [--rows 256] [--types bf16 q8_0]

Compared are the 4-bit base with the adapter, as it was trained; the 16-bit base with the adapter; merged models; and
GGUF files in llama.cpp, an adapter over the base in float32 and merged models in several types. Answers are greedy.
Needs `expertune[gguf]`, and a run whose task has a metric.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from rich.console import Console
from rich.table import Table

import expertune
from expertune.checkpoint.meta import auto_class
from expertune.data import encode_prompt, make_collator, make_dataset, prepare_examples, settled
from expertune.evaluation.metrics import METRICS
from expertune.evaluation.scoring import evaluation_loss, score_task
from expertune.exporting.gguf import ADAPTER_FILE, convert
from expertune.exporting.opening import open_source

BATCH = 16


class Quality:
    """The examples of a run, and how a model or a GGUF file does on them."""

    def __init__(self, run_dir: str, rows: int) -> None:
        self.source = open_source(run_dir)
        config = self.source.context.config
        self.task = config.task.model_copy(update={"rows": rows, "batch_size": BATCH})
        data = settled(config.data, self.source.context.record["data"]["eval"])
        self.tokenizer = self.source.tokenizer
        self.examples = prepare_examples(data, "eval", self.tokenizer).examples[:rows]
        prepared = prepare_examples(data, "eval", self.tokenizer)
        dataset = make_dataset(prepared, config.data)
        self.dataset = [dataset[index] for index in range(min(rows, len(dataset)))]
        self.collator = make_collator(data.model_copy(update={"packing": "padded"}), self.tokenizer)
        self.metric = METRICS[self.task.metric]
        self.figures = ("slot_f1", "exact_match") if self.task.metric == "slot-f1" else None

    def of_model(self, model: torch.nn.Module) -> dict[str, Any]:
        """Loss and score of a model of transformers."""
        loss = evaluation_loss(model, self.dataset, self.collator, BATCH)
        scored = score_task(model, self.tokenizer, self.examples, self.task)
        return {"loss": loss, **self._shown(scored)}

    def of_gguf(self, model: Path, adapter: Path | None = None) -> dict[str, Any]:
        """Score of a GGUF file in llama.cpp."""
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        if adapter:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        parameters.n_parallel, parameters.port, parameters.verbosity = 1, 0, 0
        server = xllamacpp.Server(parameters)
        answers = []
        for example in self.examples:
            request = {"prompt": encode_prompt(example.prompt, self.tokenizer), "temperature": 0.0}
            said = server.handle_completions(request | {"n_predict": self.task.max_new_tokens})
            answers.append(said["choices"][0]["text"])
        scored = self.metric.score([example.completion for example in self.examples], answers)
        return {"loss": None, **self._shown(scored)}

    def _shown(self, scored: dict[str, Any]) -> dict[str, float]:
        names = self.figures or [figure.name for figure in self.metric.figures]
        return {name: scored[name] for name in names}


def stock(quality: Quality, folder: Path, updated: bool) -> torch.nn.Module:
    """A folder as stock transformers loads it in float32, with the adapter's updates added in float32."""
    made = auto_class(transformers.AutoConfig.from_pretrained(folder))
    model = made.from_pretrained(folder, dtype=torch.float32)
    if updated:
        with torch.no_grad():
            for name, left, right in quality.source.updates():
                model.get_parameter(name).add_(left @ right)
    return model.eval()


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """All ways, in order."""
    quality = Quality(args.run_dir, args.rows)
    found: dict[str, Any] = {}

    def take(name: str, measured: Callable[[], dict[str, Any]], nbytes: int | None = None) -> None:
        started = time.monotonic()
        found[name] = measured() | {"bytes": nbytes, "seconds": round(time.monotonic() - started, 1)}
        print(name, found[name], file=sys.stderr, flush=True)

    run = expertune.open_run(args.run_dir)
    take("4-bit base + adapter", lambda: quality.of_model(run.model))
    run.close()
    base = quality.source.base.folder
    take("16-bit base + adapter", lambda: quality.of_model(stock(quality, base, updated=True)))
    for weights in ("source", "dequantized"):
        folder = scratch / f"merged-{weights}"
        expertune.export(args.run_dir, "merged", out=folder, base=weights, verify=False)
        take(f"merged ({weights})", lambda at=folder: quality.of_model(stock(quality, at, updated=False)), size(folder))
    adapter = scratch / "gguf-adapter"
    expertune.export(args.run_dir, "gguf-adapter", out=adapter, verify=False)
    command = ["convert_hf_to_gguf.py", str(base), "--outfile", str(scratch / "base.gguf"), "--outtype", "f32"]
    [made] = convert([command], quality.source)
    if made.error:
        raise SystemExit(made.error)
    take(
        "GGUF: base f32 + adapter",
        lambda: quality.of_gguf(scratch / "base.gguf", adapter / ADAPTER_FILE),
        size(adapter),
    )
    for kind in args.types:
        folder = scratch / f"gguf-{kind}"
        expertune.export(args.run_dir, "gguf", out=folder, type=kind, verify=False)
        take(f"GGUF {kind}", lambda at=folder: quality.of_gguf(next(at.glob("*.gguf"))), size(folder))
    return {
        "rows": len(quality.examples),
        "steps": quality.source.context.record["train"]["steps"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "quality": found,
    }


def size(folder: Path) -> int:
    """Bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rows", type=int, default=256, help="evaluation examples")
    parser.add_argument("--types", nargs="*", default=["bf16", "q8_0"], help="types of merged GGUF files")
    args = parser.parse_args()
    with TemporaryDirectory(prefix="export-quality-") as scratch:
        result = measure(args, Path(scratch))
    columns = [name for name in next(iter(result["quality"].values())) if name != "seconds"]
    table = Table("", *columns)
    for name, row in result["quality"].items():
        table.add_row(
            name, *(f"{row[each]:.4g}" if isinstance(row[each], float) else str(row[each] or "") for each in columns)
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
