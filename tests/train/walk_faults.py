"""Runs of one configuration in which one write each fails, in a process that `write_faults.c` is preloaded into.

Reads a task as JSON from stdin: `values` of the run file, `folder`, and `points` ([place of the write that fails in the
run, error number, whether those after it fail too]). A place is a number, or a part of all writes (below 1), for which
the writes of an undisturbed run are counted first. Writes `results.json` into the folder: how each run and its resume
ended.
"""

import copy
import ctypes
import gc
import io
import json
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from expertune import finetune
from expertune.config import parse_config
from expertune.errors import ExpertuneError

library = ctypes.CDLL(None)
library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int]
library.faults_trace.argtypes = [ctypes.c_char_p]
library.faults_seen.restype, library.faults_last.restype = ctypes.c_long, ctypes.c_char_p


def run(values: dict[str, Any], resume: bool) -> tuple[str, str]:
    """How a run ended (`finished`, `error` or `traceback`) and what was said of it."""
    said = io.StringIO()
    try:
        finetune(parse_config(copy.deepcopy(values)), resume=resume, console=Console(file=said, width=500))
    except ExpertuneError as error:
        return "error", str(error)
    except BaseException:
        return "traceback", traceback.format_exc()
    return "finished", said.getvalue()


def walk(task: dict[str, Any]) -> list[dict[str, Any]]:
    """One result for each point."""
    results = []
    for place, number, sticky in [(-1, 0, False), *task["points"]]:
        at = int(place * results[0]["writes"]) if 0 < place < 1 else place
        run_dir = Path(task["folder"]) / "run"
        shutil.rmtree(run_dir, ignore_errors=True)
        values = task["values"] | {"output_dir": str(run_dir)}
        if at < 0:
            library.faults_trace(str(Path(task["folder"]) / "trace").encode())
        library.faults_arm(str(run_dir).encode(), at, number, int(sticky))
        ended, said = run(values, resume=False)
        result: dict[str, Any] = {"at": at, "ended": ended, "said": said, "writes": library.faults_seen()}
        result["what"] = library.faults_last().decode()
        library.faults_arm(b"", -1, 0, 0)
        library.faults_trace(None)
        record = run_dir / "record.json"
        result["status"] = json.loads(record.read_text())["run"]["status"] if record.exists() else None
        result["left"] = sorted(path.name for path in run_dir.iterdir()) if run_dir.exists() else []
        if ended != "finished":
            result["resumed"], result["resumed_said"] = run(values, resume=result["status"] is not None)
        adapter = run_dir / "adapter" / "adapter_model.safetensors"
        result["adapter"] = adapter.read_bytes().hex() if adapter.exists() else None
        end = json.loads(record.read_text()) if record.exists() else {}
        result["losses"] = [end.get("train", {}).get("loss"), end.get("eval", {}).get("loss")]
        result["final"] = end.get("run", {}).get("status")
        results.append(result)
    return results


if __name__ == "__main__":
    gc.collect()
    gc.freeze()
    given = json.load(sys.stdin)
    (Path(given["folder"]) / "results.json").write_text(json.dumps(walk(given)))
