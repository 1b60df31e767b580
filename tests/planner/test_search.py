"""The planner: which combinations fit, in which order, why the others do not, and what the command line says."""

import json
import subprocess
import sys

import numpy as np
import pytest
from oracles import capacity_law

from switchyard import cli
from switchyard.config import build
from switchyard.errors import UserError
from switchyard.moe.dispatch.capacity import dropped_of_record, dropped_share, slot_shape
from switchyard.planner import search as estimate
from switchyard.planner.costs import costs, stage_costs
from switchyard.planner.search import Load, Speed, plan

SMALL = {"data": {"batch_size": 16}, "moe": {"expert_num": 4, "layers": 2}}
GIGA = 10**9


def planned(tree=SMALL, devices=4, memory=64 * GIGA, **speed):
    return plan(build(tree), devices, memory, 256, Load(), Speed(**speed))


def test_every_feasible_combination_is_one_that_the_laws_allow():
    found = planned()
    for one in found:
        if one.refusal is None:
            build(SMALL | {"parallel": one.parallel})  # raises where a law refuses
    degrees = {(one.parallel["data_parallel"], one.parallel["expert_parallel"]) for one in found if not one.refusal}
    assert degrees == {(4, 1), (4, 2), (4, 4), (2, 1), (2, 2), (1, 1)}


@pytest.mark.parametrize("form", ["dropless", "dropless_static"])
def test_nothing_is_dropped_without_capacities(form):
    """Buffers for the worst case are larger than what a balanced router sends."""
    found = planned(SMALL | {"moe": SMALL["moe"] | {"dispatch": form}})
    assert {one.dropped for one in found if one.costs} == {0.0}
    capacity = next(one for one in planned() if one.parallel == found[0].parallel)
    assert capacity.dropped > 0.0


def test_buffers_cost_more_than_what_is_sent():
    cut = {"parallel": {"data_parallel": 4, "expert_parallel": 2}}
    sent, buffers = (
        costs(build(SMALL | cut | {"moe": SMALL["moe"] | {"dispatch": form}}), 256)
        for form in ("dropless", "dropless_static")
    )
    assert sent.sent < buffers.sent and sent.activations < buffers.activations


def test_the_order_is_that_of_the_stated_rule():
    found = [one for one in planned(flops=3e12, bandwidth=2e9) if one.refusal is None]
    seconds = [one.costs.flops / 3e12 + one.costs.sent / 2e9 for one in found]
    assert seconds == sorted(seconds) == [one.seconds for one in found]


def test_stages_wait_for_each_other_and_share_what_is_held():
    """2 stages, 2 micro-batches: the slower stage has the head too, and works 2 of 3 turns; layers are alike."""
    tree = SMALL | {"model": {"tie_word_embeddings": False}, "train": {"eval_every": 0}}
    found = [one for one in planned(tree, devices=2, flops=1e12, bandwidth=1e30) if one.refusal is None]
    by = {one.parallel["pipeline_stage"]: one for one in found if not one.parallel["recompute"]}
    config = build(tree | {"parallel": {"pipeline_stage": 2, "micro_batch_num": 2}})
    first, last = stage_costs(config, 256)
    rows, width = config.rows, config.model.hidden_size
    assert last.flops - first.flops == 2 * 2 * 3 * rows * width * 256  # the head, of 2 micro-batches
    assert by[2].seconds == pytest.approx(last.flops / 1e12 / 2 * 3 / 2)
    whole = costs(build(tree), 256)
    assert first.weights + last.weights == whole.weights and first.flops + last.flops == 2 * whole.flops
    assert first.exchanged("Send") == last.exchanged("Receive") == 2 * (rows * width + 14) * 4  # rows, one tally


def test_a_slow_wire_prefers_other_degrees_than_slow_products():
    """32 rows and 0.8 million parameters: model slices send rows, data slices gradients, but the head is whole."""
    few = {"data": {"batch_size": 4}, "model": {"seq_length": 8}}
    slow_wire, slow_products = planned(few, bandwidth=1.0)[0], planned(few, flops=1.0)[0]
    assert (slow_wire.parallel["model_parallel"], slow_products.parallel["data_parallel"]) == (4, 4)
    assert slow_wire.costs.sent < slow_products.costs.sent
    assert slow_products.costs.flops < slow_wire.costs.flops


@pytest.mark.parametrize(
    ("tree", "devices", "says"),
    [
        ({"moe": SMALL["moe"] | {"router": "tree"}}, 2, "moe.router: tree; overrides `construct`"),
        ({"moe": SMALL["moe"] | {"dispatch": "dropless"}, "context": {"device_target": "GPU"}}, 2, "moe.dispatch: "),
        ({"model": {"compute_dtype": "bfloat16"}, "context": {"device_target": "GPU"}}, 2, "model.compute_dtype: bf"),
    ],
)
def test_what_training_refuses_is_not_planned(tree, devices, says):
    found = planned(SMALL | tree, devices)
    assert found and all(one.refusal for one in found)
    assert any(one.refusal.startswith(says) for one in found)


def test_a_pipeline_is_planned_without_evaluation_only():
    untied = SMALL | {"model": {"tie_word_embeddings": False}}
    says = "train.eval_every: 500; 0 with parallel.pipeline_stage (2): eval.py scores its checkpoints"
    staged = [one for one in planned(untied, devices=2) if one.parallel["pipeline_stage"] == 2]
    assert {one.refusal for one in staged} == {says}
    staged = planned(untied | {"train": {"eval_every": 0}}, devices=2)
    assert any(one.refusal is None and one.parallel["pipeline_stage"] == 2 for one in staged)


def test_layers_that_stages_do_not_divide_are_planned():
    """3 layers, the second and third conditional: a stage of 2 and one of 1, each with a conditional layer."""
    tree = {"model": {"tie_word_embeddings": False, "num_layers": 3}, "moe": {"expert_num": 4, "layers": [1, 2]}}
    staged = planned(SMALL | tree | {"train": {"eval_every": 0}}, devices=2)
    assert any(one.refusal is None and one.parallel["pipeline_stage"] == 2 for one in staged)
    stages = {"pipeline_stage": 2, "micro_batch_num": 2}
    first, last = stage_costs(build(SMALL | tree | {"train": {"eval_every": 0}, "parallel": stages}), 256)
    whole = costs(build(SMALL | tree), 256)
    assert first.weights + last.weights == whole.weights and first.flops + last.flops == 2 * whole.flops


def test_zero_divides_a_dense_feed_forward_and_experts_among_their_replicas():
    """Two layers of one expert on a device, which has 2 replicas; all else has 8, dense matrices [1, D, F] too."""
    tree = {"data": {"batch_size": 16}, "moe": {"expert_num": 4, "layers": 2}}
    cut = {"data_parallel": 8, "expert_parallel": 4}
    config, zero = (build(tree | {"parallel": cut | {"optimizer_shard": level}}) for level in (0, 1))
    experts = 2 * 2 * 128 * 512  # of two layers
    whole, kept = costs(config, 256).weights // 4, costs(zero, 256).weights // 4
    assert kept == (whole - experts) // 8 + experts // 2


def test_what_one_device_can_do_is_planned_for_one_device():
    recorded = SMALL | {"moe": SMALL["moe"] | {"record": "a.safetensors"}}
    assert any(one.refusal is None for one in planned(recorded, devices=1))


def test_choices_that_are_forced_are_planned_for_several_devices():
    for key, value in (("replay", "a.safetensors"), ("router_warmup_steps", 3)):
        assert any(one.refusal is None for one in planned(SMALL | {"moe": SMALL["moe"] | {key: value}}, devices=2))


def test_reasons_are_the_lines_of_the_laws_and_of_memory():
    tree = {"data": {"batch_size": 6}, "moe": {"expert_num": 3, "layers": 2}, "model": {"num_heads": 4}}
    reasons = {one.refusal for one in planned(tree, devices=8)}
    assert (
        "data.batch_size: 6; must be a multiple of the routing groups (8: moe.groups or parallel.data_parallel)"
        in reasons
    )
    assert "parallel.expert_parallel: 2; must divide moe.expert_num (3)" in reasons
    assert "parallel.model_parallel: 8; must divide the key/value heads (4)" in reasons
    assert "model.tie_word_embeddings: True; False with parallel.pipeline_stage (2)" in reasons
    tight = planned(memory=1000)
    assert all(one.refusal for one in tight)
    assert {one.refusal for one in tight if one.costs} == {"memory: more than the 1e-06 GB of a device"}


@pytest.mark.parametrize("experts, factor", [(8, 1.0), (8, 1.25), (64, 1.0), (64, 1.25)])
def test_the_expected_drops_of_a_balanced_router_are_those_of_the_law(experts, factor):
    tree = {"data": {"batch_size": 16}, "moe": {"expert_num": experts, "capacity_factor": factor}}
    config = build(tree)  # 1,024 rows in one group
    assert dropped_share(config) == pytest.approx(capacity_law.drop_rate(1024, experts, factor), rel=1e-9, abs=1e-15)


def test_equal_shares_are_a_balanced_router_and_one_expert_of_all_drops_what_is_over():
    config = build({"data": {"batch_size": 16}, "moe": {"expert_num": 8, "layers": 2}})
    assert dropped_share(config, np.full((2, 8), 1 / 8)) == pytest.approx(dropped_share(config))
    one = np.eye(8)[:1]  # all choices to expert 0: 1,024 rows, 160 slots
    assert dropped_share(config, one) == pytest.approx((1024 - 160) / 1024)


def test_drops_of_a_record_are_counted_group_by_group():
    """2 groups of 8 rows, 4 experts of 2 slots: 8 to expert 0 drop 6, an even group nothing; -1 and 4 count nowhere."""
    tree = {"data": {"batch_size": 2}, "model": {"seq_length": 8}, "moe": {"expert_num": 4, "capacity_factor": 1.0}}
    config = build(tree | {"parallel": {"data_parallel": 2}})
    assert slot_shape(config)[:3] == (2, 4, 2)
    record = np.array([0] * 8 + [0, 1, 2, 3, 0, 1, 2, 3]).reshape(1, 1, 1, 16, 1)
    assert dropped_of_record(config, record) == 6 / 16
    record[0, 0, 0, 12:] = np.array([[-1], [4], [-1], [4]])
    assert dropped_of_record(config, record) == 6 / 12


def write(tmp_path, text):
    path = tmp_path / "small.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_prints_the_own_layout_the_ranking_and_the_reasons(tmp_path, capsys):
    path = write(
        tmp_path, "moe: {expert_num: 4}\ndata: {batch_size: 16}\nparallel: {data_parallel: 4, expert_parallel: 2}\n"
    )
    out = tmp_path / "plan.json"
    arguments = ["--config", path, "--devices", "4", "--memory", "64GB", "--json", str(out), "model.num_heads=2"]
    assert cli.run(estimate.main, arguments) == 0
    text = capsys.readouterr().out
    assert "the configuration's own layout: dp 4, ep 2" in text
    assert "activations (estimate)" in text
    assert "parallel.model_parallel: 4; must divide the key/value heads (2)" in text
    assert "ranked by seconds = TFLOP / 100 + GB sent / 25" in text
    found = json.loads(out.read_text())
    assert found[0]["refusal"] is None and found[0]["costs"]["weights"] > 0


def test_recorded_tokens_change_the_drops(tmp_path, capsys):
    path, tokens = write(tmp_path, "moe: {expert_num: 4}\ndata: {batch_size: 16}\n"), tmp_path / "tokens.json"
    tokens.write_text("[100, 0, 0, 0]")
    command = ["--config", path, "--devices", "1", "--memory", "64GB", "--tokens-per-expert", str(tokens)]
    assert cli.run(estimate.main, command) == 0
    assert "expected share of dropped choices 68.75%" in capsys.readouterr().out  # 1,024 rows, 320 slots


def test_a_record_of_a_run_is_counted_for_each_layout(tmp_path):
    """16 sequences of 64: all rows of the first half choose expert 0, the others take turns."""
    from switchyard.moe.routing.replay import Recorder

    config, path = build(SMALL), str(tmp_path / "choices.safetensors")
    turns = np.arange(1024) % 4
    chosen = np.where(np.arange(1024) < 512, 0, turns).reshape(1, 1024, 1).repeat(2, 0)  # [M, N, K]
    recorder = Recorder(path, config, "training")
    recorder.add(0, np.zeros((16, 64)), chosen)
    recorder.save()
    load = estimate.read_load(path, config)
    found = plan(config, 2, 64 * GIGA, 256, load, Speed())
    drops = {one.parallel["data_parallel"]: one.dropped for one in found if one.costs}
    assert drops[1] == (512 + 128 - 320) / 1024  # 320 slots in the one group
    assert drops[2] == (512 - 160) / 1024  # 160 in each of two, of which the second is even
    with pytest.raises(UserError, match="recorded with 1024 rows, this run has 512"):
        estimate.read_load(path, build(SMALL | {"data": {"batch_size": 8}}))
    with pytest.raises(UserError, match="recorded with experts 4, this run has 8"):
        estimate.read_load(path, build(SMALL | {"moe": {"expert_num": 8, "layers": 2}}))


@pytest.mark.parametrize(
    "held, line",
    [
        ("[1, 2]", r"holds \[2\] numbers, wants \[4\] or \[2, 4\]"),
        ("{", "must hold a JSON list of numbers"),
        ("[1, -1, 1, 1]", "0 or more"),
        ("[0, 0, 0, 0]", "some above 0"),
    ],
)
def test_tokens_per_expert_that_do_not_fit_are_refused(tmp_path, held, line):
    path = tmp_path / "tokens.json"
    path.write_text(held)
    with pytest.raises(UserError, match=line):
        estimate.read_load(str(path), build(SMALL))


@pytest.mark.parametrize("text, size", [("64GB", 64e9), ("1.5 TB", 1.5e12), ("40GiB", 40 * 2**30), ("1000", 1000)])
def test_sizes(text, size):
    assert estimate.read_size(text) == size


def test_a_size_that_is_none_is_refused():
    with pytest.raises(UserError, match="--memory: much; a number and"):
        estimate.read_size("much")


def test_planning_does_not_wait_for_mindspore():
    code = "import sys; import switchyard.planner.search; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("key", ["experts", "dispatcher"])
def test_parts_of_ones_own_are_refused(key):
    """Nobody here knows their sizes, and their file is not imported."""
    config = build({"moe": {"expert_num": 4, key: "my_file.Mine"}})
    with pytest.raises(UserError, match=rf"^moe\.{key}: my_file\.Mine; the planner knows only shipped ones"):
        estimate.require_shipped(config)


@pytest.mark.parametrize(
    "key, value", [("lora", {"rank": 4}), ("freeze", ["embedding.*"]), ("distill", {"teacher": "x"})]
)
def test_what_trains_a_part_or_two_models_is_refused_by_key(key, value):
    with pytest.raises(UserError, match=rf"^train\.{key}: .*; the planner counts one model whose every parameter"):
        estimate.require_shipped(build({"train": {key: value}}))
