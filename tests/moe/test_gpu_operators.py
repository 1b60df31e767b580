"""A conditional layer of the operators that are fast on a GPU, held to the one for CPU: values, statistics, gradients.

Both run on CPU, in float32, where every operator exists; half precision is a GPU's.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from switchyard.config import build
from switchyard.distributed.compiled_graph import CONSTANT, compiled_model, read_graph
from switchyard.moe.layer import MoELayer
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

TOKENS, WIDTH = 64, 16
GPU = frozenset({"LayerNorm", "SiLU", "CountedOrder", "HalfRows"})


def layer(fused, router, activation="swiglu", **moe):
    sizes = {"hidden_size": WIDTH, "num_heads": 2, "seq_length": TOKENS, "activation": activation}
    config = build({"model": sizes, "moe": {"expert_num": 4, "router": router, **moe}, "data": {"batch_size": 1}})
    made = MoELayer(config, (0.3, 0.3), InitialWeights(0), ms.float32, NoiseSlices(), fused=fused)
    made.set_train()
    return made


class Weighed(nn.Cell):
    """A sum of the outputs, weighted, and of a statistic that has a gradient."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def construct(self, tokens, weight, valid, noise):
        out, stats, _ = self.made(tokens, valid, noise)
        return (out * weight).sum() + stats[0, 0]


@pytest.mark.parametrize(
    ("router", "options"),
    [("switch", {"capacity_factor": 0.75}), ("top_k", {"num_experts_chosen": 2, "capacity_factor": 0.5})],
)
def test_the_layer_of_a_gpu_equals_the_one_of_a_cpu(router, options, graph):
    random = np.random.default_rng(5)
    tokens, weight = (Tensor(random.standard_normal((TOKENS, WIDTH)).astype(np.float32)) for _ in range(2))
    valid, noise = ops.ones((1, TOKENS)), ops.zeros((1, 1, 1))
    found = []
    for fused in (NONE, GPU):
        made = layer(fused, router, **options)
        out, stats, _ = made(tokens, valid, noise)
        gradients = ops.GradOperation(get_all=True, get_by_list=True)(Weighed(made), made.trainable_params())
        (d_tokens, *_), d_parameters = gradients(tokens, weight, valid, noise)
        found.append([part.asnumpy() for part in (out, stats, d_tokens, *d_parameters)])
    for expected, other in zip(*found):
        np.testing.assert_allclose(other, expected, atol=1e-5 * np.abs(expected).max())


class Gradients(nn.Cell):
    """A layer's output, statistics and gradients."""

    def __init__(self, made):
        super().__init__()
        weights = ms.ParameterTuple(made.trainable_params())
        self.value_and_gradients = ops.value_and_grad(made, 0, weights)

    def construct(self, tokens, valid, noise):
        return self.value_and_gradients(tokens, valid, noise)


class OutputAndStatistics(nn.Cell):
    """A layer without the choices, of which there are none."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def construct(self, tokens, valid, noise):
        out, stats, _ = self.made(tokens, valid, noise)
        return out, stats


# no kernel runs for these
FREE = ("Reshape", "ExpandDims", "Squeeze", "MakeTuple", "TupleGetItem", "Depend", "Load", "UpdateState", CONSTANT)


@pytest.mark.parametrize(("router", "options", "most"), [("switch", {}, 88), ("top_k", {"num_experts_chosen": 2}, 120)])
def test_few_operators_are_issued_forward_and_backward(router, options, most, graph):
    """On a GPU the host takes 25 us to issue an operator, and most of a layer's take the GPU 1 to 3."""
    made = layer(GPU | {"AbsGrad"}, router, activation="relu", **options)
    cell = Gradients(OutputAndStatistics(made))
    cell.compile(ops.ones((TOKENS, WIDTH)), ops.ones((1, TOKENS)), ops.zeros((1, 1, 1)))
    kinds = [node.kind for node in read_graph(compiled_model(cell)).nodes if node.kind not in FREE]
    assert len(kinds) <= most, sorted(kinds)
