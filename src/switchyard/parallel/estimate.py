"""Forwards to `switchyard.planner`, the new name of this command."""

import sys

from switchyard import cli
from switchyard.planner.search import main

if __name__ == "__main__":
    cli.say_moved("switchyard.parallel.estimate", "switchyard.planner")
    sys.exit(cli.run(main))
