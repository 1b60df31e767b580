"""Runs `python -m switchyard.checkpoint`, see `store`."""

import sys

from switchyard import cli
from switchyard.checkpoint.store import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
