"""Command line: python infer.py --help."""

import sys

from switchyard.cli import run
from switchyard.inference.commands import infer_main

if __name__ == "__main__":
    sys.exit(run(infer_main))
