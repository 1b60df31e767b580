"""Forwards to `switchyard.checkpoint`, the new name of this command."""

import sys

from switchyard import cli
from switchyard.checkpoint.store import main

if __name__ == "__main__":
    cli.say_moved("switchyard.training.checkpoint", "switchyard.checkpoint")
    sys.exit(cli.run(main))
