"""Runs `python -m switchyard.interop.huggingface`, see `command`."""

import sys

from switchyard import cli
from switchyard.interop.huggingface.command import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
