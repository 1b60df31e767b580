"""Runs a command of an installed package: `switchyard train --config quickstart`, or `python -m switchyard train ...`.

The commands `train`, `eval`, `export` and `infer` are those of train.py, eval.py, export.py and infer.py; the others
are modules, `switchyard sweep` is `python -m switchyard.sweep`.
"""

import importlib
import sys
from collections.abc import Callable

from switchyard import __version__, commands
from switchyard.cli import run
from switchyard.errors import UserError, represented


def module(name: str) -> Callable[[list[str]], int | None]:
    """Returns a function that imports a module's command line when it is called, and calls it."""

    def main(arguments: list[str]) -> int | None:
        program: Callable[[list[str]], int | None] = importlib.import_module(f"{name}.__main__").main
        return program(arguments)

    return main


COMMANDS: dict[str, tuple[Callable[[list[str]], int | None], str]] = {
    "train": (commands.train_main, "trains a model and keeps metrics and checkpoints in runs/NAME"),
    "eval": (commands.eval_main, "evaluates a checkpoint over its run's validation set"),
    "export": (commands.export_main, "writes a checkpoint as MindIR"),
    "infer": (commands.infer_main, "continues text, or classifies images, with an exported model"),
    "report": (module("switchyard.report"), "writes one HTML page about runs; report live RUN watches a run"),
    "sweep": (module("switchyard.sweep"), "trains a configuration with every combination of some values"),
}


def usage() -> str:
    """Returns the help text."""
    lines = [f"  {name:<7} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        (
            "usage: switchyard COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "switchyard COMMAND --help shows the arguments of a command.",
        )
    )


def dispatch(arguments: list[str]) -> int | None:
    """Runs the command that the first argument names.

    Args:
        arguments: the name of the command, then the arguments of the command.

    Returns:
        The exit code of the command; None is success.

    Raises:
        UserError: no command, or an unknown one.
    """
    known = ", ".join(COMMANDS)
    if not arguments:
        raise UserError(f"switchyard: needs a command; one of {known}")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(usage())
        return None
    if name == "--version":
        print(__version__)
        return None
    if name not in COMMANDS:
        raise UserError(f"switchyard: {represented(name)}; unknown command; one of {known}")
    command, _ = COMMANDS[name]
    return command(rest)


def main() -> int:
    """Runs the command line and returns the exit code."""
    return run(dispatch)


if __name__ == "__main__":
    sys.exit(main())
