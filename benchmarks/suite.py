"""Every CPU benchmark at its documented size, JSON kept, and the table in docs/performance.md written from it.

What `make bench` runs; under ten minutes on two cores.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.peers.processes import ROOT

PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
_MARK = re.compile(r"(<!-- bench -->\n).*?(<!-- /bench -->)", re.DOTALL)

_LAYERS = "--hidden 2048 --intermediate 7168 --experts 8 --top-k 2 --tokens 320"
RUNS = {
    "quantize": "quantize",
    "decode": "decode",
    "layer-t320": f"layer {_LAYERS}",
    "step-t320": f"step --layers 2 {_LAYERS} --rounds 3 --peers legacy stock5",
    "e2e": "e2e",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON; default benchmarks/results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page whose table is written; default the docs'")


def run(args: argparse.Namespace) -> None:
    """Run all of them, then write the table.

    Raises:
        SystemExit: a benchmark failed, or a stack computes something else; the table stays as it was.
    """
    results = {}
    for name, command in RUNS.items():
        report.progress(f"--- {name}")
        path = args.results / f"{name}.json"
        # Each in a process of its own: a child's peak memory begins at what its parent holds.
        line = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *command.split(), "--json", str(path)]
        if subprocess.run(line, cwd=ROOT, check=False).returncode:
            raise SystemExit(f"{name} failed; {args.page} stays as it was")
        results[name] = json.loads(path.read_text(encoding="utf-8"))
    write_table(args.page, results)
    report.progress(f"table written to {args.page}")


def write_table(page: Path, results: dict[str, dict[str, Any]]) -> None:
    """Write the table of a page anew, between its two marks, from results by name."""
    text = page.read_text(encoding="utf-8")
    assert _MARK.search(text), f"{page}: the marks of the table are gone"
    one = next(iter(results.values()))
    lines = [
        f"{one['device']}, {one['threads']} threads ({', '.join(one['instruction_sets'])}); "
        f"torch {one['versions']['torch']}, transformers {one['versions']['transformers']}, "
        f"peft {one['versions']['peft']}, bitsandbytes {one['versions']['bitsandbytes']}; {one['date'][:10]}.",
        "",
        "| what | ours | peers | floor or limit | command |",
        "|---|---|---|---|---|",
        *(_row(result) for result in results.values()),
        "",
    ]
    page.write_text(_MARK.sub(lambda found: found[1] + "\n".join(lines) + found[2], text), encoding="utf-8")


def _row(result: dict[str, Any]) -> str:
    what, ours, peers, limit = _CELLS[result["benchmark"]](result)
    return f"| {what} | {ours} | {peers} | {limit} | `{result['command']}` |"


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
        f"{name} {seconds(name):.2f} s ({ratio:.2f}x)"
        for name, ratio in result["ratios"].items()
        if not name.startswith("ours")
    ]
    limit = result["floor"]["flops"] / result["floor"]["product_rates"]["expert"]["flops_per_second"]
    return (
        f"expert layer, forward + backward, T={result['tokens']}, {result['dtype']}",
        f"{seconds(result['chosen']):.2f} s",
        "; ".join(peers),
        f"{limit:.2f} s at `torch.mm`'s rate for as many rows, without recomputation",
    )


def _step(result: dict[str, Any]) -> tuple[str, str, str, str]:
    peers = [
        f"{name} {peer['tokens_per_second']:.1f} ({result['ratios'][name]:.2f}x)"
        for name, peer in result["peers"].items()
    ]
    return (
        f"optimizer step, tokens a second, T={result['batch']['tokens']}, {result['dtype']}",
        f"{result['ours']['tokens_per_second']:.1f}",
        "; ".join(peers),
        f"{result['floor']['tokens_per_second']:.1f} at `torch.mm`'s best rate",
    )


def _e2e(result: dict[str, Any]) -> tuple[str, str, str, str]:
    tutorial = result["peers"]["tutorial"]
    return (
        f"whole run of {result['steps']} steps, {result['dtype']}",
        f"{result['ours']['seconds']:.0f} s",
        f"tutorial's libraries {tutorial['seconds']:.0f} s ({result['ratio']:.1f}x)",
        "",
    )


_CELLS: dict[str, Callable[[dict[str, Any]], tuple[str, str, str, str]]] = {
    "quantize": _quantize,
    "decode": _decode,
    "layer": _layer,
    "step": _step,
    "e2e": _e2e,
}
