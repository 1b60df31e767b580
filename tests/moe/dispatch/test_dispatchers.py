"""The conditional layer of every form against sums written out in numpy, compiled and with its gradients."""

import mindspore as ms
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.capacity_law import slots
from oracles.moe_loop import Rules, Token, seat, work
from oracles.tiny import (
    NO_NOISE,
    layer_gradients,
    run_both_ways,
    run_layer,
    tiny_config,
    tiny_layer,
    tiny_rows,
    weights_of,
)

from switchyard.distributed.mesh import LOCAL, LocalMesh
from switchyard.moe.dispatch.dispatchers import (
    AlltoAllVDispatcher,
    BlockDispatcher,
    DenseDispatcher,
    ExpertChoiceDispatcher,
    MergedDispatcher,
    SlotDispatcher,
    SoftDispatcher,
    create_dispatcher,
)
from switchyard.moe.experts import FeedForwardExperts
from switchyard.moe.routing import create_router
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights

FORMS = {
    "dense": {"router": "dense"},
    "expert_choice": {"router": "expert_choice", "num_experts_chosen": 2, "capacity_factor": 1.0},
    "soft": {"router": "soft", "slots_per_expert": 2},
    "merged": {"router": "merged"},
    "tree": {"router": "tree"},
    "mixture_of_depths": {"router": "mixture_of_depths", "expert_num": 1, "capacity_factor": 0.5},
}


def _expert(weights, rows, w_in=None, w_out=None, expert=0):
    """One ReLU expert: rows [n, D] -> [n, D]."""
    w_in = weights["experts.w_in"][expert] if w_in is None else w_in
    w_out = weights["experts.w_out"][expert] if w_out is None else w_out
    return np.maximum(rows @ w_in, 0) @ w_out


def _by_hand(form, weights, routing, rows):
    """Rows [G, N, D] through the layer, given what its router decided."""
    out = np.zeros(rows.shape)
    for group, x in enumerate(rows.astype(np.float64)):
        r = {name: part[group] for name, part in routing.items() if part.ndim}
        experts = range(weights["experts.w_in"].shape[0])
        if form == "merged":
            w_in, w_out = (np.tensordot(r["gates"], weights[f"experts.{name}"], 1) for name in ("w_in", "w_out"))
            out[group] = _expert(weights, x, w_in, w_out) * r["expert_mask"][:, :1]
        for e in experts:
            if form == "soft":
                slots = _expert(weights, r["dispatch"][:, e].T @ x, expert=e)  # [S, D]
                out[group] += r["combine"][:, e] @ slots
            elif form in ("dense", "tree"):
                out[group] += r["gates"][:, e : e + 1] * _expert(weights, x, expert=e)
            elif form in ("expert_choice", "mixture_of_depths"):
                for row, gate in zip(r["token_index"][e], r["gates"][e]):
                    out[group, row] += gate * _expert(weights, x[row : row + 1], expert=e)[0]
    return out


def _layer(form, train=True, activation="relu"):
    return tiny_layer(tiny_config(activation, **FORMS[form]), train=train)


def _route(layer, rows, valid):
    context = {"valid": Tensor(valid), "noise": Tensor(NO_NOISE), "token_ids": None, "task_ids": None}
    return {name: part.asnumpy() for name, part in layer.router(Tensor(rows), context).items()}


@pytest.mark.parametrize("form", FORMS)
def test_layer_is_the_sum_written_out(form, pynative):
    layer, (rows, valid) = _layer(form), tiny_rows(groups=2, padded=2)
    out, _, _, audit = run_layer(layer, rows, valid)
    routing = _route(layer, rows, valid)
    np.testing.assert_allclose(out, _by_hand(form, weights_of(layer), routing, rows), atol=1e-5)
    assert np.abs(out[:, :-2]).max() > 0.1 and (out[:, -2:] == 0).all()  # padded rows come back as zero
    assert audit["dropped"] == 0
    np.testing.assert_allclose(audit["load"], routing["expert_mask"].sum((0, 1)))


@pytest.mark.parametrize("form", FORMS)
def test_compiled_layer_is_the_same(form):
    before, parts = ms.get_context("mode"), []
    try:
        for mode in (0, 1):
            ms.set_context(mode=mode)
            layer, (rows, valid) = _layer(form), tiny_rows(groups=2, padded=2)
            upstream = np.random.default_rng(3).normal(0, 1, rows.shape).astype(np.float32)
            (out, *_), gradients = run_both_ways(layer, rows, valid, upstream, 0, 0)
            parts.append({"out": out} | gradients)
    finally:
        ms.set_context(mode=before)
    for name, one in parts[0].items():
        np.testing.assert_allclose(one, parts[1][name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_rows_and_weights_is_the_slope(form, pynative):
    """Along a random direction, in a step so small that no choice changes; GELU, which has no kinks."""
    layer, (rows, valid) = _layer(form, activation="gelu"), tiny_rows(groups=2, padded=2)
    random = np.random.default_rng(4)
    upstream = random.normal(0, 1, rows.shape).astype(np.float32)
    gradients = layer_gradients(layer, rows, valid, upstream, 0, 0)
    parameters = {name: parameter for name, parameter in layer.parameters_and_names()}
    start = {"rows": rows} | {name: parameter.asnumpy() for name, parameter in parameters.items()}
    for name, value in start.items():
        way, ends = random.normal(0, 1, value.shape).astype(np.float32), []
        for step in (1e-3, -1e-3):
            moved = value + step * way
            if name != "rows":
                parameters[name].set_data(Tensor(moved))
            out = run_layer(layer, moved if name == "rows" else rows, valid)[0].astype(np.float64)
            ends.append((out * upstream).sum())
        if name != "rows":
            parameters[name].set_data(Tensor(value))
        slope = (ends[0] - ends[1]) / 2e-3
        assert (gradients[name] * way).sum() == pytest.approx(slope, rel=0.02, abs=0.02), name


@pytest.mark.parametrize("form", ["tree", "mixture_of_depths"])
def test_evaluation_takes_one_path(form, pynative):
    """Another form at evaluation: each row goes to the one expert that the router names, or to none."""
    layer, (rows, valid) = _layer(form, train=False), tiny_rows(groups=2, padded=2)
    routing, weights = _route(layer, rows, valid), weights_of(layer)
    wanted = np.zeros(rows.shape)
    for place in np.ndindex(2, 7):
        expert, gate = routing["expert_index"][place][0], routing["gates"][place][0]
        if expert < len(weights["experts.w_in"]):
            wanted[place] = gate * _expert(weights, rows[place][None].astype(np.float64), expert=expert)[0]
    np.testing.assert_allclose(run_layer(layer, rows, valid)[0], wanted, atol=1e-5)
    assert np.abs(wanted).max() > 0.1


def test_one_merged_expert_is_that_expert(pynative):
    """A gate of 1 for expert 2 gives its output, and half of each parameter is no half of each output."""
    layer, (rows, _) = _layer("merged"), tiny_rows()
    weights, gates = weights_of(layer), np.array([[0, 0, 1, 0]], np.float32)
    out = layer.experts.merged(Tensor(rows), Tensor(gates)).asnumpy()
    np.testing.assert_allclose(out[0], _expert(weights, rows[0], expert=2), atol=1e-5)
    half = layer.experts.merged(Tensor(rows), Tensor(np.array([[0.5, 0, 0.5, 0]], np.float32))).asnumpy()
    ends = [_expert(weights, rows[0], expert=e) for e in (0, 2)]
    assert np.abs(half[0] - (ends[0] + ends[1]) / 2).max() > 0.1


def test_expert_choice_adds_up_what_experts_made_of_a_row(pynative):
    """Three rows, two experts: row 1 is taken by both, row 0 by one, row 2 by none."""
    dispatcher = ExpertChoiceDispatcher(tiny_config(expert_num=2).moe, lambda count: 2)
    routing = {
        "token_index": Tensor([[[1, 0], [1, 1]]], mstype.int32),
        "gates": Tensor([[[0.5, 0.25], [2.0, 0.0]]], mstype.float32),
        "expert_mask": Tensor([[[1, 0], [1, 1], [0, 0]]], mstype.float32),
    }
    sent = dispatcher.send(Tensor([[[1, 2], [3, 4], [5, 6]]], mstype.float32), routing)
    np.testing.assert_array_equal(sent[0].asnumpy(), [[[[3, 4], [1, 2]], [[3, 4], [3, 4]]]])
    back = dispatcher.receive(*sent)
    np.testing.assert_array_equal(back.asnumpy(), [[0.25, 0.5], [7.5, 10], [0, 0]])
    assert dispatcher.num_kept(routing, sent).asnumpy() == [3]


CHOSEN = {  # keys -> dispatchers in training and at evaluation
    "top_k": ({"router": "top_k"}, SlotDispatcher, BlockDispatcher),
    "eval capacity": ({"router": "top_k", "eval_capacity_factor": 1.0}, SlotDispatcher, SlotDispatcher),
    "dropless": ({"router": "top_k", "dispatch": "dropless"}, BlockDispatcher, BlockDispatcher),
    "tree": (FORMS["tree"], DenseDispatcher, BlockDispatcher),
    "mixture_of_depths": (FORMS["mixture_of_depths"], ExpertChoiceDispatcher, BlockDispatcher),
    "expert_choice": (FORMS["expert_choice"], ExpertChoiceDispatcher, ExpertChoiceDispatcher),
    "dense": (FORMS["dense"], DenseDispatcher, DenseDispatcher),
    "soft": (FORMS["soft"], SoftDispatcher, SoftDispatcher),
    "merged": (FORMS["merged"], MergedDispatcher, MergedDispatcher),
}


class Mesh(LocalMesh):
    """A mesh that says how choices travel where nothing is dropped."""

    def __init__(self, dropless: str):
        super().__init__()
        self.dropless = dropless


def _dispatchers(keys, mesh):
    config, weights = tiny_config(**keys), InitialWeights(0)
    router = create_router(config, weights)
    experts = FeedForwardExperts(config.moe.expert_num, 6, 5, "relu", (0.7, 0.7), weights, mstype.float32)
    return [create_dispatcher(router, config, training, experts, NONE, mesh) for training in (True, False)]


@pytest.mark.parametrize("name", CHOSEN)
def test_every_form_has_its_dispatcher(name):
    keys, *wanted = CHOSEN[name]
    assert [type(dispatcher) for dispatcher in _dispatchers(keys, LOCAL)] == wanted


def test_what_drops_nothing_is_the_choice_of_the_mesh():
    """Evaluation without a capacity, and training where `moe.dispatch` asks for it; a capacity has slots everywhere."""
    train, evaluation = _dispatchers({"dispatch": "dropless"}, Mesh("alltoallv"))
    assert type(train) is type(evaluation) is AlltoAllVDispatcher and not train.static and not evaluation.static
    train, evaluation = _dispatchers({}, Mesh("alltoallv"))
    assert type(train) is SlotDispatcher and type(evaluation) is AlltoAllVDispatcher and evaluation.static
    train, evaluation = _dispatchers({"dispatch": "dropless_static"}, Mesh("slots"))
    assert type(train) is type(evaluation) is SlotDispatcher and train.factor is evaluation.factor is None


class Doubled(FeedForwardExperts):
    """Experts of which their matrices do not say all."""

    def construct(self, rows):
        return 2 * super().construct(rows)


def test_experts_that_compute_otherwise_are_called_at_evaluation():
    """A slot for every token in the place of AlltoAllV, which reads their matrices; on one device blocks as ever."""
    config, weights = tiny_config(), InitialWeights(0)
    router, experts = create_router(config, weights), Doubled(4, 6, 5, "relu", (0.7, 0.7), weights, mstype.float32)
    sent, local = (create_dispatcher(router, config, False, experts, NONE, mesh) for mesh in (Mesh("alltoallv"), LOCAL))
    assert type(sent) is SlotDispatcher and sent.factor is None
    assert type(local) is BlockDispatcher and not local.has_blocks


EXPERTS, WIDTH, TOKENS = 4, 3, 12


@st.composite
def routings(draw):
    """(expert_index [2, 6, K], valid [2, 6]): any different experts for each token, any tokens padding.

    Two sizes alone, since every new one costs kernels.
    """
    choices, order = draw(st.sampled_from([1, 3])), st.permutations(range(EXPERTS))
    index = [draw(order)[:choices] for _ in range(TOKENS)]
    valid = [draw(st.integers(0, 3)) > 0 for _ in range(TOKENS)]
    return np.array(index, np.int32).reshape(2, -1, choices), np.array(valid).reshape(2, -1)


def _loop(tokens, index, gates, valid, weights, capacity):
    """(outputs [G, N, D], choices served [G]): each token to its experts one by one, as far as they have room."""
    out, kept = np.zeros(tokens.shape), np.zeros(len(tokens))
    rules = Rules("relu", index.shape[2], capacity=capacity)
    for group, rows in enumerate(tokens):
        asked = [
            Token(None, None, list(index[group, n]), gates[group, n], 1.0) if valid[group, n] else None
            for n in range(len(rows))
        ]
        seated = seat(asked, rules, EXPERTS)
        kept[group] = len(seated)
        for n, k in seated:
            out[group, n] += gates[group, n, k] * work(rows[n], weights, "experts", index[group, n, k], "relu")
    return out, kept


def test_dispatchers_of_choices_are_the_loop_for_any_routing(pynative):
    """Slots for everyone, blocks by the chosen experts, blocks by all experts: the same; and slots up to a capacity."""
    experts = FeedForwardExperts(EXPERTS, WIDTH, 5, "relu", (0.7, 0.7), InitialWeights(0), mstype.float32)
    weights = {f"experts.{name}": value for name, value in weights_of(experts).items()}
    moes = {choices: tiny_config(num_experts_chosen=choices, dropless_block_size=2).moe for choices in (1, 3)}

    @given(routings(), st.integers(0, 99))
    def holds(drawn, seed):
        index, valid = drawn
        random, moe = np.random.default_rng(seed), moes[index.shape[2]]
        tokens = random.normal(0, 1, (*valid.shape, WIDTH)).astype(np.float32)
        gates = random.random(index.shape).astype(np.float32) * valid[..., None]
        masked = np.where(valid[..., None], index, EXPERTS)
        routing = {"expert_index": Tensor(masked.astype(np.int32)), "gates": Tensor(gates)}
        room = slots(valid.shape[1] * moe.num_experts_chosen, EXPERTS, 0.8)
        for dispatcher, capacity in (
            (SlotDispatcher(moe, None), None),
            (BlockDispatcher(moe, True), None),
            (BlockDispatcher(moe, False), None),
            (SlotDispatcher(moe, 0.8), room),
        ):
            wanted, kept = _loop(tokens, index, gates, valid, weights, capacity)
            sent = dispatcher.send(Tensor(tokens), routing)
            got = dispatcher.apply(experts, sent).asnumpy().reshape(wanted.shape)
            np.testing.assert_allclose(got, wanted, atol=1e-5)
            np.testing.assert_array_equal(dispatcher.num_kept(routing, sent).asnumpy(), kept)

    holds()
