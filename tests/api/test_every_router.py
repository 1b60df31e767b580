"""Every shipped router works in the library's layer: a forward pass and gradients, in training and in evaluation."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from oracles.routers import OPTIONS

import switchyard as sw
from switchyard.moe.routing import known_routers

ROWS, WIDTH, VOCABULARY, TASKS = 8, 6, 10, 3


def create(name: str) -> sw.MoELayer:
    """A layer with a router of a name, whose weights are large enough that every gradient is visible."""
    keys = {"expert_num": 4, "init_method_std": 0.7, "intermediate_size": 5, "seed": 1} | OPTIONS.get(name, {})
    options = {"task_num": TASKS} if name in ("task", "multi_gate") else {}
    moe = {key: keys.pop(key) for key in ("second_expert", "random_draw", "n_group", "topk_group") if key in keys}
    router = {"name": name, **options, **moe}
    layer = sw.MoELayer(WIDTH, router=router, vocab_size=VOCABULARY, has_tasks=True, **keys)
    assert layer.config.moe.router == name
    return layer


@pytest.mark.parametrize("name", known_routers())
def test_forward_and_backward(name, pynative):
    layer, random = create(name), np.random.default_rng(0)
    x = Tensor(random.normal(0, 1, (2, ROWS // 2, WIDTH)).astype(np.float32))
    ids = {"token_ids": random.integers(0, VOCABULARY, (2, ROWS // 2)), "task_ids": random.integers(0, TASKS, ROWS)}
    ids = {key: Tensor(value.astype(np.int32)) for key, value in ids.items()}
    parameters = layer.trainable_params()

    def forward(x):
        return (layer(x, **ids) ** 2).sum()

    step = ms.value_and_grad(forward, 0, ms.ParameterTuple(parameters))
    layer.set_train()
    value, (d_x, d_parameters) = step(x)
    found = {one.name: d.asnumpy() for one, d in zip(parameters, d_parameters)} | {"x": d_x.asnumpy()}
    assert value.asnumpy() > 0 and all(np.isfinite(one).all() for one in found.values())
    assert np.abs(found["moe.experts.w_in"]).max() > 0 and np.abs(found["x"]).max() > 0
    of_router = [np.abs(one).max() for key, one in found.items() if ".router." in key]
    assert (max(of_router, default=0) > 0) == known_routers()[name].learnable
    figures = layer.metrics()
    assert figures["tokens"] == ROWS and figures["load"].sum() > 0 and 0 <= figures["dropped"] <= 1
    layer.set_train(False)
    assert layer(x, **ids).shape == x.shape and np.isfinite(layer.losses["total"])
