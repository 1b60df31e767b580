#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# Trains by a YAML file of MindFormers, through MindFormers' own Trainer.
#
# Usage: bash scripts/run_mindformers.sh CONFIG [section.key=value ...]
#
#   CONFIG               a YAML file of MindFormers that names the classes of this repository, such as
#                        config/mindformers/quickstart.yaml
#   section.key=value    any key of the file
#
# The environment gets the package mindformers where it is missing. Log, metrics and checkpoints go to output_dir of
# the file. On Ascend set context.device_target=Ascend; with several devices also use_parallel=True and the degrees in
# parallel_config, and start one process a device with MindSpore's msrun:
#   msrun --worker_num=8 bash scripts/run_mindformers.sh CONFIG use_parallel=True parallel_config.data_parallel=8
#
# Example: bash scripts/run_mindformers.sh config/mindformers/quickstart.yaml train_dataset.data_loader.steps=40
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$0" "$@"

(($#)) || fail "CONFIG: missing; such as config/mindformers/quickstart.yaml, see --help"
set_up mindformers
exec "$VENV/bin/python" -m switchyard.interop.mindformers train "$@"
