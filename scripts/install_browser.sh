#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ==============================================================================
# Installs the browser that the tests of reports need, Debian's chromium, where
# it is missing and this user may. Elsewhere one line says that those tests are
# skipped; nothing else needs a browser.
#
# Usage: bash scripts/install_browser.sh
# ==============================================================================
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
help_if_asked "$0" "$@"

has_browser() {
    command -v chromium >/dev/null 2>&1 && command -v chromedriver >/dev/null 2>&1
}

has_browser && exit 0
reason="apt-get is missing, or this user is not root"
if command -v apt-get >/dev/null 2>&1 && [[ "$(id -u)" == 0 ]]; then
    say "Installing chromium for the tests of reports"
    log="$(mktemp)"
    if { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; } >"$log" 2>&1 && has_browser; then
        rm "$log"
        exit 0
    fi
    reason="apt-get failed, see $log"
fi
say "note: no chromium with chromedriver, so the tests of reports in a browser are skipped ($reason)"
