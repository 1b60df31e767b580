"""Runs `python -m switchyard.interop.mindformers`: trains by a file of MindFormers, or translates one."""

import sys
from pathlib import Path

from switchyard import cli
from switchyard.interop.mindformers.convert import convert_file, report
from switchyard.interop.mindformers.launch import train

PROG = "python -m switchyard.interop.mindformers"


def create_parser() -> cli.Parser:
    """Returns the parser of the command line."""
    parser = cli.Parser(prog=PROG, description="Trains by a YAML file of MindFormers, or translates one.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | convert-config")
    trains = commands.add_parser("train", help="trains through MindFormers' Trainer")
    trains.add_argument(
        "config", metavar="FILE", help="a YAML file of MindFormers, such as config/mindformers/quickstart.yaml"
    )
    trains.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes one key of the file")
    converts = commands.add_parser("convert-config", help="writes the sections of this package that a file means")
    converts.add_argument("config", metavar="FILE", help="a YAML file of MindFormers")
    converts.add_argument("--out", metavar="FILE", help="where the result goes, which must not exist (default: stdout)")
    return parser


def main(arguments: list[str]) -> None:
    """Runs the command; see its --help."""
    chosen = create_parser().parse_args(arguments)
    if chosen.command == "train":
        train(chosen.config, chosen.overrides)
        return
    out = Path(chosen.out) if chosen.out else None
    found = convert_file(Path(chosen.config), out)
    for line in report(found):
        print(line, file=sys.stderr)
    if out is None:
        print(found.to_yaml(Path(chosen.config).name), end="")


if __name__ == "__main__":
    sys.exit(cli.run(main))
