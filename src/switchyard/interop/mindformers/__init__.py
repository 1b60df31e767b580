"""Works with MindFormers: training through its `Trainer`, its YAML files, and its names of what this package has.

Everything that touches MindFormers is in here. MindFormers is an optional package (the extra `mindformers`), and is
imported by `quiet.load` alone, because the import prints, writes a log folder and costs seconds.
"""

from pathlib import Path

VERSION = "1.9.0"  # what was tested; 2.0 and later need packages that pip cannot install
REGISTER_PATH = Path(__file__).parent / "register"  # the environment variable of this name must hold this folder
