"""A simulation of 8 to 1024 ranks: a step's time from bytes by the plan's formulas and the published rates of links.

    python benchmarks/distributed_simulated.py --measured benchmarks/results/distributed.json --json OUT --png OUT

Nothing here has been measured but the step of one H100 that it starts from, and that the formulas give what
benchmarks/distributed.py counts. `check` has the same arithmetic for the ranks that were measured on this machine, with
the rates of its gloo, beside what was measured.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.peers.processes import ROOT
from benchmarks.workload import Shape
from expertune.gpus import ETHERNET_100, ETHERNET_400, NVLINK, PCIE, Link
from expertune.planning.communication import RoutedLayer, averaged_bytes, token_bytes
from expertune.report.figures import write_png

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
RANKS_PER_MACHINE = 8
MEASURED_STEP = ROOT / "benchmarks" / "results" / "2026-11-28-h100-stage3.json"
TOKENS = 8192
MIXTRAL = Shape(hidden=4096, intermediate=14336, layers=32, experts=8, top_k=2)
_LORA_RANK = 8
_BUCKET_BYTES = 2**25  # of averaged gradients
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # of a weight: its code, its block's scale, and the scale of 256 of these

ASSUMPTIONS = (
    "weak scaling: each rank takes 8,192 tokens a step, in one micro-batch with activation checkpointing",
    "a rank computes as long as one H100 did alone for a whole step of Mixtral-8x7B (commit 9414c2b), in every mode",
    "8 ranks to a machine; each rank has a link of its own to other machines, with the published rate, and it is free",
    "a ring that spans machines runs at the slower rate; a message takes 5 us in a machine and 10 us outside",
    "replicate: gradients of 481 MB in float32 are averaged after backward, in buckets of 32 MiB; nothing hides that",
    "shard: a layer is gathered by all ranks while the layer before it computes; gradients as in replicate",
    "parallel: 8 experts are shared out inside each machine, tokens spread evenly over them, nothing is hidden; "
    "gradients of an expert are averaged over the machines",
    "no rank is late, nothing is lost to congestion, and evaluations and checkpoints are left out",
)


@dataclass(frozen=True)
class Cluster:
    """Links inside a machine and between machines."""

    inside: Link
    between: Link

    @property
    def name(self) -> str:
        """Both."""
        return f"{self.inside.name}, {self.between.name}"

    def ring(self, ranks: int, sent: float, passes: int, calls: int = 1) -> float:
        """Seconds of collectives along a ring.

        Args:
            ranks: in the ring.
            sent: bytes that a rank sends, in all calls together.
            passes: how often a call goes round: 2 for an all_reduce, 1 for an all_gather.
            calls: how many.
        """
        link, latency = (self.inside, 5e-6) if ranks <= RANKS_PER_MACHINE else (self.between, 10e-6)
        return sent / link.bytes_per_second + calls * passes * (ranks - 1) * latency


CLUSTERS = (
    Cluster(NVLINK, ETHERNET_400),
    Cluster(NVLINK, ETHERNET_100),
    Cluster(PCIE, ETHERNET_100),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--measured", type=Path, help="JSON of benchmarks/distributed.py that the arithmetic is checked by"
    )
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--png", type=Path, help="draw it here")
    args = parser.parse_args()
    compute = measured_seconds()
    modes = {"replicate": replicate, "shard": shard, "parallel": parallel}
    simulated = {
        cluster.name: {
            mode: {str(ranks): _figures(compute, waiting(cluster, ranks, compute), ranks) for ranks in RANKS}
            for mode, waiting in modes.items()
        }
        for cluster in CLUSTERS
    }
    result: dict[str, Any] = {
        "benchmark": "distributed_simulated",
        "simulated": True,
        "model": "Mixtral-8x7B",
        "assumptions": list(ASSUMPTIONS),
        "compute_seconds": compute,
        "compute_from": MEASURED_STEP.name,
        "clusters": simulated,
    }
    if args.measured:
        result["check"] = check(json.loads(args.measured.read_text(encoding="utf-8")))
    result |= report.environment() | {"device": "simulated"}
    if args.json:
        report.write(args.json, result)
    if args.png:
        write_png(draw(simulated), args.png)
    _show(result)


def measured_seconds() -> float:
    """A whole step of Mixtral-8x7B on one H100."""
    held = json.loads(MEASURED_STEP.read_text(encoding="utf-8"))
    return float(held["items"][f"step T={TOKENS}"]["median_s"])


def adapter_bytes(shape: Shape) -> tuple[int, int]:
    """Bytes of float32 factors of all experts, and of everything else, as the measured step has them."""

    def factors(sizes: Mapping[str, tuple[int, int]]) -> int:
        return sum(4 * _LORA_RANK * sum(size) for size in sizes.values())

    head = 4 * _LORA_RANK * (32_000 + shape.hidden)
    return shape.layers * shape.experts * factors(shape.expert()), shape.layers * factors(shape.attention()) + head


def replicate(cluster: Cluster, ranks: int, compute: float) -> float:
    """Seconds that a rank waits in a step."""
    return _averaging(cluster, ranks, sum(adapter_bytes(MIXTRAL)))


def shard(cluster: Cluster, ranks: int, compute: float) -> float:
    """The same: a gather is hidden as far as the layer before it computes."""
    matrices = [rows * columns for rows, columns in MIXTRAL.expert().values()]
    layer_bytes = MIXTRAL.experts * sum(matrices) * _NF4_BYTES
    gather = cluster.ring(ranks, layer_bytes * (ranks - 1) / ranks, passes=1)
    # Forward is about a third of a step of a frozen model whose activations are computed again.
    layer = compute / MIXTRAL.layers
    shown = max(0.0, gather - layer / 3) + max(0.0, gather - layer * 2 / 3)
    return (MIXTRAL.layers - 1) * shown + replicate(cluster, ranks, compute)


def parallel(cluster: Cluster, ranks: int, compute: float) -> float:
    """The same: tokens travel inside a machine."""
    layer = RoutedLayer(MIXTRAL.experts, MIXTRAL.top_k, MIXTRAL.hidden, itemsize=2)
    sent = MIXTRAL.layers * token_bytes(layer, TOKENS, RANKS_PER_MACHINE, recomputes=True)
    calls = 10 * MIXTRAL.layers  # of all_to_all, counted in a step with checkpointing
    tokens = sent / cluster.inside.bytes_per_second + calls * 5e-6 * (RANKS_PER_MACHINE - 1)
    experts, others = adapter_bytes(MIXTRAL)
    machines = ranks // RANKS_PER_MACHINE
    # The ranks that have the same experts are on as many machines.
    between = Cluster(cluster.between, cluster.between)
    return tokens + _averaging(cluster, ranks, others) + _averaging(between, machines, experts // RANKS_PER_MACHINE)


def _averaging(cluster: Cluster, ranks: int, gradient_bytes: int) -> float:
    calls = -(-gradient_bytes // _BUCKET_BYTES)
    return cluster.ring(ranks, averaged_bytes(gradient_bytes, ranks), passes=2, calls=calls)


def _figures(compute: float, waiting: float, ranks: int) -> dict[str, float]:
    seconds = compute + waiting
    return {
        "seconds_per_step": seconds,
        "communication_share": waiting / seconds,
        "tokens_per_second": ranks * TOKENS / seconds,
    }


def check(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Of each measured run: seconds of its collectives, and of a step, by the same arithmetic; beside what it took.

    Computing is that of one process with a rank's part of the examples; ranks that share a core take turns.
    """
    found: dict[str, Any] = {}
    for mode, runs in ((mode, runs) for mode, runs in measured.items() if mode in ("replicate", "shard", "parallel")):
        for size, run in runs.items():
            if size == "1":
                continue
            rates = measured["gloo"][size]
            steps = len(run["ranks"][0]["steps"])
            sending = statistics.fmean(_seconds(rank["counted"], rates) for rank in run["ranks"]) / steps
            compute = measured["part_alone_seconds"][size] * max(1.0, int(size) / measured["cores"])
            found.setdefault(mode, {})[size] = {
                "simulated_communication_seconds": sending,
                "measured_communication_seconds": run["share_of_time"]["sending"] * run["seconds_per_step"],
                "simulated_step_seconds": compute + sending,
                "measured_step_seconds": run["seconds_per_step"],
            }
    return found


def _seconds(counted: Mapping[str, Mapping[str, float]], rates: Mapping[str, Mapping[str, float]]) -> float:
    """Of collectives that were counted, by the rates of each kind; those without one go as all_reduce."""
    seconds = 0.0
    for kind, of_kind in counted.items():
        rate = rates.get(kind, rates["all_reduce"])
        seconds += of_kind["calls"] * rate["seconds_per_call"] + of_kind["bytes"] / rate["bytes_per_second"]
    return seconds


def draw(simulated: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> Figure:
    """The share of a step that a rank waits for others' bytes, by ranks, mode and links."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, len(simulated), sharey=True)
    looks = {"replicate": ("#56B4E9", "o"), "shard": ("#D55E00", "s"), "parallel": ("#009E73", "^")}
    for axes, (name, modes) in zip(panels, simulated.items(), strict=True):
        for mode, of_ranks in modes.items():
            color, marker = looks[mode]
            shares = [100 * figures["communication_share"] for figures in of_ranks.values()]
            axes.plot([int(ranks) for ranks in of_ranks], shares, color=color, marker=marker, markersize=4, label=mode)
        axes.set_xscale("log", base=2)
        axes.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
        axes.set_title(name.replace(", ", ",\n"), fontsize=9)
        axes.set_xlabel("ranks")
        axes.set_ylim(0, 100)
    panels[0].set_ylabel("simulated: % of a step in communication")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _show(result: Mapping[str, Any]) -> None:
    for name, modes in result["clusters"].items():
        rows = [
            [ranks, *(f"{of_ranks[ranks]['communication_share']:.0%}" for of_ranks in modes.values())]
            for ranks in map(str, RANKS)
        ]
        report.show(f"Simulated: share of a step in communication; {name}", ["ranks", *modes], rows, [])
    for mode, runs in result.get("check", {}).items():
        rows = [[f"{mode}, {size}", *(f"{seconds:.3f}" for seconds in run.values())] for size, run in runs.items()]
        report.show("Against gloo on this machine", ["", "sending", "measured", "step", "measured step"], rows, [])
    for assumption in result["assumptions"]:
        report.progress(f"- {assumption}")


if __name__ == "__main__":
    main()
