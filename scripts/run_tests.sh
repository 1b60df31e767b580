#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# The checks of the repository: ruff (lint, then format), import-linter (pyproject.toml), then pytest: every
# test in two processes, or what the arguments ask for in one.
#
# Usage: bash scripts/run_tests.sh [ARGUMENTS OF PYTEST]
#
# Examples: bash scripts/run_tests.sh                            everything, 18 to 28 minutes on 2 cores
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
if (($#)); then
    "$VENV/bin/python" -m pytest "$@"
else
    "$VENV/bin/python" -m pytest -n 2 --dist loadfile # a file's tests share what they train and compile
fi
