"""Fused operators of Ascend and their composed twins: where each is taken, shapes, values in NumPy and on CPU.

No device executes the fused ones here. `simulation.interpreter_fused` does in NumPy what their documentation says, and
is itself held to the documentation's examples.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from oracles import fused_probe
from oracles.fused_probe import BATCH, EPS, TWINS, Mix, Norm, arguments

from switchyard.config import build
from switchyard.inference.export import inference_config
from switchyard.nn.activation import SwiGLU
from switchyard.nn.fused import fused_operators
from switchyard.simulation.compile import compile_ranks
from switchyard.simulation.interpreter import run_cluster
from switchyard.simulation.interpreter_ops import OPERATORS

MODEL = {"hidden_size": 64, "num_heads": 4, "n_kv_heads": 2, "seq_length": 8, "compute_dtype": "float16"}
CONFIG = build({"model": MODEL})
PROBE = f"{fused_probe.__name__}:probe"


@pytest.mark.parametrize(
    ("model", "context", "target", "missing"),
    [
        ({}, {}, "Ascend", set()),
        ({"compute_dtype": "float32"}, {}, "Ascend", {"FlashAttentionScore"}),
        ({"num_heads": 8}, {}, "Ascend", {"FlashAttentionScore"}),  # 8 columns
        ({}, {"fused_operators": False}, "Ascend", None),
        ({"type": "vision"}, {}, "Ascend", None),
    ],
)
def test_what_is_fused_follows_device_type_and_head_size(model, context, target, missing):
    tree = {"model": MODEL | model, "context": context, "moe": {"expert_num": 1}}
    everything = {"RmsNorm", "Swiglu", "FlashAttentionScore", "MoeTokenPermute"}
    assert fused_operators(build(tree), target) == (set() if missing is None else everything - missing)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        ({"compute_dtype": "float32"}, {"NormGradient", "FloatAttention"}),
        ({}, {"NormGradient"}),
        ({"type": "vision"}, set()),
    ],
)
def test_a_cpu_takes_gradients_written_for_it(model, found):
    config = build({"model": MODEL | model, "moe": {"expert_num": 1}})
    assert fused_operators(config, "CPU") == found
    assert not fused_operators(inference_config(config), "CPU")  # exported graphs are of plain operators


# ---- what stands in for the operators, against the examples of MindSpore 2.9's documentation
def test_stand_ins_give_the_documented_examples():
    y, scale = OPERATORS["RmsNorm"](None, np.array([[1, 2, 3], [1, 2, 3]], np.float32), np.ones(3, np.float32), 1e-6)
    np.testing.assert_allclose(y, [[0.46290997, 0.92581993, 1.3887299]] * 2, rtol=1e-6)
    np.testing.assert_allclose(scale, [[0.46290997]] * 2, rtol=1e-6)
    halves = np.array([[-0.12, 0.123, 31.122], [2.1223, 4.1212121217, 0.3123]], np.float32)
    out = OPERATORS["Swiglu"](None, halves, 0)
    np.testing.assert_allclose(out, [[-0.11970687, 0.2690224, 9.7194]], rtol=1e-5)
    tokens, index = np.array([1, 7, 2, 1, 2, 3])[:, None].repeat(3, 1), np.array([5, 0, 3, 1, 2, 4])
    rows, place = OPERATORS["MoeTokenPermute"](None, tokens, index, None, False)
    assert rows[:, 0].tolist() == [7, 1, 2, 2, 3, 1] and place.tolist() == [5, 0, 3, 1, 2, 4]


# ---- the composed twins as other devices run them
def test_the_composed_twins_do_what_the_operators_document(graph):
    """On CPU in float32; attention with two key/value heads of two queries each."""
    given = {name: [part.astype(np.float32) for part in parts] for name, parts in arguments(CONFIG).items()}
    x, gain, _ = given["RmsNorm"]
    norm = Norm(MODEL["hidden_size"], False)(Tensor(x), Tensor(gain))
    np.testing.assert_allclose(norm.asnumpy(), OPERATORS["RmsNorm"](None, x, gain, EPS)[0], atol=1e-5)
    gate, hidden, _ = given["Swiglu"]
    wanted = OPERATORS["Swiglu"](None, np.concatenate([gate, hidden], -1), -1)
    np.testing.assert_allclose(SwiGLU()(Tensor(gate), Tensor(hidden)).asnumpy(), wanted, atol=1e-5)
    mix = Mix(CONFIG, False, ms.float32)
    mix.attention.rotary = None
    qkv = given["FlashAttentionScore"][0]
    np.testing.assert_allclose(mix(Tensor(qkv)).asnumpy(), attention_by_loops(qkv), atol=1e-5)


def attention_by_loops(qkv):
    """FlashAttentionScore by its documentation, one query at a time: BNSD, scale 1 / sqrt(h), 1 in the mask hides."""
    heads, size, length = MODEL["num_heads"], 16, MODEL["seq_length"]
    qkv = qkv.reshape(BATCH, length, MODEL["n_kv_heads"], 4, size).transpose(0, 2, 3, 1, 4)  # [B, J, R + 2, S, h]
    query = qkv[:, :, :2].reshape(BATCH, heads, length, size)
    key, value = qkv[:, :, 2], qkv[:, :, 3]
    mask = np.triu(np.ones((length, length), np.uint8), 1)
    rest = (None, None, None, mask, None, None, None, heads, 1.0, size**-0.5, 2**31 - 1, 0, 0, "BNSD", 0)
    *_, fused = OPERATORS["FlashAttentionScore"](None, query, key, value, *rest)
    out = np.zeros((BATCH, length, heads, size), np.float32)
    for b, n, s in np.ndindex(BATCH, heads, length):
        scores = np.array([query[b, n, s] @ key[b, n // 2, t] / 4 for t in range(s + 1)])  # keys up to the query
        weights = np.exp(scores) / np.exp(scores).sum()
        out[b, s, n] = weights @ value[b, n // 2, : s + 1]
    np.testing.assert_allclose(fused, out.transpose(0, 2, 1, 3), atol=1e-5)
    return out.reshape(BATCH * length, -1)


# ---- both in one graph for Ascend
@pytest.fixture(scope="module")
def report():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend("tests")
        patch.setenv("PYTHONPATH", str(fused_probe.__file__).rsplit("/oracles/", 1)[0])
        return compile_ranks(CONFIG, 1, [0], 32, step=PROBE)[0]


@pytest.mark.slow
def test_twins_have_the_same_shapes_types_values_and_gradients(report):
    """In the graph that is compiled for Ascend, executed in NumPy."""
    for name in TWINS:
        assert report.operators[name] == report.operators[f"{name}Grad"] == 1
    given = [part for parts in arguments(CONFIG).values() for part in parts]
    ((found,),), _ = run_cluster([report.graph], [given], [dict.fromkeys(report.parameters, np.float32(0))])
    composed, fused = found[: len(found) // 2], found[len(found) // 2 :]
    wanted = [each.shape for parts in arguments(CONFIG).values() for each in (parts[-1], *parts[:-1])]
    assert [part.shape for part in composed] == [part.shape for part in fused] == wanted
    for one, two in zip(composed, fused):
        assert one.dtype == two.dtype and np.abs(one).max() > 0.1
        np.testing.assert_allclose(two, one, atol=1e-5 if one.dtype == np.float32 else 6e-3)


# ---- what stands in for the operators of a GPU, against MindSpore's kernels on CPU
def test_stand_ins_for_the_operators_of_a_gpu_give_what_the_kernels_give(pynative):
    random = np.random.default_rng(4)
    x, d_out = (random.normal(0, 2, (6, 5)).astype(np.float32) for _ in range(2))
    gain, bias = (random.normal(1, 0.3, 5).astype(np.float32) for _ in range(2))
    tensors = [Tensor(part) for part in (x, gain, bias)]

    def weighed(*parts):
        return (ops.LayerNorm(1, 1, EPS)(*parts)[0] * Tensor(d_out)).sum()

    y, mean, variance = OPERATORS["LayerNorm"](None, x, gain, bias, 1, 1, EPS)
    np.testing.assert_allclose(y, ops.LayerNorm(1, 1, EPS)(*tensors)[0].asnumpy(), atol=1e-5)
    found = OPERATORS["LayerNormGrad"](None, x, d_out, variance, mean, gain, 1, 1)
    for mine, kernel in zip(found, ops.grad(weighed, (0, 1, 2))(*tensors)):
        np.testing.assert_allclose(mine, kernel.asnumpy(), atol=1e-5)
    np.testing.assert_allclose(OPERATORS["SiLU"](None, x), ops.silu(tensors[0]).asnumpy(), atol=1e-6)
    slope = ops.grad(lambda x: (ops.silu(x) * Tensor(d_out)).sum())(tensors[0]).asnumpy()
    np.testing.assert_allclose(OPERATORS["SiLUGrad"](None, d_out, x), slope, atol=1e-5)
    np.testing.assert_array_equal(OPERATORS["BiasAdd"](None, x, bias, "NCHW"), x + bias)
    index = np.array([2, 0, 7])
    np.testing.assert_array_equal(OPERATORS["OneHot"](None, index, 3, 1.0, 0.0, 0), [[0, 1, 0], [0, 0, 0], [1, 0, 0]])
