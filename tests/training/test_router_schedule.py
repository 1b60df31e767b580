"""Warm-up and freezing of routers: even random choices, exact resume, no update from a step on."""

from itertools import pairwise

import numpy as np
import pytest
from oracles.tiny_run import losses_of, run_config, token_batch, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.training.loop import train
from switchyard.training.randomness import draw_noise
from switchyard.training.router_schedule import WarmUp, routers_learn
from switchyard.training.step import TrainStep

VOCABULARY = 17


def _warm_up(**moe):
    tree = {"model": {"num_layers": 3, "seq_length": 10, "position": "learned"}, "data": {"batch_size": 6}}
    moe = {"router": "top_k", "expert_num": 4, "num_experts_chosen": 2, "router_warmup_steps": 3} | moe
    return WarmUp(build({**tree, "moe": moe, "train": {"gradient_accumulation_steps": 2}}))


def test_choices_of_the_warm_up_are_even_distinct_and_random():
    warm_up = _warm_up(groups=2)
    experts = warm_up.at(0, None)
    assert experts.shape == (2, 3, 60, 2) and experts.dtype == np.int32
    assert (experts[..., 0] != experts[..., 1]).all()
    for micro in experts:
        for layer in micro:
            for group in (layer[:30], layer[30:]):
                assert sorted(np.bincount(group.reshape(-1), minlength=4)) == [15] * 4
    assert len({layer.tobytes() for micro in experts for layer in micro}) == 6
    np.testing.assert_array_equal(warm_up.at(0, None), experts)
    assert (warm_up.at(1, None) != experts).any()
    assert warm_up.at(2, None) is not None and warm_up.at(3, None) is None


def test_each_copy_gets_even_choices_of_its_own_experts():
    experts = _warm_up(copies=2, num_experts_chosen=1).at(0, None)  # two copies of two experts
    assert experts.shape == (2, 3, 60, 2)
    assert (experts[..., 0] < 2).all() and (experts[..., 1] >= 2).all()
    assert np.bincount(experts[0, 0].reshape(-1)).tolist() == [30] * 4


def test_frozen_from_a_step_on():
    config = build({"moe": {"router_freeze_step": 2}})
    assert [routers_learn(config, step) for step in range(4)] == [True, True, False, False]
    assert routers_learn(build({}), 10**9)


def _moe(**moe):
    own = {"topk_bias_update_rate": 0.01} if moe.get("router", "sigmoid") == "sigmoid" else {}
    return {"router": "sigmoid", "num_experts_chosen": 2, "expert_num": 4} | own | moe


def test_frozen_routers_stay_and_the_rest_learns(graph):
    """Two steps that learn and two that are frozen, compiled: weight and bias stand still, the experts do not."""
    config = run_config(moe=_moe(router_freeze_step=2, aux_loss_factor=0.1))
    model = create_model(config, VOCABULARY)
    step, inputs = TrainStep(model, config), token_batch(1, 4, 16, VOCABULARY)
    history = [_weights(model)]
    for number in range(4):
        noise = draw_noise(1, number, 1, model.noise_slices, range(1), 64, 16)
        step(*inputs, noise, 0.01, None, routers_learn(config, number))
        history.append(_weights(model))
    for name in history[0]:
        changed = [bool(np.any(one[name] != other[name])) for one, other in pairwise(history)]
        assert changed == ([True, True, False, False] if ".router." in name else [True] * 4), name


def _weights(model):
    return {parameter.name: parameter.asnumpy().copy() for parameter in model.get_parameters()}


def test_a_run_with_warm_up_and_freezing_resumes_exactly(tmp_path, monkeypatch, pynative):
    """Warm for 2 steps, frozen from the third of 5: stopped in the warm-up, the run repeats the uninterrupted one.

    Every step is handed choices to force, -1 once the routers decide: the program has one form and compiles once.
    """
    write_text(tmp_path)
    handed, call = [], TrainStep.__call__
    monkeypatch.setattr(TrainStep, "__call__", lambda self, *inputs: handed.append(inputs[5]) or call(self, *inputs))
    moe = _moe(router_warmup_steps=2, router_freeze_step=3)
    keys = {"moe": moe, "context": {"mode": "pynative"}, "schedule": {"total_steps": 5}}
    train(run_config(tmp_path, **keys, train={"steps": 5}))
    train(run_config(tmp_path, **keys, train={"steps": 1, "name": "parts"}))
    train(run_config(tmp_path, **keys, train={"steps": 5, "name": "parts"}), resume=True)
    assert losses_of(tmp_path / "runs" / "parts") == losses_of(tmp_path / "runs" / "tiny")
    assert [int(choices.min()) for choices in handed[:5]] == [0, 0, -1, -1, -1]
    assert all(choices.shape == handed[0].shape for choices in handed) and len(handed) == 10
    whole, parts = (checkpoint.read(tmp_path / "runs" / run).weights for run in ("tiny", "parts"))
    for weight, value in whole.items():
        np.testing.assert_array_equal(parts[weight], value, err_msg=weight)


def test_loads_are_even_while_warm_and_the_router_learns(graph):
    config = run_config(moe=_moe(router="switch", num_experts_chosen=1, router_warmup_steps=1, capacity_factor=1.0))
    model = create_model(config, VOCABULARY)
    step, inputs = TrainStep(model, config), token_batch(1, 4, 16, VOCABULARY)
    before = _weights(model)
    noise = draw_noise(1, 0, 1, model.noise_slices, range(1), 64, 16)
    choices = WarmUp(config).at(0, inputs[0])
    found = step(*inputs, noise, 0.01, choices)["routers"]
    np.testing.assert_array_equal(found["load"], np.full((len(config.moe_layers), 4), 16))
    assert not found["dropped"].any()
    after = _weights(model)
    assert all(np.any(after[name] != before[name]) for name in before if ".router." in name)
    own = step(*inputs, noise, 0.01, np.full_like(choices, -1))["routers"]["load"]  # the routers decide
    assert own.sum() == 64 and np.any(own != 16) and len(step.graph.compile_cache) == 1


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"router": "hash", "router_warmup_steps": 5}, "moe.router_warmup_steps: 5; router 'hash' does not learn"),
        ({"router": "lsh", "router_freeze_step": 0}, "moe.router_freeze_step: 0; router 'lsh' does not learn"),
        ({"router": "dense", "router_warmup_steps": 5}, "moe.router_warmup_steps: 5; router 'dense' does not choose"),
        (
            {"force_balance": True, "router_warmup_steps": 5},
            "moe.router_warmup_steps: 5; cannot be combined with moe.replay",
        ),
        (
            {"granularity": "slice", "router_warmup_steps": 5},
            "moe.router_warmup_steps: 5; choices are forced per token",
        ),
    ],
)
def test_what_cannot_be_is_refused(moe, message):
    with pytest.raises(UserError) as caught:
        create_model(run_config(moe={"expert_num": 4} | moe), VOCABULARY)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
