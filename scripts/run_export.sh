#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# Writes prefill and decode as MindIR with tokenizer and manifest, after comparing them with the training graph.
#
# Usage: bash scripts/run_export.sh --checkpoint RUN --out DIR [--key-file FILE] [--streamed] [section.key=value ...]
#
#   --checkpoint RUN     a run folder (its newest checkpoint) or one checkpoint in it
#   --out DIR            the folder to make
#   --key-file FILE      16, 24 or 32 bytes: encrypts the MindIR with AES-GCM
#   --streamed           copy the weights tensor by tensor, for a model larger than memory; the files are not run
#   section.key=value    any key of the configuration, such as export.max_length=512
#
# Everything goes to export.py as it stands.
#
# Example: bash scripts/run_export.sh --checkpoint runs/quickstart --out output/quickstart
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$0" "$@"
set_up run
run_program export.py "$@"
