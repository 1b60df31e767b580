"""The set-up: which Python, `.venv` made once, repaired when half-made, arguments passed on as they stand.

Each test works in a copy of scripts/ with requirements that need no download, before a PATH of stand-ins.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("python3", "python3.12", "python3.11", "python3.10", "python")
ABSENT = 'echo "shim: $0: command not found" >&2\nexit 127\n'
PRINT_ARGUMENTS = "import json, sys\nprint(json.dumps(sys.argv[1:]))\n"


class Clone:
    """A copy of the scripts, and a PATH on which every name of Python is a stand-in until `python` says otherwise."""

    def __init__(self, folder: Path):
        self.root = folder / "a clóne (1)"
        self.path = folder / "path"
        self.path.mkdir(parents=True)
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        (self.root / "requirements.txt").write_text("")
        (self.root / "requirements-test.txt").write_text("-r requirements.txt\n")
        (self.root / "requirements-docs.txt").write_text("")
        (self.root / "requirements-mindformers.txt").write_text("-r requirements.txt\n")
        for name in ("train", "eval", "export", "infer"):
            (self.root / f"{name}.py").write_text(PRINT_ARGUMENTS)
        for name in NAMES:
            self.python(name, ABSENT)

    def python(self, name: str, body: str) -> None:
        (self.path / name).write_text(f"#!/bin/sh\n{body}")
        (self.path / name).chmod(0o755)

    def real(self, name: str) -> None:
        self.python(name, f'exec "{sys.executable}" "$@"\n')

    def version(self, name: str, version: str) -> None:
        """A Python that tells its version and passes no check of it."""
        self.python(name, f'case "$2" in *print*) echo {version} ;; *) exit 1 ;; esac\n')

    def run(self, script: str, *arguments: str, **environment: str):
        # no HOME: a set-up must not need one
        environment = {"PATH": f"{self.path}:/usr/bin:/bin", **environment}
        command = ["bash", self.root / "scripts" / script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=self.root)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A clone whose python3 is too new, whose python3.12 is a dead shim, and that ran once with python3.11."""
    clone = Clone(tmp_path_factory.mktemp("ready"))
    clone.version("python3", "3.13")
    clone.real("python3.11")
    clone.first = clone.run("run_eval.sh", "--checkpoint", "a run")
    return clone


def test_wrong_python_gets_one_line(tmp_path):
    clone = Clone(tmp_path)
    clone.version("python3", "3.13")
    clone.version("python", "2.7")
    done = clone.run("run_eval.sh", "--checkpoint", "x")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "3.10, 3.11 or 3.12" in line
    assert "python3 is 3.13, python is 2.7" in line
    assert not (clone.root / ".venv").exists()


def test_no_python_gets_one_line(tmp_path):
    done = Clone(tmp_path).run("run_quickstart.sh")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: no usable Python (none found)")


def test_named_python_must_be_right(tmp_path):
    clone = Clone(tmp_path)
    clone.version("python3", "3.9")
    clone.real("python3.11")
    done = clone.run("run_eval.sh", PYTHON="python3")
    assert done.returncode == 2
    assert done.stderr == "error: PYTHON=python3: 3.9; Switchyard needs Python 3.10, 3.11 or 3.12\n"


def test_falls_back_to_a_python_that_runs(ready):
    assert ready.first.returncode == 0, ready.first.stderr
    assert ready.first.stderr.startswith("Making .venv with python3.11 (3.")
    assert json.loads(ready.first.stdout) == ["--checkpoint", "a run"]


def test_the_environment_finds_the_package_from_anywhere(ready, tmp_path):
    """As `python -m switchyard...` does, from whatever folder, though pip has built nothing."""
    package = ready.root / "src" / "switchyard"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text("print(__file__)")
    python = ready.root / ".venv" / "bin" / "python"
    for language in ("C", "C.UTF-8"):
        command = [python, "-m", "switchyard"]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"LANG": language})
        assert found.stdout.strip() == str(package / "__main__.py"), found.stderr
    shutil.rmtree(ready.root / "src")


@pytest.mark.parametrize("program", ["train", "eval", "export", "infer"])
def test_a_command_line_uses_the_code_beside_it(program, tmp_path):
    """Whatever package of that name is installed, or none is."""
    root = tmp_path / "a clóne (2)"
    package = root / "src" / "switchyard"
    package.mkdir(parents=True)
    shutil.copy(ROOT / f"{program}.py", root)
    (package / "__init__.py").write_text("")
    (package / "cli.py").write_text("run = lambda main: print(__file__)")
    (package / "commands.py").write_text("train_main = eval_main = export_main = infer_main = None")
    command = [sys.executable, "-I", root / f"{program}.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={})
    assert done.stdout.strip() == str(package / "cli.py"), done.stderr


@pytest.mark.parametrize("kind", ["", "-test", "-docs", "-mindformers"])
def test_requirements_do_not_depend_on_the_current_folder(kind):
    """pip reads `-r` beside the file, but `-e .` and `./package` where it was called."""
    lines = [line.split("#")[0].strip() for line in (ROOT / f"requirements{kind}.txt").read_text().splitlines()]
    for line in filter(None, lines):
        assert re.fullmatch(
            r"-r requirements(-docs|-mindformers)?\.txt|[A-Za-z0-9-]+[<>=]=[0-9.]+(,<[0-9.]+)?", line
        ), line


def test_complete_environment_is_reused(ready):
    for name in NAMES:
        ready.python(name, ABSENT)
    again = ready.run("run_export.sh", "--checkpoint", "x", "--out", "y")
    assert (again.returncode, again.stderr) == (0, "")
    assert json.loads(again.stdout) == ["--checkpoint", "x", "--out", "y"]


def test_arguments_arrive_as_they_stand(ready):
    hostile = ["--prompt", "two  spaces \"quotes\" 'and' $HOME `id` *", "moe.layers=[0, 2]", "", "\n"]
    assert json.loads(ready.run("run_infer.sh", *hostile).stdout) == hostile


@pytest.mark.parametrize("flag", [["--log", "logs of mine/first.log"], ["--log=logs of mine/first.log"]])
def test_training_keeps_a_log(ready, flag):
    done = ready.run("run_standalone_train.sh", "--config", "c.yaml", *flag, "--resume", "train.steps=3")
    arguments = ["--config", "c.yaml", "--resume", "train.steps=3"]
    assert json.loads(done.stdout) == arguments
    assert json.loads((ready.root / "logs of mine" / "first.log").read_text()) == arguments


def test_training_passes_failure_on(ready):
    (ready.root / "train.py").write_text("import sys\nsys.exit(75)\n")
    assert ready.run("run_standalone_train.sh").returncode == 75


def test_pip_failure_shows_its_log_and_is_repaired(tmp_path):
    clone = Clone(tmp_path)
    clone.real("python3")
    (clone.root / "requirements.txt").write_text("./no-such-package\n")
    failed = clone.run("run_eval.sh")
    assert failed.returncode == 2
    assert "no-such-package" in failed.stderr
    assert "pip could not install requirements.txt" in failed.stderr.splitlines()[-1]
    assert failed.stdout == ""
    (clone.root / "requirements.txt").write_text("")
    repaired = clone.run("run_eval.sh")
    assert repaired.returncode == 0, repaired.stderr
    assert repaired.stderr.startswith("Making .venv")


def test_environment_of_ones_own_is_left_alone(tmp_path):
    clone = Clone(tmp_path)
    done = clone.run("run_eval.sh", "--json", SWITCHYARD_VENV=sys.prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == ["--json"]
    assert not (clone.root / ".venv").exists()


def test_what_is_no_environment_is_not_cleared(tmp_path):
    clone = Clone(tmp_path)
    clone.real("python3")
    (clone.root / ".venv").mkdir()
    (clone.root / ".venv" / "mine").write_text("precious")
    done = clone.run("run_eval.sh")
    assert done.returncode == 2
    assert done.stderr.endswith(".venv: is no Python environment; move it away, or say SWITCHYARD_VENV=DIR\n")
    assert (clone.root / ".venv" / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config"], "--config: needs a value"),
        (["train.name=x"], "train.name: use --name"),
        (["train.output_dir=x"], "train.output_dir: use --out"),
        (["--steps", "3"], "--steps: unknown option; see --help"),
        (["--tokens=3.5"], "--tokens=3.5: unknown option; see --help"),
        (["--tokens", "many"], "--tokens: many; a whole number from 1 to 999999999"),
        (["--name", "a b"], "--name: a b; letters, digits, and . _ - behind the first"),
        (["--config", "none.yaml"], "--config: none.yaml; no such file"),
    ],
)
def test_quickstart_refuses(tmp_path, arguments, says):
    done = Clone(tmp_path).run("run_quickstart.sh", *arguments)
    assert (done.returncode, done.stderr) == (2, f"error: {says}\n")
