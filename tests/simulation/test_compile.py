"""The report of a simulated compile and the arguments that are refused before anything is compiled."""

from types import SimpleNamespace

import pytest

from switchyard import cli
from switchyard.config import build
from switchyard.data.tokenizer import expected_vocabulary
from switchyard.distributed.compiled_graph import Collective, place_of
from switchyard.errors import UserError
from switchyard.simulation import compile as simulate

EIGHT = {"parallel": {"data_parallel": 8}, "data": {"batch_size": 8}}


def test_devices_must_be_the_product_of_the_degrees():
    with pytest.raises(UserError, match=r"--devices: 16; .* is 8 \* 1 \* 1 = 8: they must be equal"):
        simulate.compile_step(EIGHT, 16)


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(UserError, match=r"rank: 8; these degrees have ranks 0 to 7"):
        simulate.compile_step(EIGHT, 8, rank=8)


def test_the_command_line_refuses_in_one_line(tmp_path, capsys):
    path = tmp_path / "eight.yaml"
    path.write_text("parallel: {data_parallel: 8}\ndata: {batch_size: 8}\n")
    assert cli.run(simulate.main, ["--config", str(path), "--devices", "4"]) == 2
    assert capsys.readouterr().err.startswith("error: --devices: 4;")


def test_the_vocabulary_is_known_without_the_corpus():
    assert expected_vocabulary(build({})) == 256
    with pytest.raises(UserError, match=r"nowhere\.json"):
        expected_vocabulary(build({"data": {"tokenizer": "nowhere.json"}}))


@pytest.mark.parametrize(
    "scope, place",
    [
        ("Default/network-A/total-T/model-Decoder/layers-CellList/1-Block/attention-Attention/rotary-Rotary/AllGather-op0",
         ("forward", "layers.1.attention")),
        ("Gradients/Default/network-A/model-Decoder/layers-CellList/0-Block/feed_forward-MoELayer/Grad_AlltoAll/AlltoAll-op1",
         ("backward", "layers.0.feed_forward")),
        ("recompute_Default/network-A/model-Decoder/layers-CellList/0-Block/AllReduce-op0", ("recompute", "layers.0")),
        ("Default/network-A/model-Decoder/embedding-Embedding/AllReduce-op0", ("forward", "embedding")),
        ("Default/network-A/loss-TrainLoss/total-Total/AllReduce-op0", ("forward", "loss")),
        ("Default/network-A/optimizer-AdamW/AllGather-op0", ("optimizer", "optimizer")),
    ],
)  # fmt: skip
def test_direction_and_layer_are_read_from_the_scope(scope, place):
    assert place_of(scope) == place


@pytest.mark.parametrize(
    "group, text",
    [((0, 1, 2, 3), "0..3"), ((0, 4), "0,4"), ((0, 8, 16), "0,8,..,16"), (tuple(range(64)), "all 64"), ((), "-")],
)
def test_groups_are_said_briefly(group, text):
    assert simulate.ranks_text(group, 64) == text


def test_the_full_shape_of_a_slice():
    """Device matrix [outer 2, expert 4], axis 0 cut by both, axis 1 by the expert axis."""
    assert simulate.full_shape([[2, 4], [[1, 0], -1], [3, 5]], (3, 5)) == (24, 5)
    assert simulate.full_shape([[2, 4], [-1, 0], [3, 5]], (3, 5)) == (3, 20)
    assert simulate.full_shape(None, (3, 5)) == (3, 5)


def test_a_child_that_takes_too_long_is_ended():
    with pytest.raises(UserError, match="sleep: not finished after 0 s"):
        simulate.run_child(["sleep", "30"], {}, 0.3, "sleep")


def test_layers_that_are_alike_are_one_row_of_a_brief_report():
    made = [
        Collective("AlltoAll", (0, 1), "forward", f"layers.{index}.feed_forward", "redistribution", "", (2, 2), size)
        for index, size in ((1, 16), (3, 16), (5, 8))
    ]
    report = SimpleNamespace(collectives=made, devices=8)
    alike = ["AlltoAll", "forward", "layers.*.feed_forward", "redistribution", "0,1"]
    assert simulate.collective_rows(report, brief=True) == [[*alike, "2", "16"], [*alike, "1", "8"]]
    assert len(simulate.collective_rows(report)) == 3
