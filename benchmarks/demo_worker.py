"""The demo's training in turns, or another run file's, one process of `demo_turns.py`.

It may import from an older tree: what a turn took is read off transformers' own classes, and nothing else of
`benchmarks` is imported.
"""

import json
import os
import sys
import time
from typing import Any


def train(steps: int, turns: int, output_dir: str, run_file: str) -> None:
    """A run file's training; waits for a line on stdin before each turn, and says after it what it took."""
    if "DEMO_WORKER_PREPARES_THREADS" in os.environ:
        from expertune import prepare_threads

        prepare_threads()
    import torch  # noqa: F401 - otherwise first, so that nothing of ours has a say in what OpenMP reads
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler

    import expertune

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    training_step, on_step_end = Trainer.training_step, CallbackHandler.on_step_end
    tokens, started = 0, 0.0

    def counted_training_step(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal tokens
        tokens += inputs["input_ids"].numel()  # no padding in these micro-batches
        return training_step(self, model, inputs, *args, **kwargs)

    def in_turns_on_step_end(self: CallbackHandler, args: Any, state: Any, control: Any) -> Any:
        nonlocal tokens, started
        control = on_step_end(self, args, state, control)
        if state.global_step % steps == 0:
            print(json.dumps([tokens, time.perf_counter() - started]), file=answers)
            sys.stdin.readline()
            tokens, started = 0, time.perf_counter()
        return control

    Trainer.training_step, CallbackHandler.on_step_end = counted_training_step, in_turns_on_step_end
    sys.stdin.readline()
    started = time.perf_counter()
    overrides = (
        *("data.eval=null", "task.metric=null", "training.eval_on_start=false", "training.eval_strategy=no"),
        *("training.save_strategy=no", f"training.max_steps={steps * turns}", f"output_dir={output_dir}"),
    )
    expertune.finetune(run_file, overrides)


if __name__ == "__main__":
    train(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
