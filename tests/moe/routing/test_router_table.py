"""`python -m switchyard.moe.routing`: one aligned line for every router, and nothing else on stdout."""

import subprocess
import sys

from switchyard.moe.routing import known_routers
from switchyard.moe.routing.__main__ import HEADINGS, listing, rows
from switchyard.report import support


def test_every_router_has_a_whole_line():
    found = list(rows())
    assert [row[0] for row in found] == list(known_routers())
    for row in found:
        assert len(row) == len(HEADINGS) and all(row)
        assert row[1] in ("row", "token", "task", "group")
        assert "arXiv" in row[-1] or "KDD" in row[-1], row[0]


def test_the_column_sharded_says_what_training_does():
    """The same answer as of `training.limits`, asked with a network of each router; one router has no network."""
    column = HEADINGS.index("sharded")
    table, asked = {row[0]: row[column] for row in rows()}, {}
    for row in support.rows("Ascend"):
        if "capacity" in row.dispatches:
            asked |= dict.fromkeys(row.routers, row.answers[0])
    assert set(table) - set(asked) == {"random_in_group"}
    assert {name: table[name] for name in asked} == asked
    assert set(asked.values()) == {support.COMPILED, support.EXPLICIT}


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
