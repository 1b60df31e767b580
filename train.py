"""Command line: python train.py --help."""

import sys

from switchyard.cli import run, train_main

if __name__ == "__main__":
    sys.exit(run(train_main))
