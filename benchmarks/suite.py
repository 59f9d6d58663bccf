"""Every CPU benchmark at its documented size, JSON kept, and the table in docs/performance.md written from it.

What `make bench` runs; at most twelve minutes on two cores. Every stack multiplies in the dtype that it does best in on
this machine: ours as a run does by itself, each peer in the one that its own steps were faster in.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.peers.processes import ROOT

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"

_PEERS = {
    "legacy": "the tutorial's libraries, given our batch",
    "tutorial": "the tutorial's libraries, fed as there",
    "stock5": "transformers 5 and peft 0.21, experts not 4-bit",
}

# The tutorial's libraries are tried in both dtypes once.
RUNS = {
    "step-t320-legacy": "step --tokens 320 --rounds 3 --peers legacy",
    "step-t320-tutorial": "step --tokens 320 --rounds 2 --peers tutorial --peer-dtype {dtype_of_legacy}",
    "step-t320-stock5": "step --tokens 320 --rounds 3 --peers stock5",
    "e2e": "e2e --peer-dtype {dtype_of_legacy}",
    "layer-t320": "layer --tokens 320",
    "quantize": "quantize",
    "decode": "decode",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON; default benchmarks/results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose table is written; default the docs'")
    parser.add_argument(
        "--only", nargs="*", choices=list(RUNS), default=list(RUNS), help="run these; of the others the JSON is read"
    )


def run(args: argparse.Namespace) -> None:
    """Run all of them, then write the table.

    Raises:
        SystemExit: a benchmark failed, a stack computes something else, or a result is missing or another machine's;
            the table stays as it was.
    """
    results: dict[str, dict[str, Any]] = {}
    for name, command in RUNS.items():
        path = args.results / f"{name}.json"
        if name in args.only:
            report.progress(f"--- {name}")
            first = results.get("step-t320-legacy")
            words = command.format(dtype_of_legacy=first["peers"]["legacy"]["dtype"] if first else "auto").split()
            # Each in a process of its own: a child's peak memory begins at what its parent holds.
            line = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *words, "--json", str(path)]
            if subprocess.run(line, cwd=ROOT, check=False).returncode:
                raise SystemExit(f"{name} failed; {args.page} stays as it was")
        if not path.exists():
            raise SystemExit(f"{path} is missing; run {name} too. {args.page} stays as it was")
        results[name] = json.loads(path.read_text(encoding="utf-8"))
    if len(devices := {result["device"] for result in results.values()}) > 1:
        raise SystemExit(f"results of {' and '.join(sorted(devices))}; {args.page} stays as it was")
    write_table(args.page, results)
    report.progress(f"table written to {args.page}")


def write_table(page: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write the table of a page anew, between its two marks, from results by name."""
    one = next(iter(results.values()))
    lines = [
        f"{one['device']}, {one['threads']} threads ({', '.join(one['instruction_sets'])}); "
        f"torch {one['versions']['torch']}, transformers {one['versions']['transformers']}, "
        f"peft {one['versions']['peft']}, bitsandbytes {one['versions']['bitsandbytes']}; {one['date'][:10]}, "
        f"commit {commit_of(one)}.",
        "",
        "| what | ours | instead | floor or limit | command |",
        "|---|---|---|---|---|",
        *(_row(name, result, commit_of(one)) for name, result in results.items()),
    ]
    report.write_block(page, "bench", lines)


def _row(name: str, result: dict[str, Any], commit: str) -> str:
    what, ours, peers, limit = _CELLS[result["benchmark"]](result)
    command, _, _ = result["command"].partition(" --json")
    link = f"[JSON](../benchmarks/results/{name}.json)"
    if (own := commit_of(result)) != commit:
        link += f", commit {own}"
    return f"| {what} | {ours} | {peers} | {limit} | `{command}` ({link}) |"


def commit_of(result: dict[str, Any]) -> str:
    """The first digits of the commit that was measured, and whether files differed from it."""
    commit, changed, _ = result["commit"].partition("+")
    return commit[:7] + (" with changes" if changed else "")


def _quantize(result: dict[str, Any]) -> tuple[str, str, str, str]:
    rates = {name: f"{rate / 1e6:,.0f} M/s" for name, rate in result["weights_per_second"].items()}
    return (
        "NF4 quantization, weights a second",
        rates["ours"],
        f"bitsandbytes {rates['bitsandbytes']} ({result['ratio']:.1f} times slower)",
        "",
    )


def _decode(result: dict[str, Any]) -> tuple[str, str, str, str]:
    rates = {name: f"{rate / 1e9:.1f} G/s" for name, rate in result["weights_per_second"].items()}
    return (
        f"NF4 decoding to {result['dtype']}, weights a second",
        rates["ours"],
        f"bitsandbytes {rates['bitsandbytes']} ({result['ratio']:.1f} times slower)",
        f"copy of the decoded matrix {rates['copy of the decoded matrix']}",
    )


def _layer(result: dict[str, Any]) -> tuple[str, str, str, str]:
    def seconds(name: str) -> float:
        times = sorted(result["seconds"][name])
        return times[len(times) // 2]

    peers = [
        f"{name}, {result['dtypes'][name]}: {seconds(name):.2f} s ({ratio:.2f}x)"
        for name, ratio in result["ratios"].items()
        if not name.startswith("ours")
    ]
    limit = result["floor"]["flops"] / result["floor"]["product_rates"]["expert"]["flops_per_second"]
    return (
        f"expert layer, forward + backward, T={result['tokens']}",
        f"{seconds(result['chosen']):.2f} s, {result['dtype']}",
        "; ".join(peers),
        f"{limit:.2f} s at `torch.mm`'s rate for as many rows, without recomputation",
    )


def _step(result: dict[str, Any]) -> tuple[str, str, str, str]:
    peers = [
        f"{_PEERS[name]}, {peer['dtype']}: {peer['tokens_per_second']:.1f} ({result['ratios'][name]:.2f}x), "
        f"{_step_peak(peer)}"
        for name, peer in result["peers"].items()
    ]
    ours = result["ours"]
    return (
        f"optimizer step, tokens a second and peak memory, T={result['batch']['tokens']}",
        f"{ours['tokens_per_second']:.1f}, {_step_peak(ours)}, {result['dtype']}",
        "; ".join(peers),
        f"{result['floor']['tokens_per_second']:.1f} at `torch.mm`'s best rate",
    )


def _step_peak(stack: dict[str, Any]) -> str:
    """Of the steps alone, where the system tells it."""
    return f"{(stack['step_peak_bytes'] or stack['peak_bytes']) / 1e9:.2f} GB"


def _e2e(result: dict[str, Any]) -> tuple[str, str, str, str]:
    tutorial = result["peers"]["tutorial"]
    return (
        f"whole run of {result['steps']} steps",
        f"{result['ours']['seconds']:.0f} s, {result['dtype']}",
        f"{_PEERS['tutorial']}, {tutorial['dtype']}: {tutorial['seconds']:.0f} s ({result['ratio']:.1f}x)",
        "",
    )


_CELLS: dict[str, Callable[[dict[str, Any]], tuple[str, str, str, str]]] = {
    "quantize": _quantize,
    "decode": _decode,
    "layer": _layer,
    "step": _step,
    "e2e": _e2e,
}
