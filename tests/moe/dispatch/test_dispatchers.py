"""The conditional layer of every form against sums written out in numpy, compiled and with its gradients."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from mindspore import dtype as mstype
from oracles.tiny import NO_NOISE, layer_gradients, run_layer, tiny_config, tiny_layer, tiny_rows, weights_of

from switchyard.moe.dispatch.dispatchers import PATHS, create_path

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
            parts.append(
                {"out": run_layer(layer, rows, valid)[0]} | layer_gradients(layer, rows, valid, upstream, 0, 0)
            )
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
    path = create_path("expert_choice", tiny_config(expert_num=2).moe, True)
    routing = {"token_index": [[[1, 0], [1, 1]]], "gates": [[[0.5, 0.25], [2.0, 0.0]]]}
    routing = {
        "token_index": Tensor(routing["token_index"], mstype.int32),
        "gates": Tensor(routing["gates"], mstype.float32),
    }
    routing["expert_mask"] = Tensor([[[1, 0], [1, 1], [0, 0]]], mstype.float32)
    plan = path.plan(routing)
    rows = Tensor([[[1, 2], [3, 4], [5, 6]]], mstype.float32)
    slots = path.dispatch(rows, plan)
    np.testing.assert_array_equal(slots.asnumpy(), [[[3, 4], [1, 2]], [[3, 4], [3, 4]]])
    np.testing.assert_array_equal(path.combine(slots, plan).asnumpy(), [[[0.25, 0.5], [7.5, 10], [0, 0]]])
    assert path.served(routing, plan) == 3


def test_every_form_has_a_path():
    assert set(PATHS) == {"token_choice", "expert_choice", "dense", "soft", "merged"}
