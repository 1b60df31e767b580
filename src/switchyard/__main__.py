"""Runs a command of an installed package: `switchyard train --config quickstart`, or `python -m switchyard train ...`.

The commands `train`, `eval`, `export` and `infer` are those of train.py, eval.py, export.py and infer.py.
"""

import sys

from switchyard import __version__, commands
from switchyard.cli import run
from switchyard.errors import UserError, represented

COMMANDS = {
    "train": (commands.train_main, "trains a model and keeps metrics and checkpoints in runs/NAME"),
    "eval": (commands.eval_main, "evaluates a checkpoint over its run's validation set"),
    "export": (commands.export_main, "writes a checkpoint as MindIR"),
    "infer": (commands.infer_main, "continues text, or classifies images, with an exported model"),
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
