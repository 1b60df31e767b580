"""`python -m switchyard.moe.routing`: one aligned line for every router, and nothing else on stdout."""

import subprocess
import sys

from switchyard.moe.routing import known_routers
from switchyard.moe.routing.__main__ import HEADINGS, listing, rows


def test_every_router_has_a_whole_line():
    found = list(rows())
    assert [row[0] for row in found] == list(known_routers())
    for row in found:
        assert len(row) == len(HEADINGS) and all(row)
        assert row[1] in ("row", "token", "task", "group")
        assert "arXiv" in row[-1] or "KDD" in row[-1], row[0]


def test_columns_are_aligned():
    heading, *lines = listing().split("\n\n")[0].splitlines()
    starts = [heading.index(name) for name in HEADINGS]
    for line in lines:
        assert all(line[start - 2 : start] == "  " and line[start] != " " for start in starts[1:]), line


def test_command_prints_the_table_alone():
    done = subprocess.run([sys.executable, "-m", "switchyard.moe.routing"], capture_output=True, text=True, check=True)
    assert done.stdout == listing() + "\n"


def test_command_refuses_what_it_does_not_know():
    done = subprocess.run([sys.executable, "-m", "switchyard.moe.routing", "--all"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: unrecognized arguments: --all")
