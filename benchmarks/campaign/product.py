"""Does the product itself run on this device? The commands that a user types, on the embedded model.

Nothing is timed to be compared. Each item is one or a few commands in processes of their own, and says what they must
agree with: a resumed run with the run that was not interrupted, experts in host memory or on disk with experts on the
device, and the device in float32 with the CPU in float32.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.campaign.record import Item, OutOfTimeError, Record
from expertune.kernels.cache import cache_folder

_ROOT = Path(__file__).resolve().parents[2]
_DEMO = _ROOT / "examples" / "demo.yaml"
_MODEL = _ROOT / "src" / "expertune" / "assets" / "tiny-mixtral"
_MOST_WORDS = 6000
_SIDE_BY_SIDE = 6

# Of the items after the run, all side by side; and a command on a GPU that takes longer hangs.
_OTHERS_S = 90.0
_MOST_S = 100.0

# Losses of one step in float32 on two devices, relative: sums in another order, over a few steps of training.
_FLOAT32_LOSS_ERROR = 2e-4

# Losses of 16-bit training on a GPU beside float32 on a CPU, relative, at any step: a jump is an optimizer's.
_JUMP = 0.5


def run(args: argparse.Namespace, out: Record) -> None:
    """The run first, alone, because it leaves checks and kernels for the others; then the others side by side."""
    work = Path(tempfile.mkdtemp(prefix="campaign-product-"))
    product = _Product(work, out, 4 if args.small else 40)
    # On a CPU each process takes all cores by itself.
    with ThreadPoolExecutor(_SIDE_BY_SIDE if out.device.type == "cuda" else 1) as pool:
        try:
            out.item("train", product.train, needs_s=40)
            others = {
                "float32 against the CPU": product.against_cpu,
                "optimizers": product.optimizers,
                "placement": product.placement,
            }
            if product.run_dir.exists():
                of_the_run = {"evaluate": product.evaluate, "resume": product.resume, "generate": product.generate}
                others |= of_the_run
            others |= {"stock transformers": product.stock_transformers}
            others |= {"doctor": product.doctor, "plan": product.plan}
            out.begin(others, _OTHERS_S)
            # The longest first where they run side by side; one after the other, as many as there is time for.
            order = others if out.device.type == "cuda" else reversed(others)
            pending: dict[Future[Item], str] = {pool.submit(others[name]): name for name in order}
            for future in as_completed(pending):
                out.item(pending[future], future.result, needs_s=_OTHERS_S)
        finally:
            pool.shutdown(cancel_futures=True)
            shutil.rmtree(work, ignore_errors=True)


class CommandError(Exception):
    """A command of the product hung, or ended with another exit code than 0; the log has all that it said."""


class _Product:
    """The commands of a run, each in a process of its own.

    Args:
        work: folder for everything that they write.
        out: the group's record: where they compute, and how long they may; `product.log` beside it gets each command
            with its output.
        steps: optimizer steps of the run.
    """

    def __init__(self, work: Path, out: Record, steps: int) -> None:
        self.work, self.out, self.steps = work, out, steps
        self.device, self.log = out.device, out.path.with_name("product.log")
        self.run_dir = work / "run"
        # Rates that are measured beside other work are not kept; the checks of kernels are taken along.
        self.cache = work / "cache"
        (self.cache / "expertune").mkdir(parents=True, mode=0o700)
        for found in cache_folder().glob("gpu-check-*.json"):
            shutil.copy(found, self.cache / "expertune")

    def doctor(self) -> Item:
        """What the program sees of this machine."""
        return {"found": json.loads(self._command("doctor", "--json"))}

    def train(self) -> Item:
        """The demo's run, cut after a few steps; the record says what was proven and which kernels ran."""
        started = time.monotonic()
        said = self._train("run", self._settings(self.steps))
        record = self._record("run")
        losses = _losses(record)
        return {
            "seconds": time.monotonic() - started,
            "said": said[-_MOST_WORDS:],
            "device": record["model"]["device"],
            "dtype": record["model"]["dtype"],
            "preflight": record.get("preflight"),
            "kernels": record.get("kernels"),
            "throughput": record.get("throughput"),
            "memory": record.get("memory"),
            "plan": record.get("plan"),
            "losses": losses,
            "passed": record["run"]["status"] == "finished" and losses[-1] < losses[0],
        }

    def evaluate(self) -> Item:
        """The finished run, opened again."""
        return {"scores": json.loads(self._command("evaluate", str(self.run_dir), "--rows", "16", "--json"))}

    def generate(self) -> Item:
        """One answer."""
        prompt = "FIFA 12 is a sports game from 2011."
        answer = self._command("generate", str(self.run_dir), "--prompt", prompt, "--max-new-tokens", "48")
        return {"answer": answer, "passed": bool(answer.strip())}

    def resume(self) -> Item:
        """The run again from its middle checkpoint, as a kill would have left it."""
        shutil.copytree(self.run_dir, self.work / "resumed")
        shutil.rmtree(self.work / "resumed" / "adapter")
        shutil.rmtree(self.work / "resumed" / f"checkpoint-{self.steps}")
        record_path = self.work / "resumed" / "record.json"
        record = json.loads(record_path.read_text(encoding="utf-8"))
        record["run"]["status"] = "running"
        record_path.write_text(json.dumps(record), encoding="utf-8")
        self._train("resumed", self._settings(self.steps), "--resume")
        difference = self._adapter_difference("run", "resumed")
        return {"largest_difference": difference, "passed": difference == 0}

    def placement(self) -> Item:
        """Experts on the device, in host memory and on disk, from an NF4 folder: the same losses to the bit."""
        folder = self.work / "nf4"
        self._command("quantize", str(_MODEL), str(folder))
        found: dict[str, Any] = {}
        for place in ("device", "host", "disk"):
            name = f"placed-{place}"
            self._train(name, [*self._settings(4), f"model={folder}", f"placement={place}"])
            found[place] = _losses(self._record(name))
            found[f"{place}, layers"] = self._record(name)["placement"]["layers"]
        return {"losses": found, "passed": found["host"] == found["device"] == found["disk"]}

    def against_cpu(self) -> Item:
        """The same steps in float32 on the device and on the CPU, from the same bytes.

        A 16-bit source would be quantized on either, where the mean of the scales is summed in another order.
        """
        folder = self.work / "nf4-float32"
        self._command("quantize", str(_MODEL), str(folder))
        same = [f"model={folder}", "quantization.compute_dtype=float32", "training.optim=adamw_torch"]
        settings = [*self._settings(8), *same]
        self._train("float32-device", settings)
        self._train("float32-cpu", settings, on_cpu=True)
        ours, theirs = (_losses(self._record(name)) for name in ("float32-device", "float32-cpu"))
        error = max(abs(one - other) / abs(other) for one, other in zip(ours, theirs, strict=True))
        return {"device": ours, "cpu": theirs, "relative_error": error, "passed": error <= _FLOAT32_LOSS_ERROR}

    def optimizers(self) -> Item:
        """The same run by every optimizer that a GPU run may take: which of them learns as torch's own does."""
        names = ["adamw_torch", "adamw_8bit"]
        names += ["paged_adamw_8bit", "paged_adamw_32bit"] if self.device.type == "cuda" else []

        def losses(name: str) -> list[float]:
            self._train(name, [*self._settings(self.steps), f"training.optim={name}"])
            return _losses(self._record(name))

        with ThreadPoolExecutor(len(names) if self.device.type == "cuda" else 1) as pool:
            found = dict(zip(names, pool.map(losses, names), strict=True))
        plain = found["adamw_torch"]
        parted = {
            name: max(abs(one - other) / other for one, other in zip(losses, plain, strict=True))
            for name, losses in found.items()
        }
        return {"losses": found, "parted": parted, "passed": all(most <= _JUMP for most in parted.values())}

    def stock_transformers(self) -> Item:
        """`from_pretrained` of an NF4 folder onto the device, beside the CPU."""
        folder = self.work / "nf4-stock"
        self._command("quantize", str(_MODEL), str(folder))
        program = (
            "import sys, torch, expertune\n"
            "from transformers import AutoModelForCausalLM\n"
            "ids = torch.arange(3, 35)[None]\n"
            "def logits(device):\n"
            "    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, device_map=device)\n"
            "    with torch.no_grad():\n"
            "        return model(input_ids=ids.to(device)).logits.float().cpu()\n"
            "one, other = logits(sys.argv[2]), logits('cpu')\n"
            "print(float((one - other).norm() / other.norm()))\n"
        )
        device = "cuda:0" if self.device.type == "cuda" else "cpu"
        error = float(self._python("-c", program, str(folder), device))
        return {"relative_error": error, "passed": error <= 1e-3}

    def plan(self) -> Item:
        """The plan for this device."""
        return {"plan": self._command("plan", str(_DEMO))[-_MOST_WORDS:]}

    def _settings(self, steps: int) -> list[str]:
        return [
            f"training.max_steps={steps}",
            f"training.save_steps={max(steps // 2, 1)}",
            "training.eval_on_start=false",
            "training.eval_strategy=no",
            "training.logging_steps=1",
            "task.rows=16",
        ]

    def _train(self, name: str, settings: list[str], *options: str, on_cpu: bool = False) -> str:
        command = ["train", str(_DEMO), *settings, f"output_dir={self.work / name}", *options]
        return self._run([sys.executable, "-m", "expertune", *command], on_cpu)[1]

    def _record(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.work / name / "record.json").read_text(encoding="utf-8"))
        return values

    def _adapter_difference(self, one: str, other: str) -> float:
        mine, theirs = (load_file(self.work / name / "adapter" / "adapter_model.safetensors") for name in (one, other))
        return max(float((mine[key].float() - theirs[key].float()).abs().max()) for key in mine)

    def _command(self, *arguments: str) -> str:
        return self._run([sys.executable, "-m", "expertune", *arguments])[0]

    def _python(self, *arguments: str) -> str:
        return self._run([sys.executable, *arguments])[0]

    def _run(self, command: list[str], on_cpu: bool = False) -> tuple[str, str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(self.cache)}
        if on_cpu or self.device.type == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.out.require_time()
        most = _MOST_S if self.device.type == "cuda" else math.inf
        limit = min(self.out.remaining_s, most)
        started = time.monotonic()
        try:
            done = subprocess.run(
                command, cwd=_ROOT, env=environment, capture_output=True, check=False,
                timeout=None if limit == math.inf else limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            self._log(command, error.stdout, error.stderr, f"ended after {limit:.1f} s")
            if limit < most:
                raise OutOfTimeError from error
            raise CommandError(f"{' '.join(command[1:5])}: not done after {limit:.0f} s, and ended") from error
        how = f"exit {done.returncode}"
        said, errors = self._log(command, done.stdout, done.stderr, f"{how} after {time.monotonic() - started:.1f} s")
        if done.returncode != 0:
            last = errors.strip().splitlines()[-1:] or ["no message"]
            raise CommandError(f"{' '.join(command[1:5])}: {how}: {last[0][-400:]}")
        return said, errors

    def _log(self, command: list[str], stdout: bytes | None, stderr: bytes | None, how: str) -> tuple[str, str]:
        """Keep a command with what it said, which is also returned as text."""
        said, errors = ((words or b"").decode(errors="replace") for words in (stdout, stderr))
        # One write, so that commands side by side do not mix their lines.
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command[1:])}\n{said[-4000:]}{errors[-20000:]}[{how}]\n\n")
        return said, errors


def _losses(record: dict[str, Any]) -> list[float]:
    return [float(loss) for _step, loss in record["train"]["loss"]]
