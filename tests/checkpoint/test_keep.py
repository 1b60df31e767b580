"""Rules by which checkpoints are kept for good: by number and by time."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles.tiny_run import run_config

from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.keep import kept_for_good


def _paths(*steps: int) -> list[Path]:
    return [Path(checkpoint.name_of(step)) for step in steps]


def _kept(paths, steps: int, hours: float, times=()) -> list[int]:
    of = dict(zip(paths, times))
    return sorted(checkpoint.step_of(path) for path in kept_for_good(paths, steps, hours, of.get))


@pytest.mark.parametrize(
    "every_steps, every_hours, times, kept",
    [
        (0, 0, (0, 1, 2, 3), []),
        (200, 0, (0, 1, 2, 3), [200, 400]),
        (0, 2, (0, 1, 2, 3), [100, 300]),  # the oldest, then the first that is 2 h later
        (0, 2, (0, 1, 1.5, 3.9), [100, 400]),
        (300, 2, (0, 1, 2, 3), [100, 300]),
        (0, 0.5, (0, None, 2, 3), [100, 300, 400]),  # one without a manifest has no time
    ],
)
def test_what_is_kept(every_steps, every_hours, times, kept):
    times = [None if hours is None else 3600 * hours for hours in times]
    assert _kept(_paths(100, 200, 300, 400), every_steps, every_hours, times) == kept


@given(st.lists(st.floats(0, 1e6), max_size=30), st.floats(0.01, 50))
def test_removing_what_is_not_kept_changes_no_later_choice(gaps, hours):
    """The rule is asked after each save; what it has let go must not have been needed."""
    held, time, times = [], 0.0, {}
    for step, gap in enumerate(gaps):
        time += gap
        path = Path(checkpoint.name_of(step))
        times[path] = time
        held = sorted(kept_for_good([*held, path], 0, hours, times.get))
    assert set(held) == kept_for_good(sorted(times), 0, hours, times.get)


def test_a_run_keeps_every_third_step_besides_the_newest(tmp_path):
    config = run_config(train={"keep_checkpoints": 1, "keep_every_steps": 3})
    for step in range(1, 9):
        weights = {"w": np.zeros(2, np.float32)}
        checkpoint.save(tmp_path, config, "{}", weights, {}, {"step": step, "data_index": step})
    assert [checkpoint.step_of(path) for path in checkpoint.listed(tmp_path)] == [3, 6, 8]
