"""Choices that are recorded and forced, of every micro-batch of a step."""

import numpy as np
from oracles.tiny_run import run_config, token_batch, write_text
from safetensors.numpy import load_file

from switchyard.models import create_model
from switchyard.training.loop import train
from switchyard.training.randomness import draw_noise
from switchyard.training.step import TrainStep

TWICE = {"gradient_accumulation_steps": 2}
TOP_2 = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2}


def step_of(seed: int) -> TrainStep:
    """A step that records, whose router has weights of its own."""
    config = run_config(train=TWICE | {"seed": seed}, moe=TOP_2 | {"record": "a", "replay": "b"})
    return TrainStep(create_model(config, 17), config)


def test_each_micro_batch_gets_its_own_choices(pynative):
    """Recorded by one router and forced upon another, but for the last rows of the second micro-batch."""
    noise, batches = draw_noise(1, 0, 2, 0, range(4), 16, 16), token_batch(2, 4, 16)
    nothing = np.full((2, 1, 64, 2), -1, np.int32)  # [A, M, N, K]
    recorded = step_of(1)(*batches, noise, 0.0, nothing)["choices"]
    other = step_of(2)
    own = other(*batches, noise, 0.0, nothing)["choices"]
    assert recorded.shape == nothing.shape
    assert (recorded[0] != recorded[1]).any() and all((one != two).any() for one, two in zip(recorded, own))
    forced = recorded.copy()
    forced[1, :, 40:] = -1
    found = other(*batches, noise, 0.0, forced)
    wanted = np.where(forced < 0, own, recorded)
    np.testing.assert_array_equal(found["choices"], wanted)
    np.testing.assert_array_equal(found["routers"]["load"][0], np.bincount(wanted.reshape(-1), minlength=4))


def test_a_run_takes_the_choices_of_another_run(tmp_path, pynative):
    """Two steps of two micro-batches, replayed by a run of another router that records what it does."""
    write_text(tmp_path)
    first, second = (str(tmp_path / f"{name}.safetensors") for name in ("first", "second"))
    keys = {"context": {"mode": "pynative"}}
    train(run_config(tmp_path, moe=TOP_2 | {"record": first}, train=TWICE | {"steps": 2}, **keys))
    cosine = {"router": "cosine", "replay": first, "record": second}
    train(run_config(tmp_path, moe=TOP_2 | cosine, train=TWICE | {"steps": 2, "name": "again"}, **keys))
    one, two = load_file(first), load_file(second)
    assert one["experts"].shape == (2, 2, 1, 64, 2)  # steps, A, M, N, K
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array, err_msg=name)
