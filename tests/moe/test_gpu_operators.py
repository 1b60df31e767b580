"""A conditional layer of the operators that are fast on a GPU, held to the one for CPU: values, statistics, gradients.

Both run on CPU, in float32, where every operator exists; half precision is a GPU's.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from switchyard.config import build
from switchyard.moe.layer import MoELayer
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

TOKENS, WIDTH = 64, 16
GPU = frozenset({"LayerNorm", "SiLU", "CountedOrder", "HalfRows"})


def layer(fused, router, **moe):
    sizes = {"hidden_size": WIDTH, "num_heads": 2, "seq_length": TOKENS, "activation": "swiglu"}
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
