"""Shipped configurations of large models: what they hold of a device, and that the compiler takes them."""

from pathlib import Path

import pytest

from switchyard.config import load
from switchyard.planner.costs import costs
from switchyard.simulation.compile import compile_step
from switchyard.training.limits import require_trainable

FOLDER = Path(__file__).parents[2] / "config"
DEVICE = 64e9  # bytes of memory
LARGE = {  # name -> (entries of the vocabulary, largest share of a device's memory)
    "mixtral_8x7b_ascend_64": (32000, 0.75),
    "deepseek_v3_like_ascend_256": (129280, 1.0),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_layout_fits_a_device(name):
    config, (vocab, share) = load(FOLDER / f"{name}.yaml"), LARGE[name]
    require_trainable(config)
    assert 0 < costs(config, vocab).memory <= share * DEVICE


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_the_compiler_takes_the_step_of_the_last_rank(name):
    config, (vocab, _) = load(FOLDER / f"{name}.yaml"), LARGE[name]
    report = compile_step(config, config.devices, config.devices - 1, vocab)
    cost = costs(config, vocab)
    assert report.held_bytes["weights"] == cost.weights and report.held_bytes["optimizer state"] == cost.optimizer
    assert report.count("AlltoAllV") and report.count("ReduceScatter")
