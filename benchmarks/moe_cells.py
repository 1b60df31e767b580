"""The cells that benchmarks of the layer time: a layer with its losses, its expert products alone, a dense layer."""

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from switchyard.config import build
from switchyard.moe.dispatch.capacity import capacity
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.layer import MoELayer
from switchyard.moe.metrics import BALANCE, Z
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices


class Gradients(nn.Cell):
    """What cell(rows) gives, and the gradients of its sum with respect to the rows and every parameter.

    The output is returned too: otherwise the compiler leaves out the last product of a cell whose gradient can do
    without it, and the floor would be five products of six.
    """

    def __init__(self, cell: nn.Cell):
        super().__init__()
        cell.set_train()
        self.value_and_gradient = ops.value_and_grad(cell, 0, ms.ParameterTuple(cell.trainable_params()))

    def construct(self, rows):
        return self.value_and_gradient(rows)


class Conditional(nn.Cell):
    """The layer's output and its losses, so that the router's gradient is complete."""

    def __init__(self, layer: MoELayer, rows: int):
        super().__init__()
        self.layer = layer
        self.valid = ms.Tensor(np.ones((1, rows), np.float32))
        self.noise = ms.Tensor(np.zeros((1, 1, 1), np.float32))

    def construct(self, rows):
        out, stats, _ = self.layer(rows, self.valid, self.noise)
        means = stats[0, : Z + 1] / self.valid.shape[1]  # balance and z-loss
        return out, means[BALANCE], means[Z]


def our_cell(name: str, rows: int, width: int, experts: int, choices: int):
    """Returns (a contender of ours, the shape of its rows)."""
    moe = {"router": "switch" if choices == 1 else "top_k", "expert_num": experts, "num_experts_chosen": choices}
    if name == "dropless layer":
        moe |= {"dispatch": "dropless"}
    config = build({"model": {"hidden_size": width, "seq_length": rows}, "moe": moe, "data": {"batch_size": 1}})
    if name.endswith("layer"):
        layer = MoELayer(config, (0.02, 0.02), InitialWeights(0), ms.float32, NoiseSlices())
        return Conditional(layer, rows), (1, rows, width)
    if name == "expert matrix products":
        slots = capacity(rows, experts, choices, config.moe.capacity_factor)
        return feed_forward(experts, width, 4 * width), (experts, slots, width)
    return feed_forward(1, width, 4 * width * choices), (1, rows, width)


def feed_forward(count: int, width: int, hidden: int) -> FeedForwardExperts:
    """Returns `count` networks of one hidden layer."""
    return FeedForwardExperts(count, width, hidden, "relu", (0.02, 0.02), InitialWeights(0), ms.float32)
