"""Runs `python -m switchyard.planner`, see `search`."""

import sys

from switchyard import cli
from switchyard.planner.search import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
