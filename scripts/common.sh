#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What the scripts share: which Python, the environment .venv, --help, logs. Sourced, not run.
#
#   PYTHON=FILE           the interpreter to make .venv with (default: the first of python3, python3.12,
#                         python3.11, python3.10, python that runs and has the right version)
#   SWITCHYARD_VENV=DIR   use this environment as it is and install nothing
#
# Written for bash 3.2 and later, so that the one of macOS will do.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${SWITCHYARD_VENV:-$ROOT/.venv}"
SUPPORTED="3.10, 3.11 or 3.12"
RIGHT_VERSION='import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'

say() { # nobody may read it any more, which is no reason to stop
    printf '%s\n' "$*" >&2 || true
}

fail() { # fail TEXT: one line, exit code 2 as the Python command lines have it
    say "error: $*"
    exit 2
}

shown() { # shown TEXT: as messages show it: one line, at most 80 characters
    local text="${1:0:200}"
    text="${text//[[:cntrl:]]/?}"
    if ((${#text} > 80)); then text="${text:0:60} ... ${text: -10}"; fi
    printf '%s' "$text"
}

# whole FLAG VALUE LEAST MOST: prints the number; 08 is 8, not octal, and nothing overflows.
whole() {
    local digits="${2:0:40}"
    while [[ "$digits" == 0?* ]]; do digits="${digits#0}"; done
    case "$digits" in
        "" | *[!0123456789]* | ??????????*) ;;
        *)
            if ((digits >= $3 && digits <= $4)); then
                printf '%s\n' "$digits"
                return
            fi
            ;;
    esac
    fail "$1: $(shown "$2"); a whole number from $3 to $4"
}

# The comment at the top of the script, without the licence line, is its help.
show_usage() {
    awk 'NR > 2 && !/^#/ { exit } NR > 2 { sub(/^# ?/, ""); print }' "$1"
}

# Prints the help of script $1 and stops, if -h or --help is among the other arguments.
help_if_asked() {
    local script="$1" argument
    shift
    for argument in "$@"; do
        case "$argument" in
            -h | --help)
                show_usage "$script"
                exit 0
                ;;
        esac
    done
}

version_of() { # version_of PYTHON: such as 3.13, or nothing when it does not run
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

# Prints the interpreter to use. A name on PATH is not enough: version managers leave names that fail when run.
find_python() {
    local candidate version seen=""
    if [[ -n "${PYTHON:-}" ]]; then
        "$PYTHON" -c "$RIGHT_VERSION" >/dev/null 2>&1 && printf '%s\n' "$PYTHON" && return
        version="$(version_of "$PYTHON")"
        fail "PYTHON=$PYTHON: ${version:-not a Python that runs}; Switchyard needs Python $SUPPORTED"
    fi
    for candidate in python3 python3.12 python3.11 python3.10 python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c "$RIGHT_VERSION" >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
        version="$(version_of "$candidate")"
        [[ -n "$version" ]] && seen="$seen${seen:+, }$candidate is $version"
    done
    fail "no usable Python (${seen:-none found}): Switchyard needs Python $SUPPORTED; install one, or say PYTHON=/path/to/python3.11"
}

checksum() { # of everything that decides what stands in .venv: the files named, and where the repository lies
    (cd "$ROOT" && printf '%s\n' "$ROOT" | cat - "$@") | cksum
}

# Makes $VENV anew. Where Python came without ensurepip (Debian's bare python3), its own pip puts a pip inside.
make_venv() {
    local python
    if [[ -e "$VENV" && ! -f "$VENV/pyvenv.cfg" ]]; then
        fail "$VENV: is no Python environment; move it away, or say SWITCHYARD_VENV=DIR"
    fi
    python="$(find_python)" || exit $?
    say "Making ${VENV#"$ROOT/"} with $python ($("$python" -c 'import platform; print(platform.python_version())'))"
    if "$python" -c 'import ensurepip' 2>/dev/null; then
        "$python" -m venv --clear "$VENV"
    elif "$python" -m pip --version >/dev/null 2>&1; then
        "$python" -m venv --clear --without-pip "$VENV"
        "$python" -m pip install --quiet --disable-pip-version-check pip \
            --target "$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    else
        fail "$python: has neither ensurepip nor pip; install the venv package of your system, or say PYTHON=/path/to/another"
    fi
}

# Shows the last word of pip with the time on a terminal, and keeps all of it in the file $1.
watch_pip() {
    local line start=$SECONDS
    while IFS= read -r line; do
        printf '%s\n' "$line" >>"$1"
        if [[ -t 2 ]]; then
            line="  $((SECONDS - start)) s  ${line#"${line%%[![:space:]]*}"}"
            printf '\r\033[K%s' "${line:0:${COLUMNS:-80}}" >&2
        fi
    done
    if [[ -t 2 ]]; then printf '\r\033[K' >&2; fi
}

# Makes `import switchyard` in $VENV mean $ROOT/src. A path file needs no build, and takes any character of a path.
install_package() {
    local packages
    packages="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    printf '%s\n' "$ROOT/src" >"$packages/switchyard-here.pth"
}

# set_up run | set_up mindformers | set_up tests: afterwards "$VENV/bin/python" has what requirements.txt,
# requirements-mindformers.txt or requirements-test.txt asks for, and the package itself.
# The stamp of what is installed is written last, so that an interrupted set-up is seen and made anew.
set_up() {
    local kind="$1" requirements="requirements.txt" files=(requirements.txt) stamp log start=$SECONDS
    if [[ -n "${SWITCHYARD_VENV:-}" ]]; then
        "$VENV/bin/python" -c "$RIGHT_VERSION" 2>/dev/null || fail "SWITCHYARD_VENV=$VENV: holds no Python $SUPPORTED that runs"
        export PYTHONPATH="$ROOT/src${PYTHONPATH:+:$PYTHONPATH}"
        return
    fi
    case "$kind" in
        mindformers)
            requirements="requirements-mindformers.txt"
            files=(requirements-mindformers.txt "${files[@]}")
            ;;
        tests)
            requirements="requirements-test.txt"
            files=(requirements-test.txt requirements-docs.txt requirements-mindformers.txt "${files[@]}")
            ;;
    esac
    stamp="$VENV/complete-$kind"
    log="$VENV/install.log"
    if [[ ! -e "$VENV/installing" ]] && "$VENV/bin/python" -c "$RIGHT_VERSION" 2>/dev/null; then
        [[ -f "$stamp" && "$(cat "$stamp")" == "$(checksum "${files[@]}")" ]] && return
        "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || make_venv
    else
        make_venv
    fi
    say "Installing $requirements into ${VENV#"$ROOT/"} (the first time about 1 GB to download, some minutes; log: $log)"
    touch "$VENV/installing"
    : >"$log"
    if ! (cd "$ROOT" && "$VENV/bin/python" -m pip install --disable-pip-version-check -r "$requirements" 2>&1) |
        watch_pip "$log"; then
        tail -n 15 "$log" >&2
        fail "pip could not install $requirements; the end of its log stands above, all of it in $log"
    fi
    install_package
    checksum requirements.txt >"$VENV/complete-run"
    checksum "${files[@]}" >"$stamp"
    rm "$VENV/installing"
    say "Installed in $((SECONDS - start)) s"
}

# run_program PROGRAM ARGUMENTS...: one of the command lines in the repository root, in the environment.
run_program() {
    local program="$1"
    shift
    "$VENV/bin/python" "$ROOT/$program" "$@"
}
