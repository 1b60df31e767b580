#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# Loss, perplexity, bits per byte and the router audit over the whole validation set.
#
# Usage: bash scripts/run_eval.sh --checkpoint RUN [--json] [section.key=value ...]
#
#   --checkpoint RUN     a run folder (its newest checkpoint) or one checkpoint in it
#   --json               print one JSON object instead of a table
#   section.key=value    any key of the configuration
#
# Everything goes to eval.py as it stands.
#
# Example: bash scripts/run_eval.sh --checkpoint runs/quickstart
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$0" "$@"
set_up run
run_program eval.py "$@"
