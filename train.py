"""Command line: python train.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "src"))  # this folder's own code, installed or not

from switchyard.cli import run
from switchyard.commands import train_main

if __name__ == "__main__":
    sys.exit(run(train_main))
