"""Command line: python export.py --help."""

import sys

from switchyard.cli import run
from switchyard.inference.commands import export_main

if __name__ == "__main__":
    sys.exit(run(export_main))
