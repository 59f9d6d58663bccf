"""Ray Train: a worker for each GPU, on one machine or on a cluster of Ray.

    python examples/cluster/ray_train.py examples/mixtral-dolly.yaml --workers 16
    python examples/cluster/ray_train.py run.yaml distributed.experts=parallel --workers 2 --cpu

To change: nothing here; workers, run file and overrides are arguments. Ray starts the workers and makes their
torch.distributed group, which Expertune uses. The folder that this is started in has to be on a filesystem that all
machines share, with the model, the data and the output_dir.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train(options: dict[str, Any]) -> None:
    """What each worker runs."""
    import expertune

    os.chdir(options["folder"])  # Ray starts workers in a folder of its own
    expertune.finetune(options["run"], options["overrides"], resume=options["resume"])


def main() -> None:
    """Start the workers, and wait for the run."""
    parser = argparse.ArgumentParser(description="`expertune train` on the workers of a Ray cluster.")
    parser.add_argument("run", help="a run file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to use instead of its own")
    parser.add_argument("--workers", type=int, required=True, help="how many processes, on all machines together")
    parser.add_argument("--cpu", action="store_true", help="workers without a GPU")
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    options = parser.parse_intermixed_args()

    folder = Path.cwd()
    TorchTrainer(
        train,
        train_loop_config={**vars(options), "folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        # Ray's own notes on the run. A worker that fails ends the run: give the same command again with --resume.
        run_config=RunConfig(storage_path=str(folder / "ray")),
    ).fit()


if __name__ == "__main__":
    main()
