"""`switchyard COMMAND`: the command lines of an installed package."""

import subprocess
import sys

import pytest

from switchyard import __main__ as program
from switchyard import __version__, cli


def test_a_command_gets_its_arguments(monkeypatch):
    got = []
    monkeypatch.setitem(program.COMMANDS, "train", (lambda arguments: got.append(arguments) or 7, ""))
    assert cli.run(program.dispatch, ["train", "--config", "a b", "train.steps=2"]) == 7
    assert got == [["--config", "a b", "train.steps=2"]]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "error: switchyard: needs a command; one of train, eval, export, infer, report, sweep"),
        (["trian"], "error: switchyard: 'trian'; unknown command; one of train, eval, export, infer, report, sweep"),
    ],
)
def test_no_command_is_one_line(arguments, says, capsys):
    assert cli.run(program.dispatch, arguments) == 2
    assert capsys.readouterr().err.splitlines() == [says]


def test_every_command_has_a_help(capsys):
    """Modules are imported by their names, so a name that is wrong shows only here."""
    for name in program.COMMANDS:
        with pytest.raises(SystemExit) as ended:
            program.dispatch([name, "--help"])
        assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: ")


def test_help_and_version(capsys):
    assert cli.run(program.dispatch, ["--version"]) == 0
    assert cli.run(program.dispatch, ["--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{__version__}\nusage: switchyard COMMAND")
    assert all(f"  {name}" in said for name in program.COMMANDS)


def test_the_module_is_the_program():
    done = subprocess.run([sys.executable, "-m", "switchyard", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, __version__)
