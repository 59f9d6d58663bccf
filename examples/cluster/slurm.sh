#!/usr/bin/env bash
# Slurm: one torchrun on each node, which starts a process for each GPU. What follows is passed on to `expertune train`:
#
#   sbatch examples/cluster/slurm.sh examples/mixtral-dolly.yaml
#
# To change: the lines of #SBATCH, and how the environment with Expertune in it is activated.
#
# The folder that sbatch is called in has to be on a shared filesystem, with the model, the data and the output_dir. A
# job that Slurm has requeued, after preemption or a failed node, resumes from its newest checkpoint. After a time limit,
# submit it again with --resume.

#SBATCH --job-name=expertune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

# source .venv/bin/activate

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 10000)) # two jobs that share a node have to have different ones
export HEAD PORT

if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
  set -- "$@" --resume
fi

# shellcheck disable=SC2016  # the variables are those of each node
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "${PROCESSES:-gpu}" \
    --master-addr "$HEAD" --master-port "$PORT" -m expertune train "$@"
' torchrun "$@"
