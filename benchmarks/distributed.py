"""Runs of several processes on this machine's CPUs, by mode: tokens a second, memory, bytes sent, and time in waiting.

    python benchmarks/distributed.py --json OUT

Each rank has one thread. All runs take the same examples, and have to have the losses of one process. Bytes are
counted (benchmarks/traffic.py) and held against the plan's formulas (expertune/planning/communication.py).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.traffic import sent_bytes
from benchmarks.workload import DOLLY_SAMPLE, Shape, model_folder, write_tokenizer
from expertune.config.weights import DistributedConfig
from expertune.planning.communication import (
    RoutedLayer,
    averaged_bytes,
    bytes_per_copy,
    gathered_bytes,
    token_bytes,
)
from tests.distributed.ranks import run_jobs
from tests.processes import Ended

MODES = tuple(mode for mode in get_args(DistributedConfig.model_fields["experts"].annotation) if mode != "auto")

BEFORE = "import benchmarks.distributed_rank\nfrom transformers.models.mixtral import modeling_mixtral"
_WARM_STEPS = 1
_LOSS_TOLERANCE = 1e-4  # of float32 sums over a step's examples, which are taken in another order
_BYTES_TOLERANCE = 0.05
_SEED = 0
_ROUTING = {"even": "tokens spread evenly", "routed": "the routing that there was"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    run(parser.parse_args())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"hidden": 512, "intermediate": 1024, "layers": 4, "experts": 8, "top-k": 2}
    sizes |= {"examples": 8, "max-length": 64, "steps": 5}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--world-sizes", nargs="+", type=int, default=[1, 2, 4], help="default 1 2 4")
    parser.add_argument("--text", type=Path, default=DOLLY_SAMPLE, help="JSONL rows in dolly's layout")
    parser.add_argument("--cache", type=Path, help="where weights are made once; default: the temporary folder")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report.

    Raises:
        CorrectnessError: the losses of a run are not those of one process.
    """
    shape = Shape(args.hidden, args.intermediate, args.layers, args.experts, args.top_k)
    model = model_folder(shape, args.cache or Path(tempfile.gettempdir()) / "expertune-bench")
    write_tokenizer(model)
    result: dict[str, Any] = {"benchmark": "distributed", "model": asdict(shape), "workload": _workload(args)}
    several = [size for size in args.world_sizes if size > 1]
    with tempfile.TemporaryDirectory() as folder:
        report.progress("rates of gloo, then one process")
        result["gloo"] = {str(size): _rates(size, Path(folder) / f"gloo-{size}") for size in several}
        one = _measured(_config(args, model, "replicate", 1), 1, Path(folder) / "1", shape)
        # What a rank has to compute in a step: some of it does not become less with fewer examples.
        result["part_alone_seconds"] = {
            str(size): _measured(_config(args, model, "replicate", size), 1, Path(folder) / f"part-{size}", shape)[
                "seconds_per_step"
            ]
            for size in several
        }
        for mode in args.modes:
            result[mode] = {"1": one}  # one process holds all experts in every mode
            for size in several:
                report.progress(f"{mode}, {size} processes")
                place = Path(folder) / f"{mode}-{size}"
                result[mode][str(size)] = _measured(_config(args, model, mode, size), size, place, shape)
                _require_same_losses(f"{mode}, {size} processes", result[mode][str(size)], one)
    result |= {"cores": os.cpu_count(), "threads_per_rank": 1, **report.environment()}
    if args.json:
        report.write(args.json, result)
    _show(result)
    return result


def _workload(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "examples_per_step": args.examples,
        "max_length": args.max_length,
        "timed_steps": args.steps,
        "compute_dtype": "float32",
        "activation_checkpointing": True,
        "adapter": {"r": 8, "targets": ["attention", "experts"]},
    }


def _config(args: argparse.Namespace, model: Path, mode: str, size: int) -> dict[str, Any]:
    steps = _WARM_STEPS + args.steps
    return {
        "model": str(model),
        "data": {
            "train": f"{args.text.resolve()}[0:{steps * args.examples}]",
            "template": "dolly-tutorial",
            "max_length": args.max_length,
            "train_on": "all",
        },
        "quantization": {"compute_dtype": "float32"},
        "lora": {"r": 8, "alpha": 16, "targets": ["attention", "experts"]},
        "distributed": {"experts": mode},
        "placement": "device",
        "training": {
            "max_steps": steps,
            "per_device_train_batch_size": args.examples // size,
            "gradient_checkpointing": True,
            "learning_rate": 1e-4,
            "train_sampling_strategy": "sequential",
            "save_strategy": "no",
            "logging_steps": 1,
            "ddp_timeout": 120,
            "seed": _SEED,
        },
        "output_dir": "run",
    }


def _measured(config: dict[str, Any], size: int, folder: Path, shape: Shape) -> dict[str, Any]:
    """A run: figures of all ranks, and what was counted beside what the formulas say."""
    of_ranks = _on_ranks(f"train({config!r}, {_WARM_STEPS}, OUTPUT)", size, folder)
    first = of_ranks[0]
    steps, seconds = len(first["steps"]), max(sum(step["seconds"] for step in rank["steps"]) for rank in of_ranks)
    sent = statistics.fmean(sent_bytes(rank["counted"]) for rank in of_ranks) / steps
    layer = RoutedLayer(shape.experts, shape.top_k, shape.hidden, itemsize=4)
    planned = planned_bytes(config["distributed"]["experts"], [layer] * shape.layers, of_ranks)
    return {
        "tokens_per_second": first["tokens"] / seconds,
        "peak_bytes_per_rank": max(rank["peak_bytes"] for rank in of_ranks),
        "sent_bytes_per_step": sent,
        "loss": first["losses"][-1],
        "expert_bytes_per_rank": max(rank["expert_bytes"] for rank in of_ranks),
        "planned_bytes_per_step": planned["even"],
        "planned_bytes_of_this_routing": planned["routed"],
        "off": {which: sent / each - 1 if each else 0.0 for which, each in planned.items()},
        "seconds_per_step": seconds / steps,
        "share_of_time": {which: each / seconds for which, each in _waiting(of_ranks).items()},
        "loopback_bytes_per_step": first["loopback_bytes"] / steps,
        "losses": first["losses"],
        "ranks": of_ranks,
    }


def _waiting(of_ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Seconds that a rank spends in collectives, in all its steps; the lists of them leave the result.

    Returns:
        `waiting`: the mean over ranks. `sending`: what is left where each is as short as on the rank that comes last
        to it, and waits for none.
    """
    waits = [[seconds for step in rank["steps"] for seconds in step.pop("waits")] for rank in of_ranks]
    together = list(zip(*waits, strict=True))
    return {"waiting": statistics.fmean(map(sum, waits)), "sending": sum(map(min, together))}


def planned_bytes(mode: str, layers: Sequence[RoutedLayer], of_ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the plan's formulas give for a step of one micro-batch with activation checkpointing.

    Returns:
        `even`: for tokens spread evenly over experts. `routed`: for the experts that the routers chose.
    """
    size, first = len(of_ranks), of_ranks[0]
    steps = len(first["steps"])
    even = routed = float(averaged_bytes(first["trained_bytes_shared"], size))
    if mode == "parallel" and size > 1:
        tokens = round(first["tokens"] / steps / size)
        even += sum(token_bytes(layer, tokens, size, recomputes=True) for layer in layers)
        # Routers have been asked twice, once in the recomputation.
        copies = statistics.fmean(rank["copies"] for rank in of_ranks) / 2 / steps
        routed += copies * bytes_per_copy(layers[0], recomputes=True)
    if mode == "shard":
        whole = sum(rank["expert_bytes"] for rank in of_ranks) // len(layers)
        gathered = gathered_bytes([whole] * len(layers), size)
        even, routed = even + gathered, routed + gathered
    return {"even": even, "routed": routed}


def _on_ranks(call: str, size: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank leaves of a function of benchmarks.distributed_rank.

    Raises:
        RuntimeError: a rank failed; what it said is in the message.
    """
    folder.mkdir()
    start = "from benchmarks.distributed_rank import measure_rates, train"
    codes = [f"{start}\nOUTPUT = 'rank-{rank}.json'\n{call}" for rank in range(size)]
    ended: list[Ended] = run_jobs({"job": codes}, folder, BEFORE)["job"]
    if any(rank.status for rank in ended):
        raise RuntimeError("\n".join(f"status {rank.status}: {rank.err[-3000:]}" for rank in ended))
    return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def _rates(size: int, folder: Path) -> dict[str, dict[str, float]]:
    """Of each collective, as the slowest rank sees it."""
    of_ranks = _on_ranks("measure_rates(OUTPUT)", size, folder)
    return {
        kind: {
            "bytes_per_second": min(rank[kind]["bytes_per_second"] for rank in of_ranks),
            "seconds_per_call": max(rank[kind]["seconds_per_call"] for rank in of_ranks),
        }
        for kind in of_ranks[0]
    }


def _require_same_losses(what: str, run: dict[str, Any], one: dict[str, Any]) -> None:
    off = max(abs(ours - theirs) for ours, theirs in zip(run["losses"], one["losses"], strict=True))
    if off > _LOSS_TOLERANCE:
        raise report.CorrectnessError(f"{what}: the loss of a step is off by {off:.1e} from one process")


def _show(result: dict[str, Any]) -> None:
    rows, notes = [], []
    for mode in MODES:
        for size, run in result.get(mode, {}).items():
            share = run["share_of_time"]
            rows.append(
                [
                    f"{mode}, {size}",
                    f"{run['tokens_per_second']:,.0f}",
                    f"{share['waiting']:.0%} ({share['sending']:.0%})",
                    f"{run['peak_bytes_per_rank'] / 1e6:,.0f}",
                    f"{run['expert_bytes_per_rank'] / 1e6:,.1f}",
                    f"{run['sent_bytes_per_step'] / 1e6:,.2f}",
                    f"{run['planned_bytes_per_step'] / 1e6:,.2f}",
                    f"{run['off']['even']:+.1%} ({run['off']['routed']:+.1%})",
                    f"{run['loss']:.4f}",
                ]
            )
            for which, off in run["off"].items():
                if abs(off) > _BYTES_TOLERANCE:
                    notes.append(f"{mode}, {size} processes: {off:+.1%} from what the plan has for {_ROUTING[which]}")
    header = ["mode, ranks", "tokens/s", "waiting (sending)", "peak MB", "experts MB"]
    header += ["sent MB", "planned MB", "off (routed)", "loss"]
    notes += [
        f"one thread a rank on {result['cores']} cores; peak, experts: of the rank with most, above the imports",
        "waiting: share of a step that a rank spends in collectives; in brackets without waiting for the last to come",
        "sent: counted in a rank, a step; planned: by the formulas of the plan, with tokens spread evenly over experts",
        "in brackets: off from the same formulas for the experts that the routers chose",
    ]
    report.show(f"Several processes under gloo, on {result['device']}", header, rows, notes)


if __name__ == "__main__":
    main()
