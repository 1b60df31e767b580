"""The script that installs a browser, where there is none and none can be installed, and where there is one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "install_browser.sh"


def install(folder: Path, *programs: str) -> subprocess.CompletedProcess:
    """Runs the script on a machine that has these programs and what scripts need."""
    for name in ("dirname", "id", "awk", "mktemp", "rm", "cat"):
        os.symlink(shutil.which(name), folder / name)
    for name in programs:
        (folder / name).write_text("#!/bin/bash\nexit 1\n")
        (folder / name).chmod(0o755)
    command = [shutil.which("bash"), str(SCRIPT)]
    return subprocess.run(command, capture_output=True, text=True, env={"PATH": str(folder)})


def test_a_machine_without_means_to_install_is_told_in_one_line(tmp_path):
    done = install(tmp_path)
    assert done.returncode == 0
    assert done.stderr.count("\n") == 1
    assert "tests of reports in a browser are skipped (apt-get is missing, or this user is not root)" in done.stderr


def test_a_machine_with_a_browser_is_left_alone(tmp_path):
    done = install(tmp_path, "chromium", "chromedriver", "apt-get")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="apt-get installs for root alone")
def test_an_installation_that_fails_is_told(tmp_path):
    done = install(tmp_path, "apt-get")
    assert done.returncode == 0
    assert "apt-get failed, see " in done.stderr.splitlines()[-1]
