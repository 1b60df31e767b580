#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# Trains on several Ascend devices of one node or of many: one process a device, started by msrun.
#
# Usage: bash scripts/run_distribute_train_ascend.sh --config FILE [OPTION ...] [section.key=value ...]
#
#   --config FILE        the experiment; parallel.data_parallel is what the other degrees leave of all devices
#   --devices N          devices of this node (default: 8)
#   --nodes N            nodes (default: 1); the script is started on each, with the same arguments
#   --node-rank K        which of them this one is, from 0 (default: 0)
#   --master ADDRESS     address of node 0 (default: 127.0.0.1)
#   --port PORT          a port of node 0 (default: a free one; with several nodes 8118)
#   --log-dir DIR        worker_RANK.log of each process, all.log with the lines of all, scheduler.log and msrun.log
#                        (default: logs/train-DATE-TIME under the current folder)
#   --rank-table FILE    the rank table of a cluster that still needs one
#   --cluster-timeout S  seconds in which the processes of all nodes must have started (default: 1800)
#   --resume             continue from the newest checkpoint of the run
#   --restarted          the same where the run has a checkpoint, else start it: for schedulers that start a job again
#   --max-restarts N     start a job that has failed again, at most N times, from its newest whole checkpoint;
#                        a mistake in the input (exit code 2) is not tried again (default: 0)
#   --min-workers N      with --max-restarts and --nodes: go on without nodes that are lost (not node 0), as long as N
#                        devices are left whose number fits the degrees; a step keeps its sequences
#   --rendezvous DIR     for --min-workers: a folder of this job alone, which all nodes see
#   --rejoin-wait S      for --min-workers: seconds in which a node must come back after a failure (default: 180)
#   --init RUN           start a new run from the weights of another, which all nodes see
#   --eval RUN           evaluate a run or a checkpoint in the place of training, without --config; parallel.* keys say
#                        how the weights are sharded; --json and --trust-code as of eval.py
#   --export RUN         export one, without --config: a part for each rank; parallel.expert_parallel=DEVICES, and
#                        --out DIR, --key-file FILE and --trust-code as of export.py
#   --infer DIR          run such an export; --key-file FILE, and behind -- the options of infer.py
#   --dry-run            check keys and degrees as training would, print the command that would be run, and end
#   section.key=value    any key of the configuration
#
# DEVICE=cpu in front of it starts the same processes on the CPU of this machine.
#
# The run folder must be on a disk that all nodes see. Rank 0's log is shown; when a process fails, the others are
# ended and its first error is shown last. Ctrl-C or SIGTERM saves and ends all (exit code 75).
#
# Example: bash scripts/run_distribute_train_ascend.sh --config config/switch_base_8_ascend.yaml --devices 8 \
#              parallel.expert_parallel=8
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$(dirname "${BASH_SOURCE[0]}")/distribute.sh"
help_if_asked "$0" "$@"
case "${DEVICE:-ascend}" in
    ascend) distribute Ascend "$@" ;;
    cpu) distribute CPU "$@" ;;
    *) fail "DEVICE=$DEVICE: ascend or cpu" ;;
esac
