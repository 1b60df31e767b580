"""Command line: python export.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # this folder's own code, installed or not

from switchyard.cli import run
from switchyard.commands import export_main

if __name__ == "__main__":
    sys.exit(run(export_main))
