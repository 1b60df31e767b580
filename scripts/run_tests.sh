#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# The checks of the repository: ruff (lint, then format), import-linter and mypy (pyproject.toml), then pytest:
# every test that is not marked `long` in two processes, or what the arguments ask for in one.
#
# Usage: bash scripts/run_tests.sh [--long] [ARGUMENTS OF PYTEST]
#
#   --long   the tests marked `long` instead of the others: full-size repetitions of what the others hold small
#
# Examples: bash scripts/run_tests.sh                            everything but `long`, under 25 minutes on 2 cores
#           bash scripts/run_tests.sh --long                     what repeats at full size; installs from the network
#           bash scripts/run_tests.sh -m "not slow"              what answers quickly
#           bash scripts/run_tests.sh tests/data -k corpus       one package
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$0" "$@"
set_up tests
bash "$ROOT/scripts/install_browser.sh"
cd "$ROOT"
"$VENV/bin/python" -m ruff check .
"$VENV/bin/python" -m ruff format --check .
PYTHONPATH=src "$VENV/bin/lint-imports" --no-logo --no-cache
"$VENV/bin/python" -m mypy
chosen=()
if [[ "${1:-}" == "--long" ]]; then
    chosen=(--long)
    shift
fi
if ((!$#)); then set -- -n 2 --dist loadfile; fi # a file's tests share what they train and compile
"$VENV/bin/python" -m pytest "${chosen[@]+"${chosen[@]}"}" "$@"
