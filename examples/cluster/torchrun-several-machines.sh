#!/usr/bin/env bash
# Two machines or more: a process for each GPU of each. On every machine the same command, but for NODE:
#
#   HEAD=10.0.0.1 NODES=2 NODE=0 examples/cluster/torchrun-several-machines.sh examples/mixtral-dolly.yaml
#   HEAD=10.0.0.1 NODES=2 NODE=1 examples/cluster/torchrun-several-machines.sh examples/mixtral-dolly.yaml
#
# To change:
#   HEAD       a name or an address of machine 0 that all machines reach
#   PORT       a port that is free there
#   NODES      how many machines there are; NODE is the number of this one, from 0
#   PROCESSES  how many processes to start on each: on machines without a GPU, or with CUDA_VISIBLE_DEVICES
#
# The model and the data have to be under the same paths on all machines. The output_dir is written by machine 0, and has
# to be on a shared filesystem for --resume and for load_best_model_at_end.
set -euo pipefail

exec torchrun \
  --nnodes "${NODES:?the number of machines}" \
  --node-rank "${NODE:?the number of this machine, from 0}" \
  --nproc-per-node "${PROCESSES:-gpu}" \
  --master-addr "${HEAD:?a name or an address of machine 0}" \
  --master-port "${PORT:-29500}" \
  -m expertune train "$@"
