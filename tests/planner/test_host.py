"""What the planner says of the host, against the inputs that a run makes."""

import numpy as np
import pytest

from switchyard.config import build
from switchyard.models import create_model
from switchyard.planner.costs import costs
from switchyard.planner.host import host_costs, noise_slices
from switchyard.planner.own_layout import render_own
from switchyard.training.randomness import draw_noise

MODEL = {"num_layers": 2, "hidden_size": 8, "num_heads": 2, "seq_length": 4, "intermediate_size": 16}
MOE = {"expert_num": 4, "layers": 2}
SIZES = {"model": MODEL, "data": {"batch_size": 4}}
NOISE = {
    "none": ({}, MOE | {"jitter": 0.0}),
    "dropout": ({"dropout": 0.1}, MOE),
    "jitter and random priority": ({}, MOE | {"jitter": 0.1, "drop_order": "random"}),
    "noisy_top_k, 12 experts in rows of 8": ({}, MOE | {"router": "noisy_top_k", "expert_num": 12}),
    "gshard": ({}, MOE | {"router": {"name": "gshard", "second_expert": "sampling"}, "num_experts_chosen": 2}),
    "random in two passes": (
        {"dropout": 0.1},
        MOE | {"router": {"name": "random", "random_draw": "step", "consistency_loss_factor": 1.0}},
    ),
    "two copies of noisy_top_k": ({"dropout": 0.1}, MOE | {"router": "noisy_top_k", "copies": 2}),
}


@pytest.mark.parametrize("name", NOISE)
def test_the_slices_of_noise_are_those_of_the_model(name):
    model, moe = NOISE[name]
    config = build(SIZES | {"model": MODEL | model, "moe": moe})
    assert noise_slices(config) == create_model(config, 16).noise_slices


def test_bytes_are_those_of_the_arrays_that_a_process_makes():
    """2 micro-batches, 4 sequences on 2 data shards: a process has 2 sequences of 4 tokens."""
    train = {"gradient_accumulation_steps": 2}
    config = build(
        {"model": MODEL | {"dropout": 0.1}, "moe": MOE | {"router_warmup_steps": 3}, "data": {"batch_size": 4}}
        | {"train": train, "parallel": {"data_parallel": 2}}
    )
    found, tokens = host_costs(config), np.zeros((2, 2, 4), np.int32)
    noise = draw_noise(1, 0, 2, noise_slices(config), range(2), 4, 8)
    assert (found.batch, found.noise) == (3 * tokens.nbytes, noise.nbytes)
    assert found.choices == np.zeros((2, 1, 8, 1), np.int32).nbytes  # [A, M, N, K]
    assert found.total == found.batch + found.noise + found.choices
    assert found.seconds(2.0) == noise.nbytes / 2


def test_the_planner_shows_host_beside_device():
    quiet = build(SIZES | {"moe": MOE | {"jitter": 0.0}})
    loud = build(SIZES | {"model": MODEL | {"num_layers": 200, "dropout": 0.1, "hidden_size": 512}, "moe": MOE})
    lines = render_own(quiet, costs(quiet, 16), 0.0)
    assert any(line.startswith("noise of a step  ") and line.endswith(" -") for line in lines)
    assert not any("drawing" in line for line in lines)
    takes = f"takes {host_costs(loud).seconds():.2f} s on one core"
    assert any(takes in line for line in render_own(loud, costs(loud, 16), 0.0))
