"""`python -m switchyard.report RUN [RUN ...]` writes a report, `python -m switchyard.report live RUN` watches a run."""

import sys
from pathlib import Path

from switchyard.cli import Parser, add_trust_code, run, whole
from switchyard.optional import require

LIVE = "live"


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    if arguments[:1] == [LIVE]:
        require("rich", "rich", "report: the view in a terminal")
        from switchyard.report.live import main as live

        return live(arguments[1:])
    require("jinja2", "jinja2", "report: the page")
    from switchyard.report.page import NAME, TOKENS, write_report

    parser = Parser(
        prog="python -m switchyard.report",
        description="Writes one self-contained HTML page about runs.",
        epilog="python -m switchyard.report live RUN watches a run in the terminal.",
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run folder such as runs/NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help=f"the page (default: RUN/{NAME}, of several ./{NAME})")
    text = f"validation tokens or images to send through each model (default {TOKENS})"
    parser.add_argument("--tokens", type=whole, default=TOKENS, metavar="N", help=text)
    parser.add_argument("--no-inspect", action="store_true", help="read files alone: no MindSpore, checkpoint or data")
    add_trust_code(parser)
    chosen = parser.parse_args(arguments)
    if chosen.tokens < 1:
        parser.error(f"argument --tokens: {chosen.tokens}; at least 1, or give --no-inspect")
    tokens = 0 if chosen.no_inspect else chosen.tokens
    print(write_report(chosen.runs, chosen.out, tokens, chosen.trust_code, say))
    return None


def say(line: str) -> None:
    """Prints a line on stderr; stdout has the path of the report alone."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
