#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# Text from an exported model.
#
# Usage: bash scripts/run_infer.sh --model DIR --prompt TEXT [OPTION ...]
#
#   --model DIR          a folder that export.py made
#   --prompt TEXT        the beginning of the text
#   OPTION               see: python infer.py --help
#
# Everything goes to infer.py as it stands.
#
# Example: bash scripts/run_infer.sh --model output/quickstart --prompt "def main("
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$0" "$@"
set_up run
run_program infer.py "$@"
