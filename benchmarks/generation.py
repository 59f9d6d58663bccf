"""Generation on a CPU: tokens per second at one sequence and at many, and of a prompt; against llama.cpp, bitsandbytes.

All have a Mixtral of the same shape with random weights: ours and bitsandbytes the same NF4 bytes, computed and with
lm_head in one dtype, by default the one that a run takes by itself on this machine; llama.cpp a Q4_0 file whose output
head is Q6_K, as its own quantizer writes it. Each stack is a process of its own, and they take turns. A rate is that of
the steps between the first new token and the last: an answer of one token is timed too and taken off. Greedy; nothing
ends an answer early. Our logits have to be about as near to those of plain float32 on the dequantized weights as plain
transformers' in bfloat16 are.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.full_mixtral_step import write_folder
from benchmarks.gguf_file import write_gguf
from benchmarks.peers.processes import Driver
from benchmarks.workload import VOCAB_SIZE, Shape, once

_OURS, _ADAPTED, _BITSANDBYTES, _LLAMA = "ours", "ours with an adapter", "bitsandbytes", "llama.cpp"
STACKS: dict[str, tuple[str, list[str]]] = {
    _OURS: ("generation_torch", ["--stack", "ours"]),
    _ADAPTED: ("generation_torch", ["--stack", "adapted"]),
    _BITSANDBYTES: ("generation_torch", ["--stack", "bitsandbytes"]),
    _LLAMA: ("generation_llama", []),
}

# What is timed -> sequences, tokens of each prompt, new tokens.
SETTINGS = {"batch 1": (1, 16, 25), "batch 32": (32, 16, 5), "prompt": (1, 512, 1)}

# Times the error that plain transformers has in bfloat16; and by how much less often the best token may be the exact
# one. Two orders of the same sums tip the router over at other tokens, where two experts are as good as equal.
_MOST_ERROR, _LESS_AGREEMENT = 1.5, 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = {"hidden": 2048, "intermediate": 7168, "layers": 8, "experts": 8, "top-k": 2, "rounds": 4}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--stacks", nargs="*", choices=STACKS, default=list(STACKS), help="default: all")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS), help="default: all")
    report.add_dtype_argument(parser)
    parser.add_argument("--cache", type=Path, help="where models are made once and kept; default: the temporary folder")
    parser.add_argument("--no-check", action="store_true", help="take logits on trust: saves 12 GB and a minute")
    parser.add_argument("--json", type=Path, help="write the result here")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report.

    Raises:
        CorrectnessError: our logits are further from exact ones than rounding to bfloat16 takes them.
    """
    shape = Shape(args.hidden, args.intermediate, args.layers, args.experts, args.top_k)
    cache = args.cache or Path(tempfile.gettempdir()) / "expertune-bench"
    folder = once(cache / f"{shape.name}-nf4", lambda made: write_folder(made, shape))
    file = once(cache / f"{shape.name}-q4_0", lambda made: write_gguf(made / "model.gguf", shape)) / "model.gguf"
    dtype = report.name_of(report.resolve_dtype(args.dtype, "cpu"))
    drivers: dict[str, Driver] = {}
    check = None
    try:
        for name in args.stacks:
            report.progress(f"loading {name}")
            model = ["--model", str(file)] if name == _LLAMA else ["--model", str(folder), "--dtype", dtype]
            drivers[name] = Driver(name, model, stack=STACKS[name])
            if name == _OURS and not args.no_check:  # while there is memory
                report.progress("checking logits")
                check = drivers[_OURS].ask("check")
                _require_exact_logits(check)
        result = {
            "benchmark": "generation",
            "model": vars(shape) | {"vocab": VOCAB_SIZE},
            "settings": {
                name: dict(zip(("sequences", "prompt_tokens", "new_tokens"), SETTINGS[name], strict=True))
                for name in args.settings
            },
            "measured": {},
            "check": check,
            "stacks": {name: driver.ready for name, driver in drivers.items()},
            "dtype": dtype,
            "bytes_per_token": _bytes_per_token(shape, 4 if dtype == "float32" else 2),
            "read_bytes_per_second": next(
                (driver.ask("read rate")["rate"] for name, driver in drivers.items() if name != _LLAMA), None
            ),
            **report.environment(),
        }
        for name in args.settings:
            # Several sequences take longer, and vary less.
            rounds = args.rounds if SETTINGS[name][0] == 1 else -(-args.rounds // 2)
            result["measured"][name] = _measure(name, drivers, rounds)
            if args.json:  # a run that is ended leaves what it has
                report.write(args.json, result)
    finally:
        for driver in drivers.values():
            driver.close()
    _show(result)
    return result


def _measure(setting: str, drivers: dict[str, Driver], rounds: int) -> dict[str, Any]:
    """Rounds of all stacks in turn, after one to warm up; medians, and ratios of the rounds in pairs."""
    sequences, prompt, new = SETTINGS[setting]
    action = f"generate {sequences} {prompt}"
    rates: dict[str, list[float]] = {name: [] for name in drivers}
    prompts: dict[str, list[float]] = {name: [] for name in drivers}
    for number in range(rounds + 1):
        report.progress(f"{setting}: {f'round {number} of {rounds}' if number else 'warming up'}")
        for name, driver in drivers.items():
            first = driver.ask(f"{action} 1")["seconds"]
            whole = driver.ask(f"{action} {new}")["seconds"] if new > 1 else 0.0
            rate = sequences * (new - 1) / (whole - first) if new > 1 else sequences * prompt / first
            report.progress(f"  {name}: {rate:.1f} tokens a second, prompts {sequences * prompt / first:.1f}")
            if number:
                rates[name].append(rate)
                prompts[name].append(sequences * prompt / first)
    return {
        "tokens_per_second": {name: statistics.median(found) for name, found in rates.items()},
        "prompt_tokens_per_second": {name: statistics.median(found) for name, found in prompts.items()},
        "rounds": rates,
        "ratios": {
            name: statistics.median(ours / theirs for ours, theirs in zip(rates[_OURS], found, strict=True))
            for name, found in rates.items()
            if name != _OURS and _OURS in rates
        },
    }


def _require_exact_logits(check: dict[str, Any]) -> None:
    """Ours are as near to the exact ones as plain transformers' in bfloat16, up to the luck of rounding."""
    ours, plain = check["ours"], check["plain"]
    near = ours["rms_error"] <= _MOST_ERROR * plain["rms_error"]
    if not near or ours["top1_agreement"] < plain["top1_agreement"] - _LESS_AGREEMENT:
        raise report.CorrectnessError(f"beside float32 on dequantized weights: {_said(check)}")


def _said(check: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} off by {check[key]['rms_error']:.4f} with the same best token in {check[key]['top1_agreement']:.1%}"
        for name, key in (("ours", "ours"), ("plain transformers in bfloat16", "plain"))
    )


def _bytes_per_token(shape: Shape, of_head: int) -> dict[str, float]:
    """What a step at one sequence reads of weights: attention, the experts that were chosen, the output head.

    Args:
        shape: of the model.
        of_head: bytes of a number of our output head.
    """
    attention = sum(rows * columns for rows, columns in shape.attention().values())
    experts = shape.top_k * sum(rows * columns for rows, columns in shape.expert().values())
    inner, head = shape.layers * (attention + experts), VOCAB_SIZE * shape.hidden
    nf4 = 0.5 + 1 / 64 + 4 / (64 * 256)
    return {
        _OURS: inner * nf4 + head * of_head,
        _BITSANDBYTES: inner * (0.5 + 2 / 64) + head * of_head,
        _LLAMA: inner * 18 / 32 + head * 210 / 256,
    }


def _show(result: dict[str, Any]) -> None:
    names = list(result["stacks"])
    rows = []
    for setting, measured in result["measured"].items():
        rates = [f"{measured['tokens_per_second'][name]:.1f}" for name in names]
        ratios = [f"{measured['ratios'][name]:.2f}" if name in measured["ratios"] else "" for name in names]
        rows += [[f"{setting}, tokens a second", *rates], ["ours over it", *ratios]]
    model = result["model"]
    title = (
        f"Generation, hidden {model['hidden']}, {model['layers']} layers, {model['experts']} experts "
        f"top-{model['top_k']}, on {result['device']}, {result['threads']} threads, "
        f"{result['dtype']}"
    )
    notes = [f"{name}: {note}" for name, stack in result["stacks"].items() for note in stack["notes"]]
    if rate := result["read_bytes_per_second"]:
        floors = {name: rate / nbytes for name, nbytes in result["bytes_per_token"].items()}
        read = ", ".join(f"{name} {result['bytes_per_token'][name] / 1e6:.0f} MB" for name in floors)
        notes.append(
            f"weights that a step at one sequence reads: {read}; at the {rate / 1e9:.1f} GB/s that are read here, at "
            "most " + ", ".join(f"{name} {floor:.0f}" for name, floor in floors.items()) + " tokens a second"
        )
    if check := result["check"]:
        notes.append(f"logits of {check['tokens']} tokens beside float32 on dequantized weights: {_said(check)}")
    report.show(title, ["", *names], rows, notes)
