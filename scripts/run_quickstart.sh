#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# From a fresh clone to generated text: makes .venv, trains, evaluates, exports,
# generates from the export, and closes with one table, a picture and a report.
#
# Usage: bash scripts/run_quickstart.sh [OPTION ...] [section.key=value ...]
#
#   --config FILE        the experiment (default: config/quickstart.yaml)
#   --out DIR            where the run folder is made (default: runs in the repository)
#   --name NAME          the run folder's name (default: quickstart; if it exists, NAME-2, NAME-3, ...)
#   --prompt TEXT        what the generated text begins with (default: a Python class)
#   --tokens N           how many tokens to generate (default: 200)
#   section.key=value    any key of the configuration but train.name and train.output_dir
#
# Example: bash scripts/run_quickstart.sh --name small train.steps=200
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$0" "$@"

config="$ROOT/config/quickstart.yaml"
out="$ROOT/runs"
name="quickstart"
prompt=$'class Reader:\n    def __init__(self, '
tokens=200
overrides=()
while (($#)); do
    case "$1" in
        --config | --out | --name | --prompt | --tokens)
            (($# > 1)) || fail "$1: needs a value"
            # shellcheck disable=SC2034  # the cases above are variables of this script
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        train.name=*) fail "${1%%=*}: use --name" ;;
        train.output_dir=*) fail "${1%%=*}: use --out" ;;
        -*) fail "$(shown "$1"): unknown option; see --help" ;;
        *.*=*) overrides+=("$1") ;;
        *) fail "$(shown "$1"): unknown option; see --help" ;;
    esac
    shift
done
tokens="$(whole --tokens "$tokens" 1 999999999)"
[[ "$name" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] || fail "--name: $(shown "$name"); letters, digits, and . _ - behind the first"
[[ -f "$config" || "$config" == "$ROOT/config/quickstart.yaml" ]] || fail "--config: $(shown "$config"); no such file"
out="${out#"$PWD/"}"

free="$name"
for ((number = 2; ; number++)); do
    [[ -e "$out/$free" ]] || break
    free="$name-$number"
done
run="$out/$free"

seconds=()
step() { # step WORD COMMAND...: says what comes and remembers how long it took
    local word="$1" start=$SECONDS
    shift
    say ""
    say "== $word"
    "$@"
    seconds+=("$word=$((SECONDS - start))")
}

evaluate() {
    run_program eval.py --checkpoint "$run" --json >"$run/evaluation.json"
}

generate() {
    run_program infer.py --model "$run/export" --prompt "$prompt" --max-new-tokens "$tokens" --temperature 0.6 --json \
        >"$run/generation.json"
}

report() {
    "$VENV/bin/python" -m switchyard.report "$run" >/dev/null # the closing table names it
}

step set-up set_up run
step training run_program train.py --config "$config" "train.output_dir=$out" "train.name=$free" \
    "${overrides[@]+"${overrides[@]}"}"
step evaluation evaluate
step export run_program export.py --checkpoint "$run" --out "$run/export"
step generation generate
step report report
"$VENV/bin/python" -m switchyard.report.quickstart "$run" --seconds "${seconds[@]}"
