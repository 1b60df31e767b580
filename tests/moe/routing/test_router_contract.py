"""What every router promises. A newly registered router is tested here without any change to this file.

Each router is built for one and for two choices, as far as the configuration allows it.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from oracles.routers import any_router, checking_mesh, inputs_of
from oracles.tiny import tiny_config, weights_of

from switchyard.errors import UserError
from switchyard.moe.routing import create_router, known_routers
from switchyard.nn.initializers import InitialWeights

GROUPS, ROWS, WIDTH, EXPERTS = 2, 7, 6, 4
KEYS = {"two_level": {"n_group": 2, "topk_group": 2}}  # what a router cannot do without
SUM_TO_CHOICES = ("prototype",)  # a softmax for each choice


def _cases():
    for name, router in known_routers().items():
        if router.form != "token_choice" or router.eval_form or router.needs:
            continue  # see test_forms_contract.py
        for choices in (1, 2):
            try:
                tiny_config(router=name, num_experts_chosen=choices, **KEYS.get(name, {}))
            except UserError:
                continue
            yield pytest.param((name, choices), id=f"{name}-k{choices}")


@pytest.fixture(params=_cases())
def case(request):
    return request.param


def _router(case, seed=0, **moe):
    keys = KEYS.get(case[0], {}) | moe
    config = tiny_config(router=case[0], num_experts_chosen=case[1], expert_num=EXPERTS, **keys)
    return create_router(config, InitialWeights(seed)).set_train(False)


def _rows(seed=0, rows=ROWS):
    return np.random.default_rng(seed).normal(0, 3, (GROUPS, rows, WIDTH)).astype(np.float32)


def _valid(rows=ROWS, padded=0):
    valid = np.ones((GROUPS, rows), np.float32)
    if padded:
        valid[:, :padded] = 0
    return valid


class Flat(nn.Cell):
    """A router with tensors in and out, as an exported model has it."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def construct(self, rows, valid):
        routing = self.router(rows, {"valid": valid})
        return (
            routing["expert_index"],
            routing["gates"],
            routing["probabilities"],
            routing["logits"],
            routing["expert_mask"],
        )


NAMES = ("expert_index", "gates", "probabilities", "logits", "expert_mask")


def _route(router, rows, valid=None):
    valid = _valid(rows.shape[1]) if valid is None else valid
    parts = Flat(router).set_train(router.training)(Tensor(rows), Tensor(valid))
    return {name: part.asnumpy() for name, part in zip(NAMES, parts)}


def test_shapes_and_types(case, pynative):
    routing, choices = _route(_router(case), _rows()), case[1]
    assert routing["expert_index"].shape == routing["gates"].shape == (GROUPS, ROWS, choices)
    for name in ("probabilities", "logits", "expert_mask"):
        assert routing[name].shape == (GROUPS, ROWS, EXPERTS)
    assert routing["expert_index"].dtype == np.int32
    assert all(routing[name].dtype == np.float32 for name in NAMES[1:])


def test_choices_are_distinct_experts_and_chosen_marks_them(case, pynative):
    routing = _route(_router(case), _rows())
    assert routing["expert_index"].min() >= 0 and routing["expert_index"].max() < EXPERTS
    marked = np.zeros_like(routing["expert_mask"])
    np.put_along_axis(marked, routing["expert_index"].astype(np.int64), 1, axis=-1)
    np.testing.assert_array_equal(routing["expert_mask"], marked)
    assert (marked.sum(-1) == case[1]).all()


def test_probabilities_sum_to_one_and_gates_to_at_most_one(case, pynative):
    routing = _route(_router(case), _rows())
    np.testing.assert_allclose(routing["probabilities"].sum(-1), 1, atol=1e-5)
    assert routing["gates"].min() > 0
    assert routing["gates"].sum(-1).max() <= (case[1] if case[0] in SUM_TO_CHOICES else 1) + 1e-5


def test_first_choice_has_the_largest_gate(case, pynative):
    gates = _route(_router(case), _rows())["gates"]
    assert (np.diff(gates, axis=-1) <= 0).all()


def test_padding_goes_nowhere_and_changes_nobody(case, pynative):
    router, rows = _router(case), _rows()
    routing, alone = _route(router, rows, _valid(padded=3)), _route(router, rows[:, 3:])
    assert (routing["expert_index"][:, :3] == EXPERTS).all()
    assert (routing["gates"][:, :3] == 0).all() and (routing["expert_mask"][:, :3] == 0).all()
    for name in NAMES:
        np.testing.assert_allclose(routing[name][:, 3:], alone[name], atol=1e-6, err_msg=name)


def test_weights_follow_the_seed(case):
    one, same, other = (weights_of(_router(case, seed)) for seed in (0, 0, 1))
    for name, value in one.items():
        np.testing.assert_array_equal(value, same[name])
    if known_routers()[case[0]].learnable:
        assert any(np.any(value != other[name]) for name, value in one.items())


def test_same_rows_same_routing(case, pynative):
    first, second = (_route(_router(case), _rows()) for _ in range(2))
    for name in NAMES:
        np.testing.assert_array_equal(first[name], second[name])


def test_arithmetic_is_float32_for_half_precision_rows(case, pynative):
    rows = _rows().astype(np.float16)
    half, full = _route(_router(case), rows), _route(_router(case), rows.astype(np.float32))
    for name in NAMES:
        assert half[name].dtype == full[name].dtype
        np.testing.assert_array_equal(half[name], full[name])


def test_same_row_same_routing_in_any_batch(case, pynative):
    if not known_routers()[case[0]].batch_independent:
        pytest.skip("says that it cannot promise this")
    router, rows = _router(case), _rows()
    together = _route(router, rows)
    alone = _route(router, rows[:, 2:3])
    crowd = _route(router, np.concatenate([_rows(5, 20), rows[:, 2:3]], 1))
    for name in NAMES:
        np.testing.assert_allclose(alone[name][:, 0], together[name][:, 2], atol=1e-6, err_msg=name)
        np.testing.assert_allclose(crowd[name][:, -1], together[name][:, 2], atol=1e-6, err_msg=name)


def test_gates_carry_a_gradient_to_every_weight(case, pynative):
    """The contract that makes a router learn: the gates alone, without any balance loss, move all its weights."""
    if not known_routers()[case[0]].learnable:
        pytest.skip("has nothing to learn")
    router, rows = _router(case).set_train(True), Tensor(_rows())
    upstream = Tensor(np.random.default_rng(1).normal(0, 1, (GROUPS, ROWS, case[1])).astype(np.float32))
    noise = np.random.default_rng(2).random((4, GROUPS * ROWS, WIDTH)).astype(np.float32)
    context = {"valid": Tensor(_valid()), "noise": Tensor(noise)}
    weights = ms.ParameterTuple(router.trainable_params())
    assert len(weights) > 0

    def objective(rows):
        return (router(rows, context)["gates"] * upstream).sum()

    d_rows, d_weights = ms.grad(objective, 0, weights)(rows)
    for gradient in (d_rows, *d_weights):
        assert np.isfinite(gradient.asnumpy()).all()
        assert np.abs(gradient.asnumpy()).max() > 1e-3


def test_export_runs_the_same(case, graph, tmp_path):
    """Compiled, exported to MindIR and read back, the routing is that of operators run one by one."""
    flat, rows = Flat(_router(case)).set_train(False), _rows()
    inputs = Tensor(rows), Tensor(_valid(padded=1))
    compiled = [part.asnumpy() for part in flat(*inputs)]
    ms.export(flat, *inputs, file_name=str(tmp_path / "router"), file_format="MINDIR")
    loaded = nn.GraphCell(ms.load(str(tmp_path / "router.mindir")))
    exported = [part.asnumpy() for part in loaded(*inputs)]
    ms.set_context(mode=1)
    plain = _route(_router(case), rows, _valid(padded=1))
    for name, one, two in zip(NAMES, compiled, exported):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, plain[name], atol=1e-6, err_msg=name)


def test_logits_are_finite_for_extreme_rows(case, pynative):
    routing = _route(_router(case), _rows() * 1e4)
    assert all(np.isfinite(routing[name]).all() for name in NAMES)


def test_unknown_name_is_one_line():
    with pytest.raises(UserError, match=r"^moe\.router: 'swich'; known routers: .*switch.*top_k") as caught:
        create_router(tiny_config(router="swich"), InitialWeights(0))
    assert "\n" not in str(caught.value)


def test_every_router_knows_its_name_and_explains_itself():
    for name, router in known_routers().items():
        assert router.name == name
        assert router.__doc__ and "arXiv" in router.__doc__


def test_half_precision_logits_would_choose_otherwise(pynative):
    """Two experts whose logits differ by less than float16 can tell: the larger one is taken all the same."""
    router = _router(("switch", 1))
    weight = np.zeros((WIDTH, EXPERTS), np.float32)
    weight[0] = [1.0, 1.0001, 0.5, 0.5]
    assert np.float16(weight[0, 0]) == np.float16(weight[0, 1])
    router.weight.set_data(Tensor(weight))
    rows = np.zeros((GROUPS, 1, WIDTH), np.float16)
    rows[..., 0] = 1
    assert (_route(router, rows)["expert_index"] == 1).all()
    assert router.weight.dtype == mstype.float32


def _sharded():
    """Every router that works on every mesh, in training and at evaluation, and two of several replica groups."""
    names = [(name, {}) for name, router in known_routers().items() if not router.overrides_construct]
    for name, moe in (*names, ("top_k", {"copies": 2}), ("sigmoid", {"copies": 2})):
        for training in (True, False):
            label = "-".join((name, *moe, "training" if training else "evaluation"))
            yield pytest.param((name, training, moe), id=label)


each_sharded = pytest.mark.parametrize("every", list(_sharded()))


def _scores(router, tokens, context):
    """What `scores` gives for flat tokens, and the same in groups."""
    groups, rows, width = tokens.shape
    flat = router.scores(tokens.reshape(-1, width), context["token_ids"].reshape(-1), context["task_ids"].reshape(-1))
    assert len(flat) == router.score_num and all(part.shape[:1] == (groups * rows,) for part in flat)
    assert all(part.ndim == 2 for part in flat)
    return flat, tuple(part.reshape(groups, rows, -1) for part in flat)


def _arrays(routing):
    return {name: part.asnumpy() for name, part in routing.items()}


@each_sharded
def test_construct_is_route_of_scores_and_route_reads_no_parameter(every, pynative):
    """The parameters are overwritten once the scores are there; what `route` may know of them is context["state"]."""
    name, training, moe = every
    router, (tokens, context) = any_router(name, training, **moe), inputs_of(padded=2)
    whole = _arrays(router(tokens, dict(context)))
    _, scores = _scores(router, tokens, context)
    state = tuple(Tensor(parameter.asnumpy()) for parameter in router.state())
    for parameter in router.get_parameters():
        worst = np.nan if parameter.dtype == mstype.float32 else -1
        parameter.set_data(Tensor(np.full(parameter.shape, worst), parameter.dtype))
    routed = _arrays(router.route(scores, context | {"state": state}))
    assert whole.keys() == routed.keys()
    for key, part in whole.items():
        np.testing.assert_array_equal(part, routed[key], err_msg=key)


@each_sharded
def test_layouts_fit_what_scores_computes(every, pynative):
    """Each function on a device's tokens gets a layout for every axis of every argument, and gives what it promises."""
    name, training, moe = every
    router, (tokens, context) = any_router(name, training, **moe), inputs_of()
    before, _ = _scores(router, tokens, context)
    router.shard(checking_mesh())
    after, _ = _scores(router, tokens, context)
    for one, two in zip(before, after):
        np.testing.assert_array_equal(one.asnumpy(), two.asnumpy())
