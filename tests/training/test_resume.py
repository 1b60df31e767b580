"""Resuming under another layout: the same numbers, cut otherwise, and the routing groups that the run had."""

import json

import pytest
from oracles.tiny_checkpoint import config_of
from oracles.tiny_run import losses_of, run_config, write_text

from switchyard.checkpoint import reshard as recut
from switchyard.checkpoint import store as checkpoint
from switchyard.checkpoint.layout import keep_groups
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.training.loop import train
from switchyard.training.resume import changed_keys, check_resumable, resumed

LAYOUT = {"data_parallel": 4, "expert_parallel": 2, "model_parallel": 2, "optimizer_shard": 1}


@pytest.mark.slow
def test_a_run_goes_on_from_a_checkpoint_of_another_layout(tmp_path, graph, capsys):
    """The checkpoint of step 2, cut for eight devices, goes on on one: bit for bit as if it had never been cut."""
    write_text(tmp_path)
    moe = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2, "groups": 4}
    limits = {"steps": 4, "checkpoint_every": 2}
    train(run_config(tmp_path, moe=moe, train=limits | {"name": "whole"}))
    place = tmp_path / "runs" / "cut" / "checkpoints" / "step-00000002"
    recut.convert(checkpoint.listed(tmp_path / "runs" / "whole")[0], json.dumps(LAYOUT), place)
    assert len(list(place.glob("weights-*-of-00008.safetensors"))) == 8
    train(run_config(tmp_path, moe=moe, train=limits | {"name": "cut"}), resume=True)
    printed = "from data_parallel 4, expert_parallel 2, model_parallel 2, optimizer_shard 1 to one device"
    assert f"resume: the checkpoint is resharded {printed}" in capsys.readouterr().out
    losses = losses_of(tmp_path / "runs" / "whole")
    assert losses_of(tmp_path / "runs" / "cut") == {step: losses[step] for step in (3, 4)}
    one, other = (checkpoint.read(tmp_path / "runs" / name) for name in ("whole", "cut"))
    for kind in ("weights", "optimizer"):
        held, found = getattr(one, kind), getattr(other, kind)
        assert held.keys() == found.keys() and all((held[name] == found[name]).all() for name in held)


@pytest.mark.parametrize(
    "before, now, groups",
    [
        ({"data_parallel": 8}, {}, 8),
        ({"data_parallel": 8, "expert_parallel": 4}, {"data_parallel": 8, "expert_parallel": 2}, 8),
        ({"data_parallel": 8}, {"data_parallel": 4, "model_parallel": 2}, 8),
        ({"data_parallel": 4}, {"data_parallel": 8}, 8),  # four groups cannot be cut in eight
        ({}, {"data_parallel": 2}, 2),
    ],
)
def test_routing_groups_stay_where_the_degrees_allow_it(before, now, groups, capsys):
    old, new = config_of(**before), config_of(**now)
    kept = resumed(old, new)
    assert kept.groups == groups and kept.parallel == new.parallel
    check_resumable(old, keep_groups(old, new))
    assert ("routing groups from now on" in capsys.readouterr().out) == (groups != old.groups)


def test_a_validation_text_may_move_but_neither_come_nor_go():
    """With it all of data.path trains, so without it the sequence of losses would be another."""
    with_text, moved, without = (build({"data": {"val_path": path}}) for path in ("a.txt", "b/a.txt", None))
    check_resumable(with_text, moved)
    for old, new in ((with_text, without), (without, with_text)):
        with pytest.raises(UserError, match=r"^data\.val_path: .*keep it, or choose another train\.name"):
            check_resumable(old, new)


def test_groups_that_are_named_must_be_those_of_the_run():
    old = config_of(data_parallel=8)
    for groups in (4, 8):
        new = build(config_of(data_parallel=4).model_dump() | {"moe": old.moe.model_dump() | {"groups": groups}})
        assert keep_groups(old, new) is new
        if groups == 8:
            check_resumable(old, new)
            continue
        with pytest.raises(UserError, match=r"moe.groups: 4; the run was trained with 8"):
            check_resumable(old, new)


def test_a_dense_run_has_no_groups_to_keep(capsys):
    dense = {"moe": {"expert_num": 1}, "data": {"batch_size": 8}}
    old, new = build(dense | {"parallel": {"data_parallel": 8}}), build(dense)
    assert resumed(old, new) is new
    check_resumable(old, new)
    assert "routing groups" not in capsys.readouterr().out


def test_micro_batches_of_a_pipeline_are_accumulated_on_one_device():
    """As many of them give the same losses; another number is a change like that of gradient accumulation."""
    old = build({"parallel": {"pipeline_stage": 2, "micro_batch_num": 4}})
    check_resumable(old, build({"train": {"gradient_accumulation_steps": 4}}))
    check_resumable(old, build({"parallel": {"pipeline_stage": 4, "micro_batch_num": 4}}))
    for tree in ({}, {"parallel": {"pipeline_stage": 2, "micro_batch_num": 2}}):
        check_resumable(old, build(tree))
        assert list(changed_keys(old, build(tree))) == ["train.gradient_accumulation_steps"]
