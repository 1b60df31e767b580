"""Every script: sound shell, and help without any Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
RUNNABLE = [path for path in SCRIPTS if path.name.startswith("run_")]


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: pip install -r requirements-test.txt"
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS, ROOT / ".ci" / "run"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda path: path.name)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_needs_no_python(script, flag, tmp_path):
    for name in ("python3", "python3.12", "python3.11", "python3.10", "python"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    shown = subprocess.run(["bash", script, flag], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert f"Usage: bash scripts/{script.name}" in shown.stdout
    assert "Example" in shown.stdout
    assert shown.stderr == ""


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda path: path.name)
def test_scripts_are_executable(script):
    assert os.access(script, os.X_OK)
