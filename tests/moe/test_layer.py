"""The conditional layer against a literal loop over tokens and experts; what training and evaluation promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.capacity_law import slots
from oracles.moe_loop import Rules, moe_loop
from oracles.tiny import layer_gradients, run_both_ways, run_layer, tiny_config, tiny_layer, tiny_rows, weights_of

from switchyard.errors import UserError
from switchyard.moe.dispatch.capacity import check_sort_keys
from switchyard.moe.layer import MoELayer
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

CASES = {
    "k1-switch": {"moe": {"router": "switch"}},
    "k1-switch-drops": {"moe": {"router": "switch", "capacity_factor": 0.6}},
    "k1-switch-drops-by-probability": {
        "moe": {"router": "switch", "capacity_factor": 0.6, "drop_order": "probability"},
        "padded": 2,
    },
    "k1-top_k": {"moe": {"capacity_factor": 0.8}, "activation": "gelu", "padded": 1},
    "k2-gelu": {"moe": {"num_experts_chosen": 2}, "activation": "gelu"},
    "k2-swiglu-drops-shared": {
        "moe": {"num_experts_chosen": 2, "capacity_factor": 0.7, "shared_expert_num": 2},
        "activation": "swiglu",
        "padded": 2,
    },
    "k2-not-renormalised": {"moe": {"num_experts_chosen": 2, "norm_topk_prob": False, "capacity_factor": 0.7}},
    "k2-drops-by-probability": {
        "moe": {"num_experts_chosen": 2, "capacity_factor": 0.7, "drop_order": "probability"},
        "activation": "swiglu",
    },
    "k3-shared": {"moe": {"num_experts_chosen": 3, "shared_expert_num": 1, "capacity_factor": 0.5}, "padded": 3},
    "k3-by-probability-groups": {
        "moe": {"num_experts_chosen": 3, "capacity_factor": 0.6, "drop_order": "probability"},
        "groups": 3,
        "padded": 1,
    },
    "k1-jitter-groups": {"moe": {"router": "switch", "jitter": 0.3, "capacity_factor": 0.8}, "groups": 2},
}
DROPLESS = {
    "k2-swiglu-shared": {
        "moe": {"num_experts_chosen": 2, "shared_expert_num": 1},
        "activation": "swiglu",
        "padded": 2,
        "groups": 2,
    },
    "k3-gelu-blocks-of-2": {"moe": {"num_experts_chosen": 3, "dropless_block_size": 2}, "activation": "gelu"},
    "k1-jitter-single-rows": {"moe": {"router": "switch", "jitter": 0.3, "dropless_block_size": 1}, "padded": 1},
}
SWIGLU = {"moe": {"num_experts_chosen": 2, "shared_expert_num": 1}, "activation": "swiglu", "padded": 2, "groups": 2}


def _rules(config, rows: int, factor: float | None) -> Rules:
    moe = config.moe
    capacity = None if factor is None else slots(rows * moe.num_experts_chosen, moe.expert_num, factor)
    normalise = moe.router.given().get("norm_topk_prob", False) and moe.num_experts_chosen > 1
    return Rules(config.model.activation, moe.num_experts_chosen, normalise, capacity, moe.drop_order)


def _compare(case: dict, train: bool, factor_of):
    """Layer and loop on the same rows: outputs, losses, metrics, every gradient."""
    config = tiny_config(case.get("activation", "relu"), **case["moe"])
    layer = tiny_layer(config, train=train)
    rows, valid = tiny_rows(case.get("groups", 1), 9, padded=case.get("padded", 0))
    random = np.random.default_rng(5)
    noise = random.random((1, rows.shape[0] * 9, rows.shape[2])).astype(np.float32)
    amplitude = config.moe.jitter if train else 0.0
    jitter = (1 - amplitude + 2 * amplitude * noise.astype(np.float64)).reshape(rows.shape)
    upstream = (random.normal(0, 1, rows.shape).astype(np.float32), 0.7, 0.3)

    rules = _rules(config, 9, factor_of(config))
    wanted = moe_loop(rows.astype(np.float64), valid, weights_of(layer), rules, upstream, jitter)
    (out, balance, z, audit), gradients = run_both_ways(layer, rows, valid, *upstream, noise)
    np.testing.assert_allclose(out, wanted.out, atol=1e-5, rtol=1e-5)
    assert (balance, z) == pytest.approx((wanted.balance, wanted.z), abs=1e-5)
    for name, value in wanted.audit.items():
        np.testing.assert_allclose(audit[name], value, atol=1e-5, err_msg=name)
    assert gradients.keys() == wanted.gradients.keys()
    for name, value in wanted.gradients.items():
        np.testing.assert_allclose(gradients[name], value, atol=1e-5, rtol=1e-4, err_msg=name)
    return wanted


@pytest.mark.parametrize("name", CASES)
def test_training_layer_equals_loop(name, pynative):
    wanted = _compare(CASES[name], True, lambda config: config.moe.capacity_factor)
    assert (wanted.audit["dropped"] > 0) == (CASES[name]["moe"].get("capacity_factor", 1.25) < 1)


def test_training_layer_equals_loop_when_compiled(graph):
    case = CASES["k2-swiglu-drops-shared"] | {"groups": 2}
    _compare(case, True, lambda config: config.moe.capacity_factor)


@pytest.mark.parametrize("case", [SWIGLU, {"moe": {"router": "switch", "jitter": 0.3}}], ids=["k2-swiglu", "k1"])
def test_dropless_evaluation_equals_loop(case, pynative):
    assert _compare(case, False, lambda config: None).audit["dropped"] == 0


@pytest.mark.parametrize("name", DROPLESS)
@pytest.mark.parametrize("dispatch", ["dropless", "dropless_static"])
def test_dropless_training_equals_loop(name, dispatch, pynative):
    """A capacity that would drop nearly everything is not asked for."""
    moe = DROPLESS[name]["moe"] | {"dispatch": dispatch, "capacity_factor": 0.01}
    assert _compare(DROPLESS[name] | {"moe": moe}, True, lambda config: None).audit["dropped"] == 0


def test_dropless_training_equals_loop_when_compiled(graph):
    case = DROPLESS["k2-swiglu-shared"]
    _compare(case | {"moe": case["moe"] | {"dispatch": "dropless"}}, True, lambda config: None)


def test_dropless_training_serves_all_rows_at_one_expert(pynative):
    """Rows alike, so all choose alike: the layer equals the loop, and a capacity would have dropped most."""
    config = tiny_config("gelu", router="switch", dispatch="dropless", dropless_block_size=4)
    layer, random = tiny_layer(config), np.random.default_rng(5)
    rows = np.repeat(random.normal(0, 1, (2, 1, 6)), 9, 1).astype(np.float32)
    valid, upstream = np.ones((2, 9), np.float32), random.normal(0, 1, rows.shape).astype(np.float32)
    weights, rules = weights_of(layer), _rules(config, 9, None)
    wanted = moe_loop(rows.astype(np.float64), valid, weights, rules, (upstream, 0.0, 0.0), None)
    assert np.sort(wanted.audit["load"])[-2:].sum() == 18
    (out, *_), gradients = run_both_ways(layer, rows, valid, upstream, 0.0, 0.0)
    np.testing.assert_allclose(out, wanted.out, atol=1e-5)
    for name, value in wanted.gradients.items():
        np.testing.assert_allclose(gradients[name], value, atol=2e-5, rtol=1e-4, err_msg=name)
    tight = moe_loop(rows.astype(np.float64), valid, weights, _rules(config, 9, 1.25), None, None)
    assert tight.audit["dropped"] > 0.5


@pytest.mark.parametrize("router", ["expert_choice", "soft", "tree"])
def test_dropless_dispatch_needs_choices(router):
    with pytest.raises(UserError, match=f"moe.dispatch: dropless; router '{router}' does not choose experts row by"):
        tiny_layer(tiny_config(router=router, dispatch="dropless"))


def test_dropless_dispatch_leaves_nothing_to_reroute():
    with pytest.raises(UserError, match=r"moe\.reroute: 2; must be 0: moe\.dispatch 'dropless_static' drops no choice"):
        tiny_config(router="switch", dispatch="dropless_static", reroute=2)


def test_evaluation_with_capacity_equals_loop(pynative):
    case = {"moe": {"num_experts_chosen": 2, "eval_capacity_factor": 0.5, "capacity_factor": 4.0}}
    assert _compare(case, False, lambda config: 0.5).audit["dropped"] > 0


def test_four_groups_equal_four_layers_of_one(pynative):
    config = tiny_config("swiglu", num_experts_chosen=2, capacity_factor=0.8, shared_expert_num=1)
    layer = tiny_layer(config)
    rows, valid = tiny_rows(4, 6)
    valid[1, -2:] = 0
    d_out = np.random.default_rng(3).normal(0, 1, rows.shape).astype(np.float32)
    (out, balance, z, audit), together = run_both_ways(layer, rows, valid, d_out, 0.4, 0.4)
    apart = [run_layer(layer, rows[g : g + 1], valid[g : g + 1]) for g in range(4)]
    np.testing.assert_allclose(out, np.concatenate([part[0] for part in apart]), atol=1e-6)
    share = valid.sum(1) / valid.sum()  # a group counts by its real rows: 6, 4, 6 and 6
    assert balance == pytest.approx(share @ [part[1] for part in apart], abs=1e-6)
    assert z == pytest.approx(share @ [part[2] for part in apart], abs=1e-6)
    np.testing.assert_array_equal(audit["load"], sum(part[3]["load"] for part in apart))

    parts = [
        layer_gradients(layer, rows[g : g + 1], valid[g : g + 1], d_out[g : g + 1], 0.4 * share[g], 0.4 * share[g])
        for g in range(4)
    ]
    np.testing.assert_allclose(together.pop("rows"), np.concatenate([part.pop("rows") for part in parts]), atol=1e-5)
    for name, value in together.items():
        np.testing.assert_allclose(value, sum(part[name] for part in parts), atol=1e-5, err_msg=name)


@pytest.mark.parametrize("router", ["switch", "top_k"])
def test_single_gate_gets_the_gradient_of_the_task(router, pynative):
    """With K = 1 the task alone moves the router, even where `norm_topk_prob` asks for gates that sum to 1."""
    config = tiny_config(router=router, norm_topk_prob=True)
    layer = tiny_layer(config)
    rows, valid = tiny_rows()
    d_out = np.random.default_rng(3).normal(0, 1, rows.shape).astype(np.float32)
    gradient = layer_gradients(layer, rows, valid, d_out, 0.0, 0.0)["router.weight"]
    wanted = moe_loop(rows.astype(np.float64), valid, weights_of(layer), _rules(config, 9, 1.25), (d_out, 0.0, 0.0))
    assert np.abs(gradient).max() > 0.05
    np.testing.assert_allclose(gradient, wanted.gradients["router.weight"], atol=1e-5)


@pytest.mark.parametrize("block", [1, 8, 32, None])
def test_same_row_same_output_in_any_batch(block, pynative):
    """At evaluation a row's output does not depend on its company, nor on the size of the blocks."""
    layer = tiny_layer(tiny_config(num_experts_chosen=2, dropless_block_size=block), train=False)
    unblocked = tiny_layer(tiny_config(num_experts_chosen=2, dropless_block_size=1), train=False)
    rows, valid = tiny_rows(rows=20)
    out = run_layer(layer, rows, valid)[0]
    np.testing.assert_allclose(out, run_layer(unblocked, rows, valid)[0], atol=1e-6)
    for company in (rows[:, :1], rows[:, [0, 0, 0, 0, 0, 0, 0]], rows[:, ::-1], np.concatenate([rows, rows * 3], 1)):
        company = np.ascontiguousarray(company)
        shared = run_layer(layer, company, np.ones(company.shape[:2], np.float32))[0]
        here = 0 if np.array_equal(company[0, 0], rows[0, 0]) else -1
        np.testing.assert_allclose(shared[0, here], out[0, 0], atol=1e-6)


def test_permuted_rows_give_permuted_outputs(graph):
    """Without drops; and with drops by probability, where the order of the rows does not decide who stays."""
    rows, valid = tiny_rows(rows=20)
    layers = [
        tiny_layer(tiny_config(num_experts_chosen=2, dropless_block_size=4), train=False),
        tiny_layer(tiny_config(num_experts_chosen=2, capacity_factor=0.6, drop_order="probability")),
    ]
    straight = [run_layer(layer, rows, valid) for layer in layers]
    assert [float(out[3]["dropped"]) > 0 for out in straight] == [False, True]

    @given(st.permutations(range(20)))
    @settings(max_examples=15)
    def holds(order):
        for layer, (out, *losses, _) in zip(layers, straight):
            permuted, *other_losses, _ = run_layer(layer, rows[:, order], valid)
            np.testing.assert_allclose(permuted, out[:, order], atol=1e-6)
            assert other_losses == pytest.approx(losses, abs=1e-6)

    holds()


def test_dropless_blocks_equal_a_slot_for_everyone(pynative):
    """Capacity C = N drops nothing either: the same outputs, with E times the work."""
    blocks = tiny_layer(tiny_config("gelu", num_experts_chosen=2), train=False)
    slots = tiny_layer(tiny_config("gelu", num_experts_chosen=2, eval_capacity_factor=4.0), train=False)
    rows, valid = tiny_rows(2, 20, padded=3)
    np.testing.assert_allclose(run_layer(blocks, rows, valid)[0], run_layer(slots, rows, valid)[0], atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("order", ["position", "probability"])
def test_padding_changes_nothing_for_real_rows(train, order, pynative):
    """Rows, losses and audit are those of the batch without padding, wherever the padding stands."""
    config = tiny_config(num_experts_chosen=2, capacity_factor=100.0, drop_order=order, shared_expert_num=1)
    layer = tiny_layer(config, train=train)
    rows, valid = tiny_rows(rows=8)
    alone = run_layer(layer, rows, valid)
    padded = np.full((1, 12, 6), 50.0, np.float32)
    real = np.array([1, 2, 4, 5, 7, 8, 10, 11])
    padded[:, real] = rows
    flags = np.zeros((1, 12), np.float32)
    flags[:, real] = 1
    mixed = run_layer(layer, padded, flags)
    np.testing.assert_allclose(mixed[0][:, real], alone[0], atol=1e-6)
    assert mixed[1:3] == pytest.approx(alone[1:3], abs=1e-6)
    for name, value in alone[3].items():
        np.testing.assert_allclose(mixed[3][name], value, atol=1e-5, err_msg=name)


def test_padding_takes_no_slot_and_comes_back_as_zero(pynative):
    """Padding in front does not push real rows out of a full expert."""
    layer = tiny_layer(tiny_config(router="switch", expert_num=2, capacity_factor=1.0))
    row = tiny_rows(rows=1)[0]
    rows = np.repeat(row, 6, 1)  # all to one expert, three slots
    valid = np.array([[0, 0, 1, 1, 1, 0]], np.float32)
    out, _, _, audit = run_layer(layer, rows, valid)
    assert np.abs(out[0, 2:5]).min(axis=-1).max() > 0
    np.testing.assert_array_equal(out[0, [0, 1, 5]], 0)
    assert (sorted(audit["load"]), float(audit["dropped"])) == ([0, 3], 0.0)


def test_batch_of_padding_alone_is_finite(pynative):
    for train in (True, False):
        out, balance, z, audit = run_layer(tiny_layer(tiny_config(), train=train), *tiny_rows(rows=4, padded=4))
        assert np.all(out == 0) and (balance, z) == (0, 0)
        assert all(np.isfinite(value).all() for value in audit.values()) and audit["dropped"] == 0


def test_row_without_a_slot_comes_back_as_zero(pynative):
    layer = tiny_layer(tiny_config(router="switch", expert_num=2, capacity_factor=0.5))
    rows = np.repeat(tiny_rows(rows=1)[0], 4, 1)  # four rows to one expert of one slot
    out, _, _, audit = run_layer(layer, rows, np.ones((1, 4), np.float32))
    assert np.abs(out[0, 0]).max() > 0
    np.testing.assert_array_equal(out[0, 1:], 0)
    assert (audit["dropped"], audit["max_violation"]) == (0.75, 1.0)


def test_jitter_is_drawn_anew_and_off_at_evaluation(pynative):
    layer = tiny_layer(tiny_config(router="switch", jitter=0.9, capacity_factor=4.0))
    rows, valid = tiny_rows(rows=64)
    noise = np.random.default_rng(0).random((2, 1, 64, 6)).astype(np.float32)
    first, again, other = (run_layer(layer, rows, valid, n)[3]["load"] for n in (noise[0], noise[0], noise[1]))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    layer.set_train(False)
    np.testing.assert_array_equal(
        run_layer(layer, rows, valid, noise[0])[0], run_layer(layer, rows, valid, noise[1])[0]
    )


def test_jitter_of_one_half_is_no_jitter(pynative):
    """Factors are U(1 - jitter, 1 + jitter): noise of exactly 1/2 gives the factor 1."""
    jittered, plain = (tiny_layer(tiny_config(router="switch", jitter=jitter)) for jitter in (0.5, 0.0))
    rows, valid = tiny_rows()
    half = np.full((1, 9, 6), 0.5, np.float32)
    np.testing.assert_array_equal(run_layer(jittered, rows, valid, half)[0], run_layer(plain, rows, valid)[0])


def test_router_is_float32_whatever_the_experts_compute_in(pynative):
    config = tiny_config("gelu", num_experts_chosen=2)
    rows, valid = tiny_rows()
    full, half = (run_layer(tiny_layer(config, dtype=dtype), rows, valid) for dtype in (mstype.float32, mstype.float16))
    assert 1e-6 < np.abs(full[0] - half[0]).max() < 1e-2  # the experts did compute in float16
    assert full[1:3] == half[1:3]
    for name, value in full[3].items():
        np.testing.assert_array_equal(half[3][name], value)


def test_half_precision_gradients_are_near(pynative):
    """Parameters and their gradients stay float32 where the products are float16."""
    config = tiny_config("swiglu", num_experts_chosen=2)
    rows, valid = tiny_rows()
    d_out = np.random.default_rng(3).normal(0, 1, rows.shape).astype(np.float32)
    full, half = (
        layer_gradients(tiny_layer(config, dtype=dtype), rows, valid, d_out, 0.1, 0.1)
        for dtype in (mstype.float32, mstype.float16)
    )
    for name, value in full.items():
        assert half[name].dtype == np.float32
        np.testing.assert_allclose(half[name], value, atol=5e-3 * np.abs(value).max(), err_msg=name)


def test_shared_experts_serve_every_row(pynative):
    """A row without a slot still gets the shared experts' output, added without a gate."""
    rows, valid = tiny_rows()
    with_shared = tiny_layer(tiny_config(shared_expert_num=2))
    without = tiny_layer(tiny_config())
    assert with_shared.shared.w_in.shape == (1, 6, 2 * 5)
    for name, parameter in without.parameters_and_names():
        parameter.set_data(dict(with_shared.parameters_and_names())[name])
    shared = with_shared.shared(Tensor(rows)).asnumpy()
    np.testing.assert_allclose(
        run_layer(with_shared, rows, valid)[0], run_layer(without, rows, valid)[0] + shared, atol=1e-6
    )


def test_noise_slices_are_given_only_to_who_reads_them():
    slices = NoiseSlices()
    random = InitialWeights(0)
    for jitter, count in ((0.0, 0), (0.1, 1), (0.1, 2)):
        layer = MoELayer(tiny_config(jitter=jitter), (0.1, 0.1), random, mstype.float32, slices)
        assert (slices.count, int(layer.slice.index)) == (count, max(count - 1, 0))


def test_sort_keys_beyond_int32_are_refused():
    config = tiny_config(expert_num=64)
    check_sort_keys(config)
    large = config.model_copy(update={"data": config.data.model_copy(update={"batch_size": 2**24})})
    with pytest.raises(UserError, match=r"data\.batch_size: 16777216; .* must be below 2147483648"):
        check_sort_keys(large)
