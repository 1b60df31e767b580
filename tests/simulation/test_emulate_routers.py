"""Every router that a compiled cluster runs, on two emulated devices that share the experts, against one device.

One of them is an ordinary test; all of them, each way that choices travel, are marked `long`.
"""

import pytest

from switchyard.config import build
from switchyard.moe.routing.base import known_routers
from switchyard.simulation import emulate
from switchyard.training.limits import UNSHARDED_ROUTERS

VOCABULARY = 32
MODEL = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_length": 8, "intermediate_size": 16}
TWO = {"num_experts_chosen": 2}
ROUTERS = {
    "switch": {},
    "top_k": TWO,
    "gshard": TWO,
    "noisy_top_k": TWO | {"record": "choices.safetensors"},
    "sigmoid": TWO,
    "sinkhorn": {},
    "base": {},
    "cosine": TWO,
    "prototype": TWO,
    "two_level": TWO | {"n_group": 2},
    "hash": {},
    "lsh": {},
    "random": {},
    "dense": {},
    "mixture_of_depths": {"expert_num": 1, "expert_parallel": 1, "capacity_factor": 0.5},
    "copies of sigmoid": TWO | {"router": "sigmoid", "copies": 2},
    "windows of switch": {
        "router": "switch",
        "granularity": "slice",
        "slice_length": 4,
        "jitter": 0.01,
        "shared_expert_num": 1,
    },
}
NOT_OF_TEXT = ("expert_choice", "multi_gate", "random_in_group", "task")  # not causal, or choose by task
WAYS = ("capacity", "dropless", "dropless_static")
DROPS_BY_ITSELF = ("dense", "mixture_of_depths")  # whose rows do not choose experts
CALLED = ("windows of switch",)  # dropless dispatch reads the experts' matrices
TESTED = ("noisy_top_k", "capacity")
ALL = tuple(
    pytest.param(name, way, marks=() if (name, way) == TESTED else pytest.mark.long)
    for name in ROUTERS
    for way in WAYS
    if way == "capacity" or name not in DROPS_BY_ITSELF + CALLED
)


def config_of(name: str, dispatch: str):
    """A decoder of a dense and a conditional layer on two devices."""
    moe = {"router": name, "expert_num": 4, "layers": [1], "dispatch": dispatch} | ROUTERS[name]
    experts = moe.pop("expert_parallel", 2)
    return build(
        {
            "model": MODEL | {"init_method_std": 0.2},
            "moe": moe,
            "data": {"batch_size": 4},
            "train": {"eval_every": 0},
            "parallel": {"data_parallel": 2, "expert_parallel": experts},
        }
    )


def test_no_router_is_forgotten():
    assert {*ROUTERS, *NOT_OF_TEXT, *UNSHARDED_ROUTERS} >= known_routers().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name, dispatch", ALL)
def test_two_devices_equal_one(workers, name, dispatch):
    """Losses, gradients and weights of three steps; a capacity drops, and every expert's weights move."""
    found = emulate.prove(config_of(name, dispatch), 2, vocab=VOCABULARY)
    print(name, dispatch, f"{found.largest:.1e}", f"{max(found.gradients.values()):.1e}")
    assert found.equal, emulate.render(found)
    assert found.strayed == 0  # loads are equal, and choices where they are recorded
    assert len({one for one, _ in found.losses}) == 3
    experts = "layers.1.feed_forward.experts.network" if name in CALLED else "layers.1.feed_forward.experts"
    assert found.differences[f"{experts}.w_in"][1] > 100 * emulate.TOLERANCE
