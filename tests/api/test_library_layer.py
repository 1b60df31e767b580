"""The layer of the library: the arithmetic of the core, losses attached or returned, figures on the host."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

import switchyard as sw
from switchyard.moe.metrics import loss_metrics, metrics

KEYS = {"router": "top_k", "num_experts_chosen": 2, "init_method_std": 0.5, "intermediate_size": 5, "seed": 3}
FACTORS = {"aux_loss_factor": 0.3, "z_loss_factor": 0.2, "losses": {"importance": 0.1}}


def create(**keys) -> sw.MoELayer:
    """A layer of width 6 with 4 experts, and a router that is sharp."""
    layer = sw.MoELayer(6, 4, **KEYS | keys)
    weight = layer.moe.router.weight
    weight.set_data(Tensor(np.random.default_rng(1).normal(0, 0.8, weight.shape).astype(np.float32)))
    return layer


def rows_of(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(2).normal(0, 1, shape).astype(np.float32))


def test_rows_and_sequences_give_what_the_core_gives(pynative):
    """By one group: [B, S, D] is [B * S, D]; the core is asked with the same noise and padding."""
    layer, x = create(jitter=0.1).set_train(), rows_of(3, 4, 6)
    valid = np.ones((3, 4), np.float32)
    valid[1, 2:] = 0
    noise = ops.rand(layer.noise_slices, 12, 6)
    out = layer(x, Tensor(valid), noise).asnumpy()
    found, stats, _ = layer.moe(x.reshape(12, 6), Tensor(valid.reshape(1, 12)), noise)
    np.testing.assert_array_equal(out, found.asnumpy().reshape(3, 4, 6))
    flat = layer(x.reshape(12, 6), valid=Tensor(valid.reshape(12) > 0), noise=noise)
    np.testing.assert_array_equal(flat.asnumpy(), out.reshape(12, 6))
    assert (out[1, 2:] == 0).all() and np.abs(out[valid > 0]).min() > 0
    balance, z = loss_metrics(stats.asnumpy().sum(0), 4)
    assert layer.losses["balance"] == pytest.approx(balance) and layer.losses["z"] == pytest.approx(z)


def gradients(layer: sw.MoELayer, x: Tensor, scale: float) -> dict[str, np.ndarray]:
    """Gradients of scale * (sum of squares of the output + the auxiliary losses), however the layer gives them."""
    parameters = layer.trainable_params()

    def forward(x):
        out = layer(x)
        if layer.return_losses:
            return scale * ((out[0] ** 2).sum() + out[1])
        return scale * (out**2).sum()

    d_x, d_parameters = ms.grad(forward, 0, ms.ParameterTuple(parameters))(x)
    return {"x": d_x.asnumpy()} | {one.name: d.asnumpy() for one, d in zip(parameters, d_parameters)}


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_attached_and_returned_losses_give_the_same_gradients(mode, request):
    """Also where the network's loss is scaled, once the layer knows the scale; and the losses do reach the router."""
    request.getfixturevalue(mode)
    x, scale = rows_of(8, 6), 64.0
    returned = gradients(create(return_losses=True, **FACTORS).set_train(), x, scale)
    attached = create(**FACTORS).set_train()
    attached.set_loss_scale(scale)
    found = gradients(attached, x, scale)
    for name, gradient in returned.items():
        np.testing.assert_allclose(found[name], gradient, rtol=1e-5, atol=1e-4, err_msg=name)
    without = gradients(create(aux_loss_factor=0, z_loss_factor=0).set_train(), x, scale)
    assert np.abs(found["moe.router.weight"] - without["moe.router.weight"]).max() > 1.0
    attached.set_loss_scale(Tensor(1.0))  # a scale that is not told is seen: of a compiled graph too
    assert np.abs(gradients(attached, x, scale)["moe.router.weight"] - returned["moe.router.weight"]).max() > 1.0


def test_the_returned_loss_is_the_weighted_sum(pynative):
    layer = create(return_losses=True, **FACTORS).set_train()
    _, loss = layer(rows_of(8, 6))
    found = layer.losses
    assert found["total"] == pytest.approx(float(loss.asnumpy()), rel=1e-6)
    assert found["total"] == pytest.approx(0.3 * found["balance"] + 0.2 * found["z"] + found["auxiliary"])
    assert found["auxiliary"] > 0 and found["balance"] > 0.5


def test_losses_are_attached_in_training_alone(pynative):
    layer, x = create(**FACTORS), rows_of(8, 6)
    plain = create(aux_loss_factor=0, z_loss_factor=0)
    for name, gradient in gradients(layer, x, 1.0).items():
        np.testing.assert_array_equal(gradient, gradients(plain, x, 1.0)[name], err_msg=name)


@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_noise_is_fresh_in_each_training_pass_and_absent_in_evaluation(mode, request):
    request.getfixturevalue(mode)
    one, other, x = create(jitter=0.2), create(jitter=0.2, seed=4), rows_of(8, 6)
    for layer in (one, other):
        layer.set_train()
    first, second, third = one(x).asnumpy(), one(x).asnumpy(), one(x).asnumpy()
    logits = [np.abs(a - b).max() for a, b in ((first, second), (second, third), (first, third))]
    assert min(logits) > 1e-4
    one.set_train(False)
    np.testing.assert_array_equal(one(x).asnumpy(), one(x).asnumpy())


def test_equal_seeds_are_equal_layers_and_layers_without_one_differ(pynative):
    def weight(**keys):
        return sw.MoELayer(6, 4, **keys).moe.router.weight.asnumpy()

    np.testing.assert_array_equal(weight(seed=5), weight(seed=5))
    assert np.abs(weight() - weight()).max() > 1e-3
    ms.set_seed(9)
    found = weight()
    ms.set_seed(9)
    np.testing.assert_array_equal(weight(), found)


def test_metrics_count_what_the_router_did(pynative):
    """Eight equal rows want the same two experts, which have one slot each: 14 of 16 choices are dropped."""
    layer = create(capacity_factor=0.25).set_train()
    layer(ops.ones((8, 6)))
    found = layer.metrics()
    assert sorted(found["load"]) == [0, 0, 8, 8] and found["tokens"] == 8
    assert found["dropped"] == pytest.approx(14 / 16) and found["max_violation"] == pytest.approx(1.0)
    assert found["importance"].sum() == pytest.approx(8, rel=1e-5) and 0 < found["entropy"] < np.log(4)
    layer.set_train(False)(ops.ones((8, 6)))
    assert layer.metrics()["dropped"] == 0
    names = set(metrics(layer.statistics.asnumpy(), 4))
    assert set(found) == names | {"tokens"}


@pytest.mark.slow
def test_a_compiled_evaluation_is_noted_too(graph):
    layer = create().set_train()
    layer(rows_of(8, 6))
    layer.set_train(False)(rows_of(5, 6))
    assert layer.metrics()["tokens"] == 5 and layer.metrics()["load"].sum() == 10


def test_float16_comes_back_as_float16_and_statistics_stay_float32(pynative):
    layer, x = create(compute_dtype="float16").set_train(), rows_of(2, 4, 6)
    out, half = layer(x), layer(x.astype(mstype.float16))
    assert out.dtype == mstype.float32 and half.dtype == mstype.float16 and half.shape == (2, 4, 6)
    np.testing.assert_allclose(half.asnumpy(), out.asnumpy(), atol=2e-2)
    assert layer.statistics.dtype == mstype.float32 and layer.trainable_params()[0].dtype == mstype.float32


def test_groups_route_by_themselves(pynative):
    """Two groups of equal rows: each fills the slots of its own; one group would drop more of them."""
    layer = create(capacity_factor=0.5, groups=2).set_train()
    layer(ops.ones((8, 6)))
    assert layer.metrics()["dropped"] == pytest.approx(12 / 16)


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"expert_nun": 4}, "moe.expert_nun: unknown key; did you mean 'expert_num'?"),
        ({"router": "top_p"}, "moe.router: 'top_p'; known routers: base, cosine, "),
        ({"num_experts_chosen": 5}, "moe.num_experts_chosen: 5; at most moe.expert_num (4)"),
        ({"router": {"name": "top_k", "heat": 2}}, "moe.router.heat: 2; unknown option of moe.router 'top_k'; its "),
        ({"capacity_factor": 0}, "moe.capacity_factor: 0; input should be greater than 0"),
        ({"compute_dtype": "int8"}, "model.compute_dtype: 'int8'; input should be 'float32', 'float16' or 'bfloat16'"),
        ({"activation": "elu"}, "model.activation: 'elu'; input should be 'relu', 'gelu' or 'swiglu'"),
        ({"router": "hash"}, "moe.router: 'hash'; chooses by token id, which this network does not have"),
        ({"record": "a.safetensors"}, "moe.record: 'a.safetensors'; only train.py and eval.py record choices"),
        ({"losses": {"sequence": 0.1}}, "model.seq_length: not given; moe.losses.sequence needs the length"),
        ({"losses": {"fairness": 0.1}}, "moe.losses.fairness: unknown; router 'top_k' gives importance, "),
        ({"experts": "big"}, "moe.experts: 'big'; registered: "),
    ],
)
def test_wrong_arguments_are_one_line_in_the_words_of_the_yaml(keys, says):
    with pytest.raises(sw.UserError) as caught:
        sw.MoELayer(6, 4, **{"router": "top_k"} | keys)
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shape, says",
    [
        ((8, 5), r"^x: \[8, 5\]; must be \[N, 6\] or \[B, S, 6\]: hidden_size is 6$"),
        ((2, 2, 2, 6), r"^x: \[2, 2, 2, 6\]; must be"),
        ((7, 6), r"^x: \[7, 6\]; moe.groups \(2\) must divide its 7 rows$"),
    ],
)
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_inputs_that_do_not_fit_are_one_line(shape, says, mode, request):
    request.getfixturevalue(mode)
    with pytest.raises(sw.UserError, match=says):
        create(groups=2)(ops.ones(shape))


def test_missing_ids_are_one_line(pynative):
    layer = sw.MoELayer(6, 4, router="hash", vocab_size=10)
    with pytest.raises(sw.UserError, match=r"^token_ids: not given; this layer reads it: layer\(x, token_ids=...\)$"):
        layer(ops.ones((8, 6)))


def test_a_bias_moves_by_the_load_since_the_last_update(pynative):
    """Two passes, one update: experts above the mean load fall by the rate, those below rise; evaluation counts not."""
    keys = {"router": {"name": "sigmoid", "topk_bias_update_rate": 0.5}, "aux_loss_factor": 0}
    network = nn.SequentialCell(create(**keys))
    layer, x = network[0].set_train(), rows_of(8, 6)
    for _ in range(2):
        layer(x)
    load = layer.metrics()["load"]
    np.testing.assert_array_equal(layer.load.asnumpy(), 2 * load)
    layer.set_train(False)(x)
    sw.update_routers(network)
    np.testing.assert_allclose(layer.moe.router.bias.asnumpy(), 0.5 * np.sign(4 - load))
    assert (layer.load.asnumpy() == 0).all() and (load != 4).any()


def test_a_network_without_a_layer_is_one_line():
    for ask in (sw.update_routers, lambda network: sw.set_loss_scale(network, 2.0)):
        with pytest.raises(sw.UserError, match=r"^network: Dense; holds no switchyard.MoELayer"):
            ask(nn.Dense(2, 2))
