"""Forwards to `switchyard.simulation.compile`, the new name of this command."""

import sys

from switchyard import cli
from switchyard.simulation.compile import main

if __name__ == "__main__":
    cli.say_moved("switchyard.parallel.simulate", "switchyard.simulation.compile")
    sys.exit(cli.run(main))
