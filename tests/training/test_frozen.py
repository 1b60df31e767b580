"""Parameters that train.freeze names stay as they are, and nothing is kept for them."""

import pytest
from mindspore import nn
from oracles.tiny_run import run_config, write_text

from switchyard.checkpoint import store as checkpoint
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.models import create_model
from switchyard.training.frozen import freeze, is_frozen
from switchyard.training.limits import refusals
from switchyard.training.loop import train

MOE = {"expert_num": 4, "router": {"name": "sigmoid", "topk_bias_update_rate": 0.1}, "num_experts_chosen": 2}
FROZEN = ["embedding.*", "*.router.*", "layers.[0]*.experts.w_in"]


@pytest.mark.parametrize(
    "name, frozen",
    [
        ("embedding.table", True),
        ("layers.0.feed_forward.router.weight", True),
        ("layers.0.feed_forward.router.bias", True),
        ("layers.0.feed_forward.experts.w_in", True),
        ("layers.1.feed_forward.experts.w_in", False),
        ("layers.0.feed_forward.experts.w_out", False),
        ("position_embedding.table", False),
    ],
)
def test_patterns_match_whole_names(name, frozen):
    assert is_frozen(name, FROZEN) == frozen


def test_frozen_parameters_are_bit_equal_after_training_and_have_no_moments(tmp_path):
    """The bias of a balancing router, which no gradient moves, stays as well."""
    write_text(tmp_path)
    steps = {"steps": 2, "checkpoint_every": 1, "freeze": FROZEN}
    quick = {"data": {"val_fraction": 0.01}, "context": {"mode": "pynative"}}
    config = run_config(tmp_path, moe=MOE, train=steps, **quick)
    train(config)
    first, *_, last = (checkpoint.read(path) for path in checkpoint.listed(tmp_path / "runs" / "tiny"))
    drawn = {one.name: one.asnumpy() for one in create_model(config, 256).get_parameters() if "router" in one.name}
    for name, value in last.weights.items():
        kept = is_frozen(name, FROZEN)
        assert (value.tobytes() == first.weights[name].tobytes()) == kept, name
        assert (f"moment1.{name}" in last.optimizer) == (f"moment2.{name}" in last.optimizer) == (not kept)
        if "router" in name:  # before the first step, too
            assert value.tobytes() == drawn[name].tobytes()


def test_a_pattern_without_a_parameter_is_refused_by_name():
    config = build({"train": {"freeze": ["embedding.*", "layers.9.*"]}})
    with pytest.raises(
        UserError, match=r"^train\.freeze: layers\.9\.\*; matches no parameter; names are like embedding"
    ):
        freeze(create_model(config, 17), config)


def test_something_must_be_left_to_train():
    config = build({"train": {"freeze": ["*"]}})
    with pytest.raises(UserError, match=r"^train\.freeze: \['\*'\]; leaves no parameter to train"):
        freeze(create_model(config, 17), config)


def test_a_network_of_any_kind_is_frozen_by_its_names():
    model = create_model(build({"model": {"type": "cascade"}}), 0)
    names = [parameter.name for parameter in model.trainable_params()]
    freeze(model, build({"train": {"freeze": [names[0]]}}))
    assert [parameter.name for parameter in model.trainable_params()] == names[1:] and isinstance(model, nn.Cell)


def test_a_pipeline_refuses_it_by_name():
    config = build({"train": {"freeze": ["embedding.*"]}, "parallel": {"pipeline_stage": 2, "micro_batch_num": 2}})
    assert "train.freeze" in [refusal.key for refusal in refusals(config)]
