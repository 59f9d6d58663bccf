"""Run a benchmark: `python benchmarks/run.py step --tokens 320`. Needs the project's environment; see --help."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import (
    data_memory,
    decode,
    demo_speed,
    e2e,
    export_merge,
    folders,
    generation,
    layer,
    quantize,
    startup,
    step,
    suite,
    wait_policy,
)
from benchmarks.report import CorrectnessError

_BENCHMARKS = {
    "decode": decode,
    "quantize": quantize,
    "layer": layer,
    "step": step,
    "e2e": e2e,
    "generation": generation,
    "demo_speed": demo_speed,
    "startup": startup,
    "wait_policy": wait_policy,
    "data_memory": data_memory,
    "export_merge": export_merge,
    "folders": folders,
    "all": suite,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in _BENCHMARKS.items():
        module.add_arguments(commands.add_parser(name, help=module.__doc__, description=module.__doc__))
    args = parser.parse_args()
    try:
        _BENCHMARKS[args.benchmark].run(args)
    except CorrectnessError as error:
        print(f"no speed is reported: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
