#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# Example of a Slurm job: one task a node starts the processes of its devices. It has not been run on a cluster here.
#
# Usage: sbatch --nodes=2 scripts/slurm_train.sh --config FILE [OPTION ...] [section.key=value ...]
#
# Slurm sends SIGTERM five minutes before the time limit, or when the job is preempted: the ranks save together, the job
# ends with exit code 75 and is put into the queue again. It goes on from its newest whole checkpoint, also on another
# number of nodes where the degrees allow it: `sbatch --nodes=1-2` lets Slurm choose. Every other failure is tried again
# by --max-restarts on the same nodes. A mistake in the input (exit code 2) ends the job.
#
# The repository, its environment .venv, the data and train.output_dir must be on a disk that all nodes see.
# Adapt: the lines #SBATCH, DEVICES (of a node), KIND (ascend or gpu).
# ==============================================================================
#SBATCH --job-name=switchyard
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -euo pipefail

ROOT="${SLURM_SUBMIT_DIR:?start it by sbatch, in the root of the repository}"
DEVICES="${DEVICES:-8}"
KIND="${KIND:-ascend}"
MASTER="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)"
LOGS="logs/slurm-${SLURM_JOB_ID:?}-${SLURM_RESTART_COUNT:-0}"
export DEVICES KIND MASTER LOGS ROOT

code=0
# the quotes are for the shell of each node, which knows its own SLURM_NODEID
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 bash -c '
    exec bash "$ROOT/scripts/run_distribute_train_$KIND.sh" --devices "$DEVICES" --nodes "$SLURM_NNODES" \
        --node-rank "$SLURM_NODEID" --master "$MASTER" --port 8118 --log-dir "$LOGS" --max-restarts 10 --restarted "$@"
' train "$@" || code=$?

if ((code == 75)); then # saved after SIGTERM: the rest in the next turn
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
