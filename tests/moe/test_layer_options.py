"""Options of the layer against plain sums: gated shared experts, copies, forced balance, rerouting, priorities."""

import numpy as np
import pytest
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.tiny import NO_NOISE, layer_gradients, run_layer, tiny_config, tiny_layer, tiny_rows, weights_of

from switchyard.errors import UserError
from switchyard.moe.layer import MoELayer, RoundRobinRouting
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices


def _layer(train=True, **moe):
    """A layer without the sharp router of tiny_layer, for routers of other shapes."""
    layer = MoELayer(tiny_config(**moe), (0.7, 0.7), InitialWeights(0), mstype.float32, NoiseSlices())
    return layer.set_train(train)


def _work(x, weights, expert):
    """One row through one ReLU expert."""
    return np.maximum(x @ weights["experts.w_in"][expert], 0) @ weights["experts.w_out"][expert]


def test_gate_of_the_shared_experts(pynative):
    rows, valid = tiny_rows()
    gated, plain = (
        tiny_layer(tiny_config(shared_expert_num=1, use_shared_expert_gating=True)),
        tiny_layer(tiny_config()),
    )
    for name, parameter in plain.parameters_and_names():
        parameter.set_data(dict(gated.parameters_and_names())[name])
    weights = weights_of(gated)
    gate = 1 / (1 + np.exp(-rows @ weights["shared.gate"][0]))  # [1, N, 1]
    shared = np.maximum(rows @ weights["shared.w_in"][0], 0) @ weights["shared.w_out"][0]
    out = run_layer(gated, rows, valid)[0]
    np.testing.assert_allclose(out, run_layer(plain, rows, valid)[0] + gate * shared, atol=1e-5)
    assert 0.05 < gate.min() < gate.max() < 0.95
    gradient = layer_gradients(gated, rows, valid, np.ones_like(rows), 0.0, 0.0)["shared.gate"]
    wanted = (rows * (gate * (1 - gate) * shared.sum(-1, keepdims=True))).sum((0, 1))
    np.testing.assert_allclose(gradient[0, :, 0], wanted, atol=1e-4)


def test_gate_without_shared_experts():
    with pytest.raises(UserError, match=r"^moe\.use_shared_expert_gating: True; needs moe\.shared_expert_num"):
        tiny_config(use_shared_expert_gating=True)


def test_round_robin(pynative):
    """Choice k of row n is expert n * K + k modulo E; with two copies, of its own half."""
    valid = Tensor(np.ones((2, 3), np.float32))
    plain = RoundRobinRouting(tiny_config(num_experts_chosen=2).moe)(valid).asnumpy()
    np.testing.assert_array_equal(plain, [[[0, 1], [2, 3], [0, 1]]] * 2)
    copies = RoundRobinRouting(tiny_config(copies=2).moe)(valid).asnumpy()
    np.testing.assert_array_equal(copies, [[[0, 2], [1, 3], [0, 2]]] * 2)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("keys", [{"router": "switch"}, {"num_experts_chosen": 2}, {"copies": 2}])
def test_forced_balance_with_live_gates(keys, train, pynative):
    """Every expert has the same load whatever the router wants; the gates are the router's for those experts."""
    rows, valid = tiny_rows(rows=8)
    layer = _layer(train, force_balance=True, norm_topk_prob=False, **keys)
    out, _, _, audit = run_layer(layer, rows, valid)
    np.testing.assert_array_equal(audit["load"], audit["load"].mean())
    assert audit["dropped"] == 0 and np.abs(out).min(-1).max() > 0
    gradients = layer_gradients(layer, rows, valid, np.ones_like(rows), 0.0, 0.0)
    assert all(np.abs(value).max() > 1e-3 for name, value in gradients.items() if name.startswith("router"))


def test_forced_balance_by_hand(pynative):
    rows, valid = tiny_rows(rows=4)
    layer = tiny_layer(tiny_config(router="switch", force_balance=True))
    weights = weights_of(layer)
    logits = rows[0] @ weights["router.weight"]
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    wanted = [p[n, n] * _work(rows[0, n], weights, n) for n in range(4)]
    np.testing.assert_allclose(run_layer(layer, rows, valid)[0][0], wanted, atol=1e-5)


@pytest.mark.parametrize("router", ["expert_choice", "dense"])
@pytest.mark.parametrize("keys", [{"force_balance": True}, {"copies": 2}])
def test_rows_must_choose(router, keys):
    with pytest.raises(
        UserError, match=r"^moe\.(force_balance: True|copies: 2); router '.*' does not choose experts row by"
    ):
        _layer(router=router, **keys)


@pytest.mark.parametrize("train", [True, False])
def test_copies_are_two_layers(train, pynative):
    """Each half of the experts gets every row and routes it by itself; the outputs are summed."""
    rows, valid = tiny_rows(2, 7, padded=2)
    layer = _layer(train, copies=2, capacity_factor=4.0)
    assert layer.choices == 2
    weights = weights_of(layer)
    out, balance, _, audit = run_layer(layer, rows, valid)
    wanted, load, mass = np.zeros_like(rows), np.zeros(4), np.zeros(4)
    for g, n in np.argwhere(valid > 0):
        for copy in range(2):
            logits = rows[g, n] @ weights[f"router.routers.{copy}.weight"]
            p = np.exp(logits) / np.exp(logits).sum()
            expert = 2 * copy + p.argmax()
            wanted[g, n] += p.max() * _work(rows[g, n], weights, expert)
            load[expert] += 1
            mass[2 * copy : 2 * copy + 2] += p / 2
    np.testing.assert_allclose(out, wanted, atol=1e-5)
    np.testing.assert_array_equal(audit["load"], load)
    np.testing.assert_allclose(audit["importance"], mass, atol=1e-5)
    assert audit["dropped"] == 0 and balance > 0.9


def test_copies_compile_and_learn(graph):
    rows, valid = tiny_rows()
    layer = _layer(copies=2, router="noisy_top_k", capacity_factor=1.0, losses={"load": 0.1})
    noise = np.random.default_rng(0).random((2, 9, 6)).astype(np.float32)
    gradients = layer_gradients(layer, rows, valid, np.ones_like(rows), 0.1, 0.1, noise)
    assert sum(name.startswith("router") for name in gradients) == 4
    assert all(np.isfinite(value).all() and np.abs(value).max() > 0 for value in gradients.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"copies": 3}, r"^moe\.copies: 3; must divide moe\.expert_num \(4\)"),
        ({"copies": 2, "num_experts_chosen": 3}, r"^moe\.num_experts_chosen: 3; at most moe\.expert_num / moe\.copies"),
    ],
)
def test_copies_that_cannot_be(keys, message):
    with pytest.raises(UserError, match=message):
        tiny_config(**keys)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_reroute_in_the_layer(mode, request):
    """Three alike rows, one slot each: with two rounds each gets an expert, weighted by that expert's probability."""
    request.getfixturevalue(mode)
    rows, valid = np.repeat(tiny_rows(rows=1)[0], 3, 1), np.ones((1, 3), np.float32)
    dropping, moving = (
        tiny_layer(tiny_config(router="switch", capacity_factor=1.0, reroute=rounds)) for rounds in (0, 2)
    )
    weights = weights_of(moving)
    logits = rows[0, 0] @ weights["router.weight"]
    p = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-p)
    out, _, _, audit = run_layer(moving, rows, valid)
    wanted = [p[best[n]] * _work(rows[0, 0], weights, best[n]) for n in range(3)]
    np.testing.assert_allclose(out[0], wanted, atol=1e-5)
    assert (audit["dropped"], audit["load"].max()) == (0, 3)  # the load is that of the choices, as routed
    assert run_layer(dropping, rows, valid)[3]["dropped"] == pytest.approx(2 / 3)
    d_rows = layer_gradients(moving, rows, valid, np.ones_like(rows), 0.0, 0.0)
    assert np.abs(d_rows["router.weight"]).max() > 1e-3


def test_priorities_are_drawn_in_training_only(pynative):
    layer = tiny_layer(tiny_config(router="switch", expert_num=2, capacity_factor=0.5, drop_order="random"))
    assert layer.priority is not None
    rows, valid = np.repeat(tiny_rows(rows=1)[0], 4, 1), np.ones((1, 4), np.float32)
    noise = np.zeros((1, 4, 6), np.float32)
    noise[0, :, 0] = [0.8, 0.7, 0.1, 0.9]
    out = run_layer(layer, rows, valid, noise)[0]
    np.testing.assert_array_equal(np.abs(out[0]).max(-1) > 0, [False, False, True, False])
    dropping = tiny_config(router="switch", expert_num=2, eval_capacity_factor=0.5, drop_order="random")
    out = run_layer(tiny_layer(dropping, train=False), rows, valid, NO_NOISE)[0]
    np.testing.assert_array_equal(np.abs(out[0]).max(-1) > 0, [True, False, False, False])
