#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# Trains on one device.
#
# Usage: bash scripts/run_standalone_train.sh --config FILE [--resume | --init RUN] [--log FILE] [section.key=value ...]
#
#   --config FILE        the experiment, such as config/shakespeare_char_switch_cpu.yaml
#   --resume             continue from the newest checkpoint of the run
#   --init RUN           start a new run from the weights of another
#   --log FILE           where the output goes besides the terminal
#                        (default: logs/train-DATE-TIME.log under the current folder)
#   section.key=value    any key of the configuration
#
# Everything but --log goes to train.py as it stands.
#
# Example: bash scripts/run_standalone_train.sh --config config/shakespeare_char_switch_cpu.yaml \
#              data.path=tinyshakespeare.txt train.name=first moe.expert_num=16
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$0" "$@"

log="logs/train-$(date +%Y%m%d-%H%M%S).log"
arguments=()
while (($#)); do
    case "$1" in
        --log)
            (($# > 1)) || fail "--log: needs a file name"
            log="$2"
            shift
            ;;
        --log=*) log="${1#--log=}" ;;
        *) arguments+=("$1") ;;
    esac
    shift
done

set_up run
mkdir -p "$(dirname "$log")"
say "Log: $log"
tee=(tee)
if tee -p </dev/null >/dev/null 2>&1; then tee=(tee -p); fi # of GNU: writes the log on when nobody reads stdout
# The log outlives what stops the training, so that it has the last line; signals to this script reach the training.
exec > >(trap '' HUP INT TERM PIPE && exec "${tee[@]}" "$log") 2>&1
exec "$VENV/bin/python" "$ROOT/train.py" "${arguments[@]+"${arguments[@]}"}"
