"""Where ranks stand: written by one process, read by another; which rank lags."""

import pytest

from switchyard.distributed.progress import (
    DATA,
    EVALUATE,
    FOLDER,
    STEP,
    WAIT,
    Board,
    Standing,
    clear,
    laggards,
    stall,
    standings,
)


def test_what_a_rank_writes_is_read(tmp_path):
    boards = [Board.of_job(rank, {FOLDER: str(tmp_path)}) for rank in (0, 11)]
    assert standings(tmp_path) == {}  # nothing was said yet
    boards[1].write(Standing(7, STEP, 12.5, 60.0))
    assert standings(tmp_path) == {11: Standing(7, STEP, 12.5, 60.0)}
    boards[1].write(Standing(8, WAIT, 13.5, 60.0))
    boards[0].write(Standing(8, DATA, 14.0, 0.0))
    assert standings(tmp_path) == {0: Standing(8, DATA, 14.0, 0.0), 11: Standing(8, WAIT, 13.5, 60.0)}
    (tmp_path / "progress-00000").write_bytes(b"cut")
    assert list(standings(tmp_path)) == [11]
    clear(tmp_path)
    assert standings(tmp_path) == {} and Board.of_job(0, {}) is None
    assert Board.of_job(0, {FOLDER: str(tmp_path / "missing")}) is None


@pytest.mark.parametrize(
    "places, behind",
    [
        ({0: (7, STEP), 1: (7, STEP)}, []),  # a collective that hangs on all
        ({0: (7, STEP), 1: (7, DATA)}, [1]),
        ({0: (8, DATA), 1: (7, EVALUATE), 2: (8, STEP)}, [1]),
        ({0: (7, DATA), 1: (7, STEP), 2: (7, DATA)}, [0, 2]),
        ({}, []),
    ],
)
def test_the_ranks_that_lag(places, behind):
    assert laggards({rank: Standing(*place, 0.0, 5.0) for rank, place in places.items()}) == behind


def test_a_stall_is_described():
    found = {0: Standing(7, STEP, 100.0, 5.0), 1: Standing(7, DATA, 99.0, 5.0)}
    assert stall(found, now=103.9) is None and stall(found, now=105.0, grace=2.0) is None
    assert stall(found, now=107.0) == (
        "train.stall_seconds: 5; nothing has moved for 8 s: rank 1 lags in reading data after step 7; "
        "the others are in training step after step 7"
    )
    found[1] = Standing(7, STEP, 100.0, 5.0)
    assert stall(found, now=107.0).endswith("for 7 s: all ranks of this machine are in training step after step 7")
    assert stall({0: Standing(7, STEP, 100.0, 0.0)}, now=1e9) is None  # compiles, or nothing is to be watched
