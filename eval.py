"""Command line: python eval.py --help."""

import sys

from switchyard.cli import eval_main, run

if __name__ == "__main__":
    sys.exit(run(eval_main))
