"""What the routers promise that choose otherwise than token by token from the row alone.

Every router of another form, or with needs of its own, is tested here without any change to this file, in training and
at evaluation: shapes, sums of weights, padding, gradient, determinism, independence or its declared absence, export.
"""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from oracles.tiny import tiny_config, weights_of

from switchyard.moe.dispatch.capacity import capacity
from switchyard.moe.routing import create_router, known_routers
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

GROUPS, ROWS, WIDTH, EXPERTS, VOCABULARY, TASKS, SLOTS = 2, 8, 6, 4, 10, 3, 2
COMMON = ("probabilities", "logits", "importance", "expert_mask")
PARTS = {
    "token_choice": ("expert_index", "gates"),
    "expert_choice": ("token_index", "gates"),
    "soft": ("dispatch", "combine"),
    "dense": ("gates",),
    "merged": ("gates",),
}
MOE = {
    "task": {"num_experts_chosen": 2},
    "multi_gate": {"num_experts_chosen": 2},
    "random": {"random_draw": "step"},
    "random_in_group": {"n_group": 2},
    "mixture_of_depths": {"expert_num": 1, "capacity_factor": 0.5},
}


def _cases(modes=(True, False), learnable=False):
    for name, router in known_routers().items():
        if router.form == "token_choice" and not router.eval_form and not router.needs:
            continue  # see test_router_contract.py
        for training in modes:
            if router.learnable or not learnable:
                yield pytest.param((name, training), id=f"{name}-{'training' if training else 'evaluation'}")


@pytest.fixture(params=_cases())
def case(request):
    return request.param


at_evaluation = pytest.mark.parametrize("case", list(_cases((False,))))
in_training = pytest.mark.parametrize("case", list(_cases((True,), learnable=True)))


def _moe(name):
    return {"router": name, "expert_num": EXPERTS, "task_num": TASKS, "slots_per_expert": SLOTS} | MOE.get(name, {})


def _router(case, seed=0):
    """A router whose learned weights are large enough that every choice is sharp."""
    config, random = tiny_config(width=WIDTH, **_moe(case[0])), np.random.default_rng(seed + 2)
    router = create_router(config, InitialWeights(seed), NoiseSlices(), VOCABULARY, has_tasks=True)
    for parameter in router.trainable_params():
        if parameter.name != "scale":
            parameter.set_data(Tensor(random.normal(0, 0.8, parameter.shape).astype(np.float32)))
    return router.set_train(case[1])


def _form(case):
    router = known_routers()[case[0]]
    return router.form if case[1] else router.eval_form or router.form


def _inputs(seed=0, rows=ROWS, padded=0):
    """(rows, valid, noise, token_ids, task_ids); the first `padded` rows of each group are padding."""
    random, valid = np.random.default_rng(seed), np.ones((GROUPS, rows), np.float32)
    valid[:, :padded] = 0
    return [
        random.normal(0, 2, (GROUPS, rows, WIDTH)).astype(np.float32),
        valid,
        random.random((1, GROUPS * rows, WIDTH)).astype(np.float32),
        random.integers(0, VOCABULARY, (GROUPS, rows)).astype(np.int32),
        random.integers(0, TASKS, (GROUPS, rows)).astype(np.int32),
    ]


class Flat(nn.Cell):
    """A router with tensors in and out, as an exported model has it."""

    def __init__(self, router, names):
        super().__init__()
        self.router, self.names = router, names

    def construct(self, rows, valid, noise, token_ids, task_ids):
        context = {"valid": valid, "noise": noise, "token_ids": token_ids, "task_ids": task_ids}
        routing, parts = self.router(rows, context), ()
        for name in self.names:
            parts = (*parts, routing[name])
        return parts


def _names(case):
    return PARTS[_form(case)] + COMMON


def _flat(case, router=None):
    return Flat(router or _router(case), _names(case)).set_train(case[1])


def _route(case, inputs, router=None):
    parts = _flat(case, router)(*[Tensor(part) for part in inputs])
    return {name: part.asnumpy() for name, part in zip(_names(case), parts)}


def test_shapes_and_types(case, pynative):
    routing, moe = _route(case, _inputs()), _moe(case[0])
    experts, choices = moe["expert_num"], moe.get("num_experts_chosen", 1)
    slots = capacity(ROWS, experts, choices, moe.get("capacity_factor", 1.25))
    wanted = {
        "token_choice": [(GROUPS, ROWS, choices)] * 2,
        "expert_choice": [(GROUPS, experts, slots)] * 2,
        "soft": [(GROUPS, ROWS, experts, SLOTS)] * 2,
        "dense": [(GROUPS, ROWS, experts)],
        "merged": [(GROUPS, experts)],
    }[_form(case)]
    assert [routing[name].shape for name in PARTS[_form(case)]] == wanted
    assert all(routing[name].shape == (GROUPS, ROWS, experts) for name in COMMON)
    for name, part in routing.items():
        assert part.dtype == (np.int32 if name in ("expert_index", "token_index") else np.float32), name
        assert np.isfinite(part).all(), name


def test_weights_sum_to_what_the_form_says(case, pynative):
    routing, form = _route(case, _inputs(padded=2)), _form(case)
    real = _inputs(padded=2)[1]
    if case[0] != "mixture_of_depths":  # whose distribution has "no expert" as its rest
        np.testing.assert_allclose(routing["probabilities"][:, 2:].sum(-1), 1, atol=1e-5)
    if form == "token_choice":
        assert (routing["gates"] >= 0).all() and routing["gates"].sum(-1).max() <= 1 + 1e-5
        np.testing.assert_array_equal((routing["gates"] > 0).sum(-1), routing["expert_mask"].sum(-1))
    elif form == "expert_choice":
        assert (routing["gates"] >= 0).all() and routing["gates"].max() <= 1
        assert all(
            len(set(taken)) == len(taken)
            for taken in routing["token_index"].reshape(-1, routing["token_index"].shape[-1])
        )
        assert (routing["gates"] > 0).sum() == routing["expert_mask"].sum()
    elif form == "soft":
        np.testing.assert_allclose(routing["dispatch"].sum(1), 1, atol=1e-5)
        np.testing.assert_allclose(routing["combine"].sum((2, 3)), real, atol=1e-5)
    elif form == "dense":
        np.testing.assert_allclose(routing["gates"].sum(-1), real, atol=1e-5)
    else:
        np.testing.assert_allclose(routing["gates"].sum(-1), 1, atol=1e-5)


def test_padding_is_chosen_by_nobody(case, pynative):
    routing, form = _route(case, _inputs(padded=3)), _form(case)
    assert (routing["expert_mask"][:, :3] == 0).all() and routing["expert_mask"][:, 3:].any()
    if form == "token_choice":
        assert (routing["expert_index"][:, :3] == _moe(case[0])["expert_num"]).all()
    if form == "expert_choice":
        assert (routing["gates"][routing["token_index"] < 3] == 0).all()
    elif form != "merged":
        assert all((routing[name][:, :3] == 0).all() for name in PARTS[form] if name != "expert_index")


def test_padding_changes_nobody(case, pynative):
    """Loud padding, and none at all; expert choice takes a share of all rows, so there only what padding holds."""
    router, inputs = _router(case), _inputs(padded=3)
    loud = [part.copy() for part in inputs]
    loud[0][:, :3] = 50
    one, two = _route(case, inputs, router), _route(case, loud, router)
    for name in COMMON:
        np.testing.assert_allclose(one[name][:, 3:], two[name][:, 3:], atol=1e-5, err_msg=name)
    for name in PARTS[_form(case)]:
        np.testing.assert_allclose(one[name], two[name], atol=1e-5, err_msg=name)
    if _form(case) != "expert_choice":
        short = [inputs[0][:, 3:], inputs[1][:, 3:]]
        short += [inputs[2].reshape(1, GROUPS, ROWS, WIDTH)[:, :, 3:].reshape(1, -1, WIDTH)]
        alone = _route(case, [*short, inputs[3][:, 3:], inputs[4][:, 3:]], router)
        for name in COMMON:
            np.testing.assert_allclose(one[name][:, 3:], alone[name], atol=1e-5, err_msg=name)


def test_same_seed_same_routing(case, pynative):
    first, second = (_route(case, _inputs()) for _ in range(2))
    for name, part in first.items():
        np.testing.assert_array_equal(part, second[name], err_msg=name)
    one, same = weights_of(_router(case)), weights_of(_router(case))
    assert all(np.array_equal(one[name], same[name]) for name in one)


@at_evaluation
def test_noise_is_read_in_training_only(case, pynative):
    one, two = _inputs(), _inputs()
    two[2] = np.zeros((1, 1, 1), np.float32)
    one, two = _route(case, one), _route(case, two)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def _of_row(routing, form, group, row):
    """What belongs to one row of a group, as one vector."""
    if form == "expert_choice":
        taken = routing["token_index"][group] == row  # [E, C]
        return (routing["gates"][group] * taken).sum(-1)
    if form == "merged":
        return routing["gates"][group]
    return np.concatenate([routing[name][group, row].reshape(-1) for name in PARTS[form]])


@at_evaluation
def test_rows_are_independent_or_declared_not_to_be(case, pynative):
    """All rows but one are exchanged; its routing stays where the class says so, and moves for some row where not."""
    router, form, inputs = _router(case), _form(case), _inputs()
    one, apart = _route(case, inputs, router), 0.0
    for row in range(ROWS):
        other = _inputs(seed=5)
        for part in (0, 3, 4):
            other[part][:, row] = inputs[part][:, row]
        two = _route(case, other, router)
        apart = max(apart, np.abs(_of_row(one, form, 0, row) - _of_row(two, form, 0, row)).max())
    if known_routers()[case[0]].batch_independent:
        assert apart < 1e-6
    else:
        assert apart > 1e-3


@at_evaluation
def test_later_rows_change_nothing_or_are_declared_to(case, pynative):
    router, form = _router(case), _form(case)
    inputs, other = _inputs(), _inputs()
    other[0][:, 4:] = _inputs(seed=6)[0][:, 4:]
    one, two = _route(case, inputs, router), _route(case, other, router)
    apart = max(np.abs(_of_row(one, form, 0, row) - _of_row(two, form, 0, row)).max() for row in range(4))
    assert (apart < 1e-6) == known_routers()[case[0]].causal


@in_training
def test_gradient_reaches_every_weight(case, graph):
    """Compiled, in training: what rows and outputs are multiplied by moves what is learned, own losses too."""
    router = _router(case)
    keys = tuple(part for part in PARTS[_form(case)] if part not in ("expert_index", "token_index"))
    keys += ("own_loss",) if case[0] == "mixture_of_depths" else ()
    flat = Flat(router, keys).set_train(True)
    inputs = [Tensor(part) for part in _inputs()]
    upstream = [np.random.default_rng(1).normal(0, 1, part.shape) for part in flat(*inputs)]
    upstream = [Tensor(part.astype(np.float32)) for part in upstream]

    def objective(*inputs):
        total = 0.0
        for part, weight in zip(flat(*inputs), upstream):
            total = total + (part * weight).sum()
        return total

    weights = ms.ParameterTuple(router.trainable_params())
    d_rows, d_weights = ms.grad(objective, 0, weights)(*inputs)
    for gradient in (d_rows, *d_weights):
        assert np.isfinite(gradient.asnumpy()).all() and np.abs(gradient.asnumpy()).max() > 1e-4


def test_compiled_is_the_same_and_so_is_the_export(case, tmp_path):
    before, inputs = ms.get_context("mode"), [Tensor(part) for part in _inputs(padded=1)]
    try:
        ms.set_context(mode=1)
        plain = [part.asnumpy() for part in _flat(case)(*inputs)]
        ms.set_context(mode=0)
        flat = _flat(case)
        compiled = [part.asnumpy() for part in flat(*inputs)]
        exported = compiled
        if not case[1]:
            ms.export(flat, *inputs, file_name=str(tmp_path / "router"), file_format="MINDIR")
            exported = [p.asnumpy() for p in nn.GraphCell(ms.load(str(tmp_path / "router.mindir")))(*inputs)]
    finally:
        ms.set_context(mode=before)
    for name, one, two, three in zip(_names(case), plain, compiled, exported):
        np.testing.assert_allclose(one, two, atol=1e-5, err_msg=name)
        np.testing.assert_array_equal(two, three, err_msg=name)
