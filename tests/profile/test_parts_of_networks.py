"""The parts of every kind of network: their names, and that each is given what the network itself gives it."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from switchyard.config import build
from switchyard.profile.inputs import inputs_of
from switchyard.profile.measure import PARTS, measure
from switchyard.training.step import create_step

TINY = {"hidden_size": 16, "num_heads": 2, "seq_length": 8, "num_layers": 2}
DIGITS = {"image_size": 8, "channels": 1}
STACK = ("embedding", "norm", "attention", "feed-forward")
LAYER = ("router", "dispatch", "experts", "combine")
COMMON = {"gradient norm", "optimizer"}
TREES = {
    "decoder": {"model": TINY, "moe": {"expert_num": 2, "layers": [1]}},
    "windows": {"model": TINY, "moe": {"expert_num": 2, "layers": [1], "granularity": "slice", "slice_length": 4}},
    "seq2seq": {"model": TINY | {"type": "seq2seq"}, "moe": {"expert_num": 2, "layers": 2}},
    "regions": {
        "model": {"type": "vision", "hidden_size": 8, "num_layers": 3},
        "moe": {"expert_num": 2, "granularity": "region", "layers": [1]},
        "vision": DIGITS | {"regions": 2, "pool": 2},
    },
    "tasks": {
        "model": {"type": "vision", "hidden_size": 8, "num_layers": 2},
        "moe": {"expert_num": 2, "router": {"name": "task", "task_num": 2}, "granularity": "task", "layers": [1]},
        "vision": DIGITS | {"tasks": ["identity", "parity"]},
    },
    "cascade": {"model": {"type": "cascade"}, "cascade": {"stages": [4, 8]}, "vision": DIGITS},
}
NAMES = {
    "windows": {"embedding", "norm", "attention", "positions", "dense feed-forward", *LAYER, "head and loss"},
    "seq2seq": {
        *("cross-attention", "head and loss"),
        *(f"{stack} {part}" for stack in ("encoder", "decoder") for part in (*STACK, *LAYER)),
    },
    "regions": {
        *("norm", "layer 0 convolutions", "layer 1 view", "pooling", "layer 2 convolutions", "head and loss"),
        *(f"layer 1 {part}" for part in LAYER),
    },
    "cascade": {"stage 0 convolutions", "exit 0", "stage 1 convolutions", "exit 1", "loss"},
}


def parts(name: str):
    """Returns (step, its micro-batch, its parts by name)."""
    config = build(TREES[name] | {"data": {"batch_size": 4}})
    step, (batch, _) = create_step(config, 256 + 2 + 100), inputs_of(config, 256 + 2 + 100)
    step.initialise()
    return step, batch(step), {part.name: part for part in PARTS[config.model.type](step, batch(step))}


@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_a_network_has_a_name(name, pynative):
    assert parts(name)[2].keys() == NAMES[name] | COMMON


@pytest.mark.parametrize("name", TREES)
def test_a_part_is_given_what_the_network_gives_it(name, pynative):
    """Shapes and types of the arguments of every cell that is both a part and a cell of the network."""
    step, batch, found = parts(name)
    cells, seen = {id(cell) for _, cell in step.model.cells_and_names()}, []
    own = [part for part in found.values() if id(part.cell) in cells]
    for part in own:
        part.cell.register_forward_pre_hook(lambda cell, arguments: seen.append((id(cell), kinds(arguments))))
    tokens, _, valid, noise = map(Tensor, batch)
    step.model(tokens, valid, noise)
    assert [part.name for part in own if (id(part.cell), kinds(part.inputs)) not in seen] == [] and len(own) > 2


def kinds(arguments: tuple) -> list:
    """Returns shape and type of each tensor."""
    return [(one.shape, one.dtype) for one in arguments if isinstance(one, Tensor)]


@pytest.mark.parametrize("name", ["windows", "tasks"])
def test_the_layer_that_is_taken_apart_computes_what_the_network_computes(name, pynative):
    """The parts of a conditional layer, one after another, make what the layer makes of the same arguments."""
    found = parts(name)[2]
    prefix = "" if name == "windows" else "layer 1 "
    layer, sending = found[f"{prefix}dispatch"].cell.layer, found[f"{prefix}dispatch"]
    tokens, valid, noise, *rest = sending.inputs
    ids, tasks, view = (
        None if at is None else rest[at] for at in (sending.cell.ids, sending.cell.tasks, sending.cell.view)
    )
    whole = layer(tokens, valid, noise, ids, tasks, None, view)[0]
    combine = found[f"{prefix}combine"]
    np.testing.assert_array_equal(combine.cell(*combine.inputs).asnumpy(), whole.asnumpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seq2seq", "regions", "cascade"])
def test_every_kind_of_network_is_measured(name, pynative):
    rows, step = measure(build(TREES[name] | {"data": {"batch_size": 4}}), 256 + 2 + 100, rounds=1)
    assert {row.name for row in rows} == NAMES[name] | COMMON | {"data"} and step > 0
    assert ms.get_context("mode") == ms.PYNATIVE_MODE
