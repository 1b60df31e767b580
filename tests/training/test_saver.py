"""Checkpoints in the background: whole or absent, one in flight, errors by rule; on one rank and on two."""

import errno
import threading

import numpy as np
import pytest
from oracles.tiny_run import run_config

from switchyard.checkpoint import store
from switchyard.checkpoint.health import Healthy
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import Processes
from switchyard.errors import UserError
from switchyard.file_errors import FileError
from switchyard.training import saver as savers
from switchyard.training.saver import IDLE, WRITING, Content, Saver


def _content(step: int, value: float = 1.0) -> Content:
    weights = {"norm.gain": np.full(4, value, np.float32)}
    return Content("{}", weights, {"moment1.norm.gain": np.zeros(4, np.float32)}, {"step": step, "data_index": step})


def _saver(run, warn=lambda step, line: None, **train) -> Saver:
    return Saver(run, run_config(train={"async_checkpoint": True, "keep_checkpoints": 9} | train), Healthy(), warn=warn)


def _steps(run) -> list[int]:
    return [store.step_of(path) for path in store.listed(run)]


class _Gate:
    """Holds the writing of shards until it is opened."""

    def __init__(self, monkeypatch):
        self.opened, self.inside, original = threading.Event(), threading.Event(), store.save_shard

        def save_shard(*arguments, **options):
            self.inside.set()
            assert self.opened.wait(20)
            original(*arguments, **options)

        monkeypatch.setattr(store, "save_shard", save_shard)


def test_the_training_goes_on_while_a_copy_is_written(tmp_path, monkeypatch):
    gate, saver, content = _Gate(monkeypatch), _saver(tmp_path), _content(1)
    saver.save(content)
    assert gate.inside.wait(20) and saver.state == WRITING and _steps(tmp_path) == []
    content.weights["norm.gain"][:] = 7  # the next step
    saver.collect(np.array([saver.state]))  # waits for nothing
    gate.opened.set()
    saver.wait()
    assert saver.state == IDLE and saver.lost is None
    np.testing.assert_array_equal(store.read(tmp_path).weights["norm.gain"], np.ones(4, np.float32))


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    gate, saver = _Gate(monkeypatch), _saver(tmp_path)
    saver.save(_content(1))
    threading.Timer(0.3, gate.opened.set).start()
    saver.save(_content(2, 2.0))
    assert _steps(tmp_path)[0] == 1
    saver.wait()
    assert _steps(tmp_path) == [1, 2] and store.read(tmp_path).weights["norm.gain"][0] == 2


def _full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("part", ["begin", "save_shard", "finish"])
def test_a_full_disk_ends_the_run_or_is_told(tmp_path, monkeypatch, part, background):
    """By train.on_save_error; afterwards a checkpoint can be written again, and the last one must be."""
    stop = _saver(tmp_path, on_save_error="stop", async_checkpoint=background)
    told = []
    goes_on = _saver(
        tmp_path, lambda step, line: told.append((step, line)), on_save_error="continue", async_checkpoint=background
    )
    with monkeypatch.context() as patch:
        patch.setattr(store, part, _full)
        with pytest.raises(OSError, match="No space left"):
            stop.save(_content(1))
            stop.wait()
        goes_on.save(_content(2))
        goes_on.wait()
        assert goes_on.lost == 2 and told == [(2, "a file without a name: No space left on device; free some space, or write to another disk")]  # noqa: E501  # fmt: skip
        with pytest.raises(OSError, match="No space left"):
            goes_on.save(_content(2), must=True)
    assert _steps(tmp_path) == [] and not list(tmp_path.rglob(".tmp-*"))
    goes_on.save(_content(3))
    goes_on.wait()
    assert goes_on.lost is None and _steps(tmp_path) == [3]


def test_what_is_not_finite_ends_the_run_whatever_the_rule(tmp_path):
    saver = _saver(tmp_path, on_save_error="continue")
    saver.save(_content(1, np.nan))
    with pytest.raises(UserError, match=r"checkpoint of step 1: 'norm.gain' holds numbers that are not finite"):
        saver.wait()
    assert _steps(tmp_path) == []


def test_an_error_of_the_training_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    gate = _Gate(monkeypatch)
    with pytest.raises(ZeroDivisionError), _saver(tmp_path) as saver:
        saver.save(_content(1))
        threading.Timer(0.3, gate.opened.set).start()
        1 / 0  # noqa: B018
    assert _steps(tmp_path) == [1]


class _Rank(Processes):
    """One of two ranks that are threads of this test, and meet at a barrier."""

    def gather(self, array):
        BOARD[self.rank] = array
        BARRIER.wait(20)
        found = np.stack(list(BOARD))
        BARRIER.wait(20)
        return found


BOARD, BARRIER = [None, None], threading.Barrier(2)


def _on_two_ranks(work) -> list:
    """Calls work(rank) on both; returns what each returned or raised."""
    found = [None, None]

    def call(rank):
        try:
            found[rank] = work(rank)
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=call, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def _of_two(run, rank: int, **train) -> Saver:
    train = {"async_checkpoint": True, "keep_checkpoints": 9} | train
    config = run_config(parallel={"data_parallel": 2}, moe={"groups": 2}, train=train)
    return Saver(run, config, Healthy(), _Rank(rank, 2, ParallelDims(data_parallel=2)))


@pytest.mark.parametrize("background", [True, False])
def test_two_ranks_write_one_checkpoint(tmp_path, background):
    def work(rank):
        saver = _of_two(tmp_path, rank, async_checkpoint=background)
        saver.save(_content(1))
        saver.wait()
        return saver.lost

    assert _on_two_ranks(work) == [None, None] and _steps(tmp_path) == [1]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("rule", ["stop", "continue"])
def test_a_rank_whose_disk_fails_is_known_to_all(tmp_path, monkeypatch, rule, bad, background):
    original = store.save_shard

    def save_shard(run, config, step, rank, *rest, **options):
        return _full() if rank == bad else original(run, config, step, rank, *rest, **options)

    monkeypatch.setattr(store, "save_shard", save_shard)

    def work(rank):
        saver = _of_two(tmp_path, rank, on_save_error=rule, async_checkpoint=background)
        saver.save(_content(5))
        saver.wait()
        return saver.lost

    found = _on_two_ranks(work)
    if rule == "continue":
        assert found == [5, 5]
    else:
        assert isinstance(found[bad], OSError) and isinstance(found[1 - bad], FileError)
        assert str(found[1 - bad]) == f"checkpoint of step 5: {store.ELSEWHERE}"
    assert _steps(tmp_path) == []


def test_a_shard_that_never_comes_is_named(tmp_path, monkeypatch):
    original = store.save_shard
    monkeypatch.setattr(
        store, "save_shard", lambda run, config, step, rank, *rest: rank or original(run, config, step, rank, *rest)
    )

    def work(rank):
        saver = _of_two(tmp_path, rank, checkpoint_wait_seconds=0.2)
        saver.save(_content(5))
        saver.wait()

    found = _on_two_ranks(work)
    assert "missing shards of ranks 1" in str(found[0]) and savers.kind_of(found[0]) == savers.OTHER
    assert isinstance(found[1], UserError)
