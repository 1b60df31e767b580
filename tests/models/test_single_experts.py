"""Experts with weights of their own in a graph: what a loop over rows and choices says."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from switchyard.models import single_experts
from switchyard.models.single_experts import EachExpert, SwitchedExpert
from switchyard.moe.experts import FeedForwardExperts
from switchyard.nn.initializers import InitialWeights

WIDTH, HIDDEN, EXPERTS = 4, 6, 3


def experts_of(activation):
    """Three experts with large weights."""
    random = InitialWeights(1, True)
    return FeedForwardExperts(EXPERTS, WIDTH, HIDDEN, activation, (0.5, 0.5), random, ms.float32)


def by_loop(experts, x, index, gates):
    """Row by row, choice by choice, in float64; expert number 3 is none."""
    weights = [one.asnumpy().astype(np.float64) for one in (experts.w_in, experts.w_out)]
    out = np.zeros_like(x, np.float64)
    for row in range(len(x)):
        for expert, gate in zip(index[row], gates[row]):
            if expert < EXPERTS:
                hidden = x[row] @ weights[0][expert]
                if experts.w_gate is None:
                    hidden = np.maximum(hidden, 0)
                else:
                    bent = x[row] @ experts.w_gate.asnumpy()[expert].astype(np.float64)
                    hidden = bent / (1 + np.exp(-bent)) * hidden
                out[row] += gate * (hidden @ weights[1][expert])
    return out


def rows_of(count, choices):
    """Rows [N, D], their experts [N, K], of which some are none, and gates [N, K]."""
    random = np.random.default_rng(count)
    index = np.stack([random.permutation(EXPERTS + 1)[:choices] for _ in range(count)]).astype(np.int32)
    return random.normal(size=(count, WIDTH)).astype(np.float32), index, random.random((count, choices), np.float32)


@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_each_expert_works_on_the_rows_that_chose_it(activation, pynative):
    """The second of the three experts is chosen by no row; a row of NaN reaches no other row."""
    experts = experts_of(activation)
    x = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    index = np.array([[0, 2], [2, 3], [3, 3], [0, 2]], np.int32)
    gates = np.array([[0.7, 0.3], [0.5, 0.0], [0.0, 0.0], [0.1, 0.9]], np.float32)
    wanted = by_loop(experts, x, index, gates)
    found = EachExpert(experts)(Tensor(x), Tensor(index), Tensor(gates)).asnumpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert not found[2].any()
    x[3] = np.nan
    found = EachExpert(experts)(Tensor(x), Tensor(index), Tensor(gates)).asnumpy()
    np.testing.assert_allclose(found[:3], wanted[:3], atol=1e-6)


@pytest.mark.parametrize(("kind", "count", "choices"), [("each", 5, 2), ("switched", 1, 2), ("switched", 1, 1)])
def test_a_loaded_graph_computes_its_first_shape(kind, count, choices, tmp_path, graph):
    """Again and again, for other choices: experts that no row chose before are chosen then."""
    experts = experts_of("swiglu")
    cell = EachExpert(experts) if kind == "each" else SwitchedExpert(experts, choices)
    shapes = [(None if kind == "each" else 1, WIDTH), *[(None if kind == "each" else 1, choices)] * 2]
    types = (ms.float32, ms.int32, ms.float32)
    inputs = [Tensor(shape=list(shape), dtype=dtype) for shape, dtype in zip(shapes, types)]
    if kind != "each":
        inputs = [Tensor(np.zeros(shape), dtype) for shape, dtype in zip(shapes, types)]
    ms.export(cell.set_train(False), *inputs, file_name=str(tmp_path / "cell"), file_format="MINDIR")
    loaded = nn.GraphCell(ms.load(str(tmp_path / "cell.mindir")))
    x, index, gates = rows_of(count, choices)
    for shift in range(EXPERTS):
        chosen = ((index + shift) % EXPERTS).astype(np.int32)
        found = loaded(Tensor(x), Tensor(chosen), Tensor(gates)).asnumpy()
        np.testing.assert_allclose(found, by_loop(experts, x, chosen, gates), atol=1e-6)


def test_which_experts_are_separate_and_which_are_heavy(monkeypatch):
    """Three experts of 3 * 4 * 6 numbers of 4 bytes: 288 bytes each."""
    experts = experts_of("swiglu")
    assert single_experts.separates(experts) and not single_experts.are_heavy(experts)
    monkeypatch.setattr(single_experts, "HEAVY", 288)
    assert single_experts.are_heavy(experts)
    monkeypatch.setattr(single_experts, "HEAVY", 289)
    assert not single_experts.are_heavy(experts)
    monkeypatch.setattr(single_experts, "MOST", 2)
    assert not single_experts.separates(experts)
