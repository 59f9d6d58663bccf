"""A DPO step against that of TRL's own trainer, on the same 4-bit model and the same pairs.

    python benchmarks/preference_step.py --json OUT [--pairs 16] [--rounds 5] [--model FOLDER]

Both sides attach one adapter to one model and take forward, reference, backward and AdamW's update of the same
pairs, which come with the package. TRL's side is `trl.DPOTrainer` as it is: its collator pads, the head is multiplied
with all tokens, and the reference is a second adapter. Each side is a process of its own, so that its peak of memory is
its own; steps take turns. Losses that differ are an error, and no speed is printed.
"""

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import report
from benchmarks.timing import median_ratio, memory_status

ASSETS = Path(__file__).parents[1] / "src" / "expertune" / "assets"
SIDES = ("expertune", "trl")
_BATCHES = 4
_BETA = 0.1


def worker(side: str, model_folder: str, pairs: int, dtype: str) -> None:
    """Take a step for each line of stdin, and write what it took as a line of JSON."""
    warnings.simplefilter("ignore")
    import torch

    import expertune
    from expertune.checkpoint.tokenizer import load_tokenizer
    from expertune.config import parse_config
    from expertune.data import make_dataset, prepare_examples

    config = parse_config(
        {
            "model": model_folder,
            "objective": "dpo",
            "data": {
                "train": f"{ASSETS}/viggo/viggo-pairs-train.csv[0:{_BATCHES * pairs}]",
                "columns": {"prompt": "ref"},
                "template": "viggo",
            },
            "training": {"beta": _BETA},
            "output_dir": "unused",
        }
    )
    torch.manual_seed(0)
    model = expertune.attach(
        expertune.load_model(model_folder, dtype=dtype), r=16, alpha=32, targets=["attention", "experts"]
    ).train()
    tokenizer = load_tokenizer(Path(model_folder))
    rows = list(make_dataset(prepare_examples(config.data, "train", tokenizer, objective="dpo"), config.data))
    loss_of = (_ours if side == "expertune" else _trl)(config, model, tokenizer, rows[:2])
    batches = [rows[start : start + pairs] for start in range(0, len(rows), pairs)]
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
    ready = memory_status("VmRSS")
    for turn, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        loss = loss_of(batches[turn % _BATCHES])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        told = {"seconds": time.perf_counter() - started, "loss": loss.item(), "ready": ready}
        print(json.dumps(told | {"peak": memory_status("VmHWM")}), flush=True)


def _ours(config: Any, model: Any, tokenizer: Any, rows: list[Any]) -> Callable[[list[Any]], Any]:
    from expertune.objectives.log_probs import Reference
    from expertune.objectives.preference import Preference
    from expertune.train.arguments import loss_arguments

    arguments = loss_arguments(config.training, "dpo")
    preference = Preference(config, model, arguments, Reference(model, keeps_start=False))
    return lambda batch: preference.loss(preference.collator(batch), len(batch), lambda: None)


def _trl(config: Any, model: Any, tokenizer: Any, rows: list[Any]) -> Callable[[list[Any]], Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": []}
    text = [{"prompt": "a", "chosen": " b", "rejected": " c"}] * len(rows)  # batches bring tokens of their own
    trainer = DPOTrainer(
        model,
        args=DPOConfig(tempfile.mkdtemp(), beta=_BETA, router_aux_loss_coef=0.0, **plain),
        train_dataset=Dataset.from_list(text),
        processing_class=tokenizer,
    )
    return lambda batch: trainer.compute_loss(model, trainer.data_collator(batch))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Both sides' steps in turn, and what they needed."""
    command = [sys.executable, __file__, "--pairs", str(args.pairs), "--model", args.model, "--dtype", args.dtype]
    workers = {
        side: subprocess.Popen(
            [*command, "--worker", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for side in SIDES
    }
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    try:
        for _ in range(_BATCHES + args.rounds):  # the first of each batch warms up
            for side, process in workers.items():
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("step\n")
                process.stdin.flush()
                if not (line := process.stdout.readline()):
                    raise SystemExit(f"the worker of {side} ended before its work; see above")
                found[side].append(json.loads(line))
            require_same_loss([found[side][-1]["loss"] for side in SIDES], len(found[SIDES[0]]))
    finally:
        for process in workers.values():
            process.stdin.close()  # type: ignore[union-attr]
            process.wait()
    seconds = {side: [each["seconds"] for each in found[side][_BATCHES:]] for side in SIDES}
    extra = {side: found[side][-1]["peak"] - found[side][0]["ready"] for side in SIDES}
    return {
        "model": Path(args.model).name,
        "pairs": args.pairs,
        "dtype": args.dtype,
        "seconds": {side: statistics.median(taken) for side, taken in seconds.items()},
        "times_as_long": median_ratio(seconds["trl"], seconds["expertune"]),
        "bytes_of_a_step": extra,
        "times_the_memory": extra["trl"] / extra["expertune"],
        "last_losses": [found[side][-1]["loss"] for side in SIDES],
        "rounds": args.rounds,
        "trl": importlib.metadata.version("trl"),
        **report.environment(),
    }


def require_same_loss(losses: Sequence[float], step: int) -> None:
    """Raises SystemExit where the sides did not compute the same."""
    if not abs(losses[0] - losses[1]) <= 1e-4:
        raise SystemExit(f"the losses of step {step} differ: {losses}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default=str(ASSETS / "tiny-mixtral"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.model, args.pairs, args.dtype)
        return
    found = measure(args)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
