"""What came of exporting a tiny model of every family in every format, as the page docs/reference/exported-families.md.

    python tools/export_table.py [--seconds 200] [--families mixtral,gpt_oss] [--formats peft,mlx] [--again]
    python tools/export_table.py --page

The first exports and verifies what benchmarks/results/export-families.json does not have yet (`--again`: what it has,
too), until the seconds are over, and keeps each outcome there; needs `expertune[gguf,mlx]`, and for `vllm`
EXPERTUNE_VLLM_PYTHON. Both write the page from that file.
"""

import argparse
import json
import re
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "benchmarks" / "results" / "export-families.json"
PAGE = ROOT / "docs" / "reference" / "exported-families.md"

WORDS = {"verified": "verified", "not verified": "not verified", "failed": "failed", "refused": "refused"}
HEAD = """# Exported families

What came of each export of a tiny model with random weights, by model type of transformers. `tools/export_table.py`
makes the models, exports and verifies them, and writes this page from `benchmarks/results/export-families.json`;
nothing in the table is typed by hand. `gguf` is exported with `--type f32`, whose log-probabilities are compared token
by token.

| word | means |
|---|---|
| verified | the engine computes what base and adapter do; the adapter is on attention and experts |
| experts alone | the same of an adapter on experts alone: one on attention too is not taken |
| refused | one error and nothing written: the engine, or its converter, does not take the family |
| not verified | written, and nothing is proved: mostly the engine computes the base model otherwise than transformers |
| failed | the engine computes something else |

An empty cell was not run, and a format without a column for no family: vLLM's loader takes a minute for each, and tests
hold six families to it. A tiny model has two layers and its family's structure, but sizes and a tokenizer of its own:
an engine may refuse these and take a published model. `expertune export` verifies what it writes, on your model.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no family is begun after them")
    parser.add_argument("--families", help="model types, comma-separated; all by default")
    parser.add_argument("--formats", help="as the table names them, comma-separated; all by default")
    parser.add_argument("--again", action="store_true", help="what the results have, too")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    args = parser.parse_args()
    if not args.page:
        sweep(args)
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(page(results), encoding="utf-8")


def sweep(args: argparse.Namespace) -> None:
    """Export and verify what is asked for, and keep each family's outcomes as soon as they are known."""
    warnings.simplefilter("ignore")
    from tests.exporting.every_family import CASES, KINDS, copied_programs, outcomes, versions

    held = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"families": {}}
    held["versions"] = {**held.get("versions", {}), **{name: found for name, found in versions().items() if found}}
    begun = time.monotonic()
    formats = args.formats.split(",") if args.formats else [each for each in CASES if each != "vllm"]
    with copied_programs():
        for kind in args.families.split(",") if args.families else KINDS:
            known = held["families"].setdefault(kind, {})
            missing = [each for each in formats if args.again or each not in known]
            if not missing:
                continue
            if time.monotonic() - begun > args.seconds:
                print("more is left", flush=True)
                break
            started = time.monotonic()
            try:
                known |= outcomes(kind, missing)
            except Exception:  # no outcome that a user would meet; the other families go on
                traceback.print_exc()
                continue
            held["families"][kind] = {each: known[each] for each in CASES if each in known}
            held["families"] = dict(sorted(held["families"].items()))
            beside = RESULTS.with_suffix(".partial")
            beside.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
            beside.replace(RESULTS)
            told = [f"{each} {word(known[each])}" for each in missing]
            print(f"{kind} ({time.monotonic() - started:.0f} s): {', '.join(told)}", flush=True)
        else:
            print("all is done", flush=True)


def word(outcome: Mapping[str, Any] | None) -> str:
    """What a cell says."""
    if outcome is None:
        return ""
    is_part = outcome["verdict"] == "verified" and outcome["targets"] == "experts"
    return "experts alone" if is_part else WORDS[outcome["verdict"]]


def page(results: Mapping[str, Any]) -> str:
    """The page as text."""
    families = results["families"]
    formats = list(dict.fromkeys(each for held in families.values() for each in held))
    formats = sorted(formats, key=lambda each: ORDER.index(each))
    lines = [
        HEAD,
        "| family | " + " | ".join(f"`{each}`" for each in formats) + " |",
        "|---" * (len(formats) + 1) + "|",
    ]
    lines += [f"| {kind} | {' | '.join(word(held.get(each)) for each in formats)} |" for kind, held in families.items()]
    lines += ["", "## Why not", ""]
    for each in formats:
        reasons: dict[str, list[str]] = {}
        for kind, held in families.items():
            if each in held and (reason := held[each].get("reason") or held[each].get("beyond")):
                reasons.setdefault(general(reason, kind), []).append(kind)
        if reasons:
            lines += [f"### {each}", ""]
            lines += [f"- {', '.join(kinds)}: {reason}" for reason, kinds in sorted(reasons.items())] + [""]
    names = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n".join([*lines, f"Run with {names}.", ""])


ORDER = (
    *("peft", "peft-fused", "merged", "merged --base dequantized", "gguf-adapter", "gguf"),
    *("mlx", "mlx-merged", "vllm"),
)
"""Of the columns."""


def general(reason: str, kind: str) -> str:
    """A reason without the family's own names and numbers, so that others with the same stand beside it."""
    text = re.sub(r"--to \S+: ", "", reason, count=1)
    text = re.sub(r"Model \w+ is not supported", "the architecture is not supported", text)
    text = text.replace(f"Model type {kind} not supported", "the model type is not supported")
    text = re.sub(r"by [\d.e+-]+ (on the base model alone)", r"\1", text)
    text = re.sub(r"\d+(?:\.\d+){3} [A-Z] (\w+) +", r"\1 ", text)  # when llama.cpp's server said it
    text = re.sub(r"model\.\S*?\.(\w+)(?=[ ,;:])", r"\1", text)
    return text.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*")


if __name__ == "__main__":
    main()
