"""Forwards to `switchyard.simulation.emulate`, the new name of this command."""

import sys

from switchyard import cli
from switchyard.simulation.emulate import main

if __name__ == "__main__":
    cli.say_moved("switchyard.parallel.virtual", "switchyard.simulation.emulate")
    sys.exit(cli.run(main))
