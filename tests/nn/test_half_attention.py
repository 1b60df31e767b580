"""Attention of operators that are fast on a GPU, or on CPU, held to its plain twin on CPU in float32: values and
gradients."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from switchyard.config import build
from switchyard.nn.fused import fused_operators
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.layers import Attention, causal_mask

BATCH, LENGTH, WIDTH = 2, 6, 32


def attention(fused=frozenset(), **model):
    sizes = {"hidden_size": WIDTH, "num_heads": 4, "seq_length": LENGTH, **model}
    config, window = build({"model": sizes, "moe": {"expert_num": 1}}), model.get("sliding_window")
    mask = causal_mask(LENGTH, window)
    return Attention(config.model, mask, 0.3, InitialWeights(3), ms.float32, fused, window)


class Weighed(nn.Cell):
    """A sum of what attention gives, weighted."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def construct(self, x, weight):
        return (self.cell(x, BATCH) * weight).sum()


@pytest.mark.parametrize(
    ("operator", "kv_heads", "position"),
    [
        *(("HalfAttention", kv_heads, position) for position in ("rotary", "learned") for kv_heads in (1, 2, 4)),
        ("FloatAttention", 2, "rotary"),
    ],
)
def test_attention_equals_the_plain_one_in_values_and_gradients(operator, kv_heads, position, graph):
    plain = attention(n_kv_heads=kv_heads, position=position, init_method_std=0.3)
    half = attention(frozenset({operator}), n_kv_heads=kv_heads, position=position, init_method_std=0.3)
    random = np.random.default_rng(1)
    x, weight = (Tensor(random.standard_normal((BATCH * LENGTH, WIDTH)).astype(np.float32)) for _ in range(2))
    results = []
    for cell in (plain, half):
        weighed = ops.GradOperation(get_all=True, get_by_list=True)(Weighed(cell), cell.trainable_params())
        (d_x, _), d_parameters = weighed(x, weight)
        results.append([part.asnumpy() for part in (cell(x, BATCH), d_x, *d_parameters)])
    for expected, found in zip(*results):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("operator", ["HalfAttention", "FloatAttention"])
def test_it_takes_the_keys_of_attention(operator, pynative):
    """A window, biases, norms, a part of a head that rotates: values and gradients of the plain twin."""
    keys = {"sliding_window": 3, "attention_bias": "all", "qk_norm": "head", "partial_rotary": 0.5, "head_size": 12}
    cells = [attention(fused, n_kv_heads=2, **keys) for fused in (frozenset(), frozenset({operator}))]
    random, results = np.random.default_rng(1), []
    x, weight = (Tensor(random.standard_normal((BATCH * LENGTH, WIDTH)).astype(np.float32)) for _ in range(2))
    for cell in cells:
        cell.qkv.bias.set_data(Tensor(np.linspace(-1, 1, cell.qkv.bias.size, dtype=np.float32)))
        out, gradients = ms.value_and_grad(Weighed(cell), 0, ms.ParameterTuple(cell.trainable_params()))(x, weight)
        results.append([part.asnumpy() for part in (out, cell(x, BATCH), gradients[0], *gradients[1])])
    for expected, found in zip(*results):
        np.testing.assert_allclose(found, expected, atol=5e-5 * np.abs(expected).max())  # gains sum over all rows
    assert np.abs(results[0][1]).max() > 0.1


@pytest.mark.parametrize("operator", ["HalfAttention", "FloatAttention"])
def test_other_lengths_go_the_plain_way(operator):
    half = attention(frozenset({operator}), n_kv_heads=2)
    x = Tensor(np.random.default_rng(1).standard_normal((2 * 4, WIDTH)).astype(np.float32))
    np.testing.assert_array_equal(half(x, 2).asnumpy(), attention(n_kv_heads=2)(x, 2).asnumpy())


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        ({}, set()),
        ({"compute_dtype": "float32"}, {"HalfAttention", "HalfRows", "HalfLogits"}),
        ({"seq_length": 8192}, {"HalfAttention"}),
    ],
)
def test_a_gpu_takes_it_in_float16_where_the_mask_is_small(model, missing):
    sizes = {"hidden_size": 64, "num_heads": 4, "compute_dtype": "float16", **model}
    config = build({"model": sizes, "moe": {"expert_num": 1}})
    everything = {"LayerNorm", "SiLU", "AbsGrad", "CountedOrder", "HalfRows", "HalfLogits", "HalfAttention"}
    assert fused_operators(config, "GPU") == everything - missing


@pytest.mark.parametrize("consistency", [0.0, 0.1])
def test_a_loss_that_reads_logits_twice_reads_them_in_float32(consistency):
    router = {"name": "random", "random_draw": "step", "consistency_loss_factor": consistency}
    model = {"hidden_size": 64, "num_heads": 4, "compute_dtype": "float16"}
    config = build({"model": model, "moe": {"expert_num": 4, "router": router}})
    assert ("HalfLogits" in fused_operators(config, "GPU")) == (consistency == 0)
