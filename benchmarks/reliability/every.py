"""Runs the campaigns one after the other, in one process that imports MindSpore once.

    python benchmarks/reliability/every.py [--short] [--only kills faults ...] [--seed 1] [--json FOLDER]

The short forms together take half a minute of one core; that of long_run is left out, for it takes minutes.
"""

import argparse
import importlib
import sys
from pathlib import Path

NAMES = ("kills", "faults", "altered_files", "inputs", "long_run")
QUICK = NAMES[:-1]


def main(arguments: list[str] | None = None) -> int:
    """Runs what the command line asks for, and returns the number of campaigns whose promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the short forms")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these campaigns")
    parser.add_argument("--seed", type=int, default=1, help="of all that is drawn (default 1)")
    parser.add_argument("--json", metavar="FOLDER", help="write the figures to FOLDER/reliability_NAME.json")
    args = parser.parse_args(arguments)
    failed = 0
    for name in args.only or (QUICK if args.short else NAMES):
        words = ["--seed", str(args.seed), *(["--short"] if args.short else [])]
        if args.json:
            words += ["--json", str(Path(args.json) / f"reliability_{name}.json")]
        failed += importlib.import_module(name).main(words)
    return failed


if __name__ == "__main__":
    sys.exit(main())
