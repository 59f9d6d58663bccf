"""Rows of dolly by the million: seconds and memory to tokenize them once, and to use them again."""

import argparse
import gzip
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.peers.processes import ROOT
from benchmarks.workload import DOLLY_SAMPLE, write_tokenizer

_MAX_LENGTH = 1024
_NUM_LOOKS = 20_000
_SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000], help="default 10000 100000 1000000"
    )
    parser.add_argument("--text", type=Path, default=DOLLY_SAMPLE, help="JSONL rows in dolly's layout, maybe gzipped")
    parser.add_argument(
        "--tokenize",
        type=int,
        default=0,
        help="tokenize so many rows, and write their tokens again and again; default all",
    )
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--json", type=Path, help="write the result here, anew after every size")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and report."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer"
        tokenizer.mkdir()
        write_tokenizer(tokenizer)
        for count in args.rows:
            path = folder / f"{count}.jsonl"
            _write_rows(path, args.text, count)
            turns = {turn: _turn(path, tokenizer, folder / "cache", args.tokenize) for turn in ("first", "again")}
            if turns["first"]["digest"] != turns["again"]["digest"]:
                raise report.CorrectnessError(f"{count} rows: other tokens the second time")
            kept = sum(each.stat().st_size for each in (folder / "cache").rglob("*") if each.is_file())
            results.append({"rows": count, "source_bytes": path.stat().st_size, "kept_bytes_so_far": kept, **turns})
            report.progress(f"{count} rows: {turns}")
            path.unlink()
            result = {
                "benchmark": "data_memory",
                "environment": report.environment(),
                "note": args.note,
                "text": args.text.name,
                "rows_tokenized": args.tokenize or "all",
                "max_length": _MAX_LENGTH,
                "results": results,
            }
            if args.json:
                report.write(args.json, result)
    _show(results, args.note)
    return result


def _write_rows(path: Path, text: Path, count: int) -> None:
    """The rows of a text again and again, each with a number of its own in its question."""
    content = gzip.decompress(text.read_bytes()) if text.suffix == ".gz" else text.read_bytes()
    rows = [json.loads(line) for line in content.decode("utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(rows), count)):
            file.write(json.dumps(row | {"instruction": f"({number}) {row['instruction']}"}) + "\n")


def _turn(path: Path, tokenizer: Path, cache: Path, tokenize: int) -> dict[str, Any]:
    """A process of its own, so that its peak is its own."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-m", "benchmarks.data_memory", str(path), str(tokenizer), str(tokenize)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _measure(path: str, tokenizer_folder: str, tokenize: str) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from expertune.config import DataConfig
    from expertune.data import make_dataset, prepare_examples, token_cache
    from expertune.data.sources import find_source

    token_cache.LARGE_BYTES = 0  # the small sizes take the same way
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    data = DataConfig(train=path, max_length=_MAX_LENGTH, on_error="skip")
    before = _peak_mb()
    started, used = time.monotonic(), time.process_time()
    if int(tokenize):
        source = find_source(path)

        def make(keep: Callable[[Any], None]) -> dict[str, Any]:
            (count,) = source.read(stream=True).num_rows.values()
            few = prepare_examples(data.model_copy(update={"train": f"{path}[:{tokenize}]"}), "train", tokenizer)
            for example in islice(cycle(list(few.examples)), count):
                keep(example)
            return few.report | {"num_rows": count}

        tokenized = token_cache.kept_examples(token_cache.cache_key(source, data, tokenizer), source.name, make)
    else:
        tokenized = prepare_examples(data, "train", tokenizer)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - used
    prepared = _peak_mb()
    dataset = make_dataset(tokenized, data)
    draw = random.Random(_SEED)
    started = time.monotonic()
    for _ in range(_NUM_LOOKS):
        dataset[draw.randrange(len(dataset))]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "microseconds_per_sequence": (time.monotonic() - started) / _NUM_LOOKS * 1e6,
        "peak_mb_before": before,
        "peak_mb_prepared": prepared,
        "peak_mb": _peak_mb(),
        "num_rows": tokenized.report["num_rows"],
        "num_tokens": int(tokenized.lengths.sum()),
        "digest": tokenized.digest,
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _show(results: list[dict[str, Any]], note: str) -> None:
    header = ["rows", "first, s", "again, s", "peak first, MB", "peak again, MB", "rows/s of CPU time, first"]
    report.show(
        "rows of dolly, tokenized and used again",
        header,
        [
            [
                f"{each['rows']:,}",
                *(f"{each[turn]['seconds']:.1f}" for turn in ("first", "again")),
                *(f"{each[turn]['peak_mb']:.0f}" for turn in ("first", "again")),
                f"{each['rows'] / each['first']['cpu_seconds']:.0f}",
            ]
            for each in results
        ],
        [note] if note else [],
    )


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
