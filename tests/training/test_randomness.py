"""The noise of a step: a function of its place, the same under every layout, independent from sequence to sequence."""

import numpy as np
import pytest

from switchyard.training.randomness import NOISE_RULE, draw_noise
from switchyard.training.resume import say_noise


def test_noise_is_a_function_of_seed_step_and_micro_batch():
    noise = draw_noise(7, 3, 2, 2, range(3), 5, 4)
    assert noise.shape == (2, 2, 15, 4) and noise.dtype == np.float32
    assert noise.min() >= 0 and noise.max() < 1
    np.testing.assert_array_equal(noise, draw_noise(7, 3, 2, 2, range(3), 5, 4))
    np.testing.assert_array_equal(noise[:1], draw_noise(7, 3, 1, 2, range(3), 5, 4))
    assert (noise[0] != noise[1]).all() and (noise != draw_noise(7, 4, 2, 2, range(3), 5, 4)).all()
    assert (noise != draw_noise(8, 3, 2, 2, range(3), 5, 4)).all()
    assert draw_noise(7, 3, 2, 0, range(3), 5, 4).shape == (2, 1, 1, 1)


@pytest.mark.parametrize("devices", [2, 3, 6])
def test_devices_that_draw_their_own_sequences_have_the_noise_of_one_device(devices):
    whole, own = draw_noise(1, 9, 2, 3, range(12), 5, 4), 12 // devices
    parts = [draw_noise(1, 9, 2, 3, range(rank * own, rank * own + own), 5, 4) for rank in range(devices)]
    np.testing.assert_array_equal(np.concatenate(parts, 2), whole)


def test_sequences_are_uniform_and_do_not_resemble_each_other():
    """Neighbours in sequence, micro-batch, step and seed; a correlation of 10,000 numbers has the deviation 0.01."""
    drawn = [draw_noise(seed, step, 2, 1, range(3), 100, 100) for seed in (1, 2) for step in (0, 1)]
    streams = np.concatenate([part.reshape(6, -1) for part in drawn]).astype(np.float64)  # [24, 10,000]
    distance = np.abs(np.corrcoef(streams) - np.eye(len(streams)))
    assert distance.max() < 0.05
    np.testing.assert_allclose(streams.mean(1), 0.5, atol=0.015)
    np.testing.assert_allclose(streams.var(1), 1 / 12, atol=0.005)
    beginnings = draw_noise(3, 0, 1, 1, range(4096), 1, 3)[0, 0].astype(np.float64)  # [4,096, 3], the first of each
    assert np.abs(np.corrcoef(beginnings.T) - np.eye(3)).max() < 0.08
    counts = np.histogram(beginnings, bins=16, range=(0, 1))[0]
    np.testing.assert_allclose(counts, 4096 * 3 / 16, rtol=0.2)


def test_a_checkpoint_of_another_rule_is_announced_in_one_line(capsys):
    say_noise({"noise_rule": NOISE_RULE})
    say_noise({})
    assert capsys.readouterr().out == ""
    say_noise({"noise_rule": "dice"})
    assert capsys.readouterr().out.count("\n") == 1
