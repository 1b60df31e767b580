"""What a mask hides reaches nobody: NaN and Inf in padded rows, in one real row, and in rows that found no slot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.tiny import layer_gradients, run_both_ways, run_layer, tiny_config, tiny_layer, tiny_rows

from switchyard.moe.layer import MoELayer
from switchyard.moe.routing import known_routers
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

KEYS = {
    "two_level": {"n_group": 2, "topk_group": 2},
    "mixture_of_depths": {"expert_num": 1, "capacity_factor": 0.5},
    "expert_choice": {"capacity_factor": 1.0},
    "soft": {"slots_per_expert": 2},
}
SINGLE = ("switch", "base", "lsh", "tree")  # one choice a row
ROUTERS = [name for name, router in known_routers().items() if not router.needs]
ORDERS = ("position", "token", "probability", "batch_priority", "random")
BAD = (np.nan, np.inf, -np.inf)


def _layer(router, train=True, **moe):
    choices = {} if router in (*SINGLE, "mixture_of_depths") else {"num_experts_chosen": 2}
    config = tiny_config(router=router, **KEYS.get(router, {}), **choices, **moe)
    if known_routers()[router].learnable:
        return tiny_layer(config, train=train)
    return MoELayer(config, (0.7, 0.7), InitialWeights(0), mstype.float32, NoiseSlices()).set_train(train)


def _noise(rows):
    return np.random.default_rng(7).random((4, rows.shape[0] * rows.shape[1], rows.shape[2])).astype(np.float32)


def _all(layer, rows, valid, d_out):
    """Everything that a step makes of a batch: outputs, losses, figures, gradients."""
    noise = _noise(rows)
    (out, balance, z, audit), gradients = run_both_ways(layer, rows, valid, d_out, 0.5, 0.5, noise)
    return {"out": out, "balance": balance, "z_loss": z, **audit, **gradients}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("train", [True, False])
def test_what_padding_holds_reaches_nothing(router, train, pynative):
    """Outputs, losses, figures and gradients are bit for bit those of padding that holds zeros."""
    rows, valid = tiny_rows(2, 9, padded=3)
    d_out = np.random.default_rng(3).normal(0, 1, rows.shape).astype(np.float32)
    rows[:, -3:] = 0
    wanted = _all(_layer(router, train, shared_expert_num=1), rows, valid, d_out)
    rows[0, -3:], rows[1, -3:] = np.array(BAD)[:, None], 1e30
    got = _all(_layer(router, train, shared_expert_num=1), rows, valid, d_out)
    assert (got["out"][:, -3:] == 0).all() and (got["rows"][:, -3:] == 0).all()
    for name, value in wanted.items():
        assert np.isfinite(value).all(), name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


@pytest.mark.parametrize(
    "router", ["top_k", "expert_choice", "mixture_of_depths", "merged", "soft", "base", "sinkhorn"]
)
def test_the_same_real_rows_give_the_same_wherever_padding_stands(router, pynative):
    """Outputs, losses and figures in training; token choice has room for all, so that no row is dropped."""
    room = {} if router in KEYS else {"capacity_factor": 4.0}
    layer = _layer(router, **room)
    rows = tiny_rows(1, 6)[0]
    noise = np.zeros((4, 16, 6), np.float32)
    wanted = run_layer(layer, rows, np.ones((1, 6), np.float32), noise[:, :6])

    @given(st.integers(6, 12).flatmap(lambda size: st.permutations(range(size))))
    @settings(max_examples=8, deadline=None)
    def holds(order):
        places = np.sort(order[:6])
        mixed, valid = np.full((1, len(order), 6), np.nan, np.float32), np.zeros((1, len(order)), np.float32)
        mixed[0, places], valid[0, places] = rows[0], 1
        out, *losses, audit = run_layer(layer, mixed, valid, noise[:, : len(order)])
        np.testing.assert_allclose(out[0, places], wanted[0][0], atol=2e-6)
        assert losses == pytest.approx(wanted[1:3], abs=1e-5)
        for name, value in wanted[3].items():
            np.testing.assert_allclose(audit[name], value, atol=1e-5, err_msg=name)

    holds()


INDEPENDENT = [name for name in ROUTERS if known_routers()[name].batch_independent]


@pytest.mark.parametrize("router", INDEPENDENT)
@pytest.mark.parametrize("bad", BAD[:2])
def test_one_bad_row_leaves_the_others_as_they_are(router, bad, pynative):
    """At evaluation nothing is dropped: the other rows' outputs are what they were.

    Bit for bit but for the kernels' rounding, which depends on the place of a row in a block.
    """
    layer = _layer(router, train=False)
    rows, valid = tiny_rows(1, 9)
    good = run_layer(layer, rows, valid)[0]
    rows[0, 4] = bad
    got = run_layer(layer, rows, valid)[0]
    others = np.arange(9) != 4
    np.testing.assert_allclose(got[0, others], good[0, others], atol=2e-6)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("choices", [1, 2])
def test_rows_that_a_full_expert_drops_do_not_see_its_bad_row(order, choices, pynative):
    """Rows alike but for one that is NaN in what the experts read: all ask the same experts, of which most are full."""
    moe = {"router": "switch"} if choices == 1 else {"num_experts_chosen": 2}
    layer = tiny_layer(tiny_config(expert_num=2, capacity_factor=0.5, drop_order=order, **moe))
    rows, valid = np.repeat(tiny_rows(rows=1)[0], 8, 1), np.ones((1, 8), np.float32)
    noise = _noise(rows)
    good = run_layer(layer, rows, valid, noise)
    assert good[3]["dropped"] > 0
    rows[0, 0] = np.nan
    out, _, _, _ = run_layer(layer, rows, valid, noise)
    assert np.isfinite(out[0, 1:]).all() and (out[0, 1:] == 0).any()
    served = (out[0, 1:] != 0).any(-1)
    if choices == 1:  # with two a row may keep the one or the other
        np.testing.assert_allclose(out[0, 1:][served], good[0][good[0].any(-1)][:1].repeat(served.sum(), 0), atol=1e-6)


@pytest.mark.parametrize("order", ORDERS)
def test_gradient_of_experts_that_did_not_serve_the_bad_row(order, pynative):
    """The bad row sits at one expert; empty slots and dropped rows bring nothing of it to the others' weights."""
    layer = tiny_layer(tiny_config(router="switch", expert_num=4, capacity_factor=2.0, drop_order=order))
    rows, valid = tiny_rows(1, 9)
    noise = _noise(rows)
    d_out = np.random.default_rng(3).normal(0, 1, rows.shape).astype(np.float32)
    good = layer_gradients(layer, rows, valid, d_out, 0.0, 0.0, noise)
    rows[0, 0] = np.inf
    bad = layer_gradients(layer, rows, valid, d_out, 0.0, 0.0, noise)
    assert np.isfinite(bad["rows"][0, 1:]).all()
    spoilt = [~np.isfinite(bad["experts.w_in"][expert]).all() for expert in range(4)]
    assert sum(spoilt) <= 1
    np.testing.assert_allclose(bad["rows"][0, 1:], good["rows"][0, 1:], atol=1e-6)


def test_an_unfilled_slot_of_expert_choice_holds_nobody(pynative):
    """Two real rows in a list of six; a row that no expert takes and that holds NaN stays out of everything."""
    layer = tiny_layer(tiny_config(router="expert_choice", expert_num=2, capacity_factor=0.5, eval_capacity_factor=0.5))
    rows, valid = tiny_rows(1, 6)
    rows[0, 5] = np.nan
    d_out = np.ones_like(rows)
    out = run_layer(layer, rows, valid)[0]
    assert np.isfinite(out).all() and (out[0, 5] == 0).all()
    gradients = layer_gradients(layer, rows, valid, d_out, 0.0, 0.0)
    assert np.isfinite(gradients["experts.w_in"]).all() and np.isfinite(gradients["rows"][0, :5]).all()


@pytest.mark.parametrize("router", ["sinkhorn", "base"])
def test_a_bad_row_sets_no_price_in_training(router, pynative):
    """Both match rows and experts in training: a row of NaN is left out of the matching."""
    layer = _layer(router)
    rows, valid = tiny_rows(1, 9)
    rows[0, 4] = np.nan
    padded = valid.copy()
    padded[0, 4] = 0
    context = {"noise": Tensor(_noise(rows)), "token_ids": None, "task_ids": None}
    with_nan = layer.router(Tensor(rows), {**context, "valid": Tensor(valid)})["expert_index"].asnumpy()
    without = layer.router(Tensor(np.nan_to_num(rows)), {**context, "valid": Tensor(padded)})["expert_index"].asnumpy()
    others = np.arange(9) != 4
    np.testing.assert_array_equal(with_nan[0, others], without[0, others])
