"""Forwards to `switchyard.moe.routing`, the new name of this command."""

import sys

from switchyard import cli
from switchyard.moe.routing.__main__ import main

if __name__ == "__main__":
    cli.say_moved("switchyard.routing", "switchyard.moe.routing")
    sys.exit(cli.run(main))
