#!/usr/bin/env bash
# One machine: a process for each of its GPUs. What follows is passed on to `expertune train`:
#
#   examples/cluster/torchrun-one-machine.sh examples/mixtral-dolly.yaml
#   examples/cluster/torchrun-one-machine.sh examples/mixtral-dolly.yaml distributed.experts=parallel --resume
#
# To change: PROCESSES, how many to start: on a machine without a GPU, or with CUDA_VISIBLE_DEVICES.
set -euo pipefail

exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" -m expertune train "$@"
