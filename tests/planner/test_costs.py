"""What the planner says a layout costs, against the graph that the compiler makes of it and against numbers by hand."""

from collections import Counter

import pytest
from oracles.layouts import DROPLESS, FURTHER, LAYOUTS, SHORT, VOCAB
from oracles.marks import long_but

from switchyard.config import build
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.stages import stage_config
from switchyard.errors import UserError
from switchyard.planner.costs import Exchange, costs, exchanges, parameters, stage_costs
from switchyard.simulation.compile import OPTIMIZER_STATE, full_shape
from switchyard.training.limits import UNSHARDED_ROUTERS

DENSE = {"model": {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "seq_length": 4, "intermediate_size": 16}}


ALL = LAYOUTS | FURTHER | DROPLESS


@pytest.fixture(params=long_but(ALL, SHORT))
def both(request, compile_layout):
    """(configuration, the compiler's report) of a layout."""
    return build(ALL[request.param]), compile_layout(request.param)


@pytest.mark.slow
def test_exchanges_are_those_of_the_graph(both):
    """Kind, ranks and bytes of every collective, and how many there are of each in the calls of a step."""
    config, report = both
    calls = config.train.gradient_accumulation_steps
    degrees, rank = ParallelDims.of(config.parallel), report.rank
    stage = degrees.coordinates(rank).stage
    groups = {
        "expert": degrees.expert_group,
        "replicas": lambda rank: degrees.along(rank, "outer"),
        "data": lambda rank: degrees.along(rank, "outer", "expert"),
        "model": degrees.model_group,
        "stage": lambda rank: degrees.along(rank, "outer", "expert", "model"),
        "all": lambda rank: tuple(range(degrees.devices)),
        "pipeline": lambda rank: degrees.along(rank, "stage"),
    }
    expected = Counter()
    for one in exchanges(config, VOCAB, stage):
        group = groups[one.group](rank)
        assert one.ranks == len(group)
        expected[one.kind, group, one.bytes] += one.number
    found = Counter((one.kind, one.group, one.bytes) for one in report.collectives * calls)
    for (kind, group, size), number in list(found.items()):
        if kind == "AlltoAllV" and size == 0:  # only the run knows: what comes back is what went there
            del found[kind, group, size]
            found[kind, group, max(size for kind, _, size in expected if kind == "AlltoAllV")] += number
    assert found == expected


@pytest.mark.slow
def test_what_is_held_is_what_the_graph_holds(both):
    """Parameters by name and whole shape, bytes of weights and of the optimizer's state."""
    config, report = both
    held = {name: shape for name, shape in report.parameters.items() if not name.startswith(OPTIMIZER_STATE)}
    stage = ParallelDims.of(config.parallel).coordinates(report.rank).stage
    whole = {name: full_shape(report.layouts[name], shape) for name, shape in held.items()}
    if not config.parallel.optimizer_shard:  # whose cut the compiler's layouts do not tell
        assert parameters(config, VOCAB, stage) == whole
    assert parameters(config, VOCAB, stage).keys() == held.keys()
    cost = stage_costs(config, VOCAB)[stage]
    sums = cost.gradients - (cost.weights if config.parallel.pipeline_stage == 1 else 0)  # a pipeline has only sums
    summed = {"gradients": sums} if sums else {}
    assert {"weights": cost.weights, "optimizer state": cost.optimizer} | summed == report.held_bytes


@pytest.mark.parametrize(("shard", "numbers"), [(0, 8), (1, 1), (3, 1)])
def test_a_routers_bias_is_held_and_has_no_moments(shard, numbers):
    """Two conditional layers of 8 experts on 8 devices: a bias of 8 numbers each, or with ZeRO one of them."""
    parallel, found = {"data_parallel": 8, "optimizer_shard": shard}, {}
    for router in ("sigmoid", "top_k"):
        moe = {"expert_num": 8, "router": router, "layers": [0, 1], "aux_loss_factor": 0.0, "z_loss_factor": 0.0}
        model = DENSE["model"] | {"num_layers": 2}
        found[router] = costs(build({"model": model, "moe": moe, "data": {"batch_size": 8}, "parallel": parallel}), 16)
    assert found["sigmoid"].weights - found["top_k"].weights == 2 * 4 * numbers
    assert found["sigmoid"].optimizer == found["top_k"].optimizer


def test_the_work_of_a_dense_block_by_hand():
    """16 rows, D 8: qkv 8 x 24, out 8 x 8, scores and mix 2 x 4 x 8, feed-forward 2 x 8 x 16, head 8 x 10."""
    config = build(DENSE | {"data": {"batch_size": 4}})
    assert costs(config, 10).flops == 2 * 3 * 16 * (192 + 64 + 64 + 256 + 80)
    halves = build(DENSE | {"data": {"batch_size": 4}, "parallel": {"model_parallel": 2}})
    assert costs(halves, 10).flops == 2 * 3 * 16 * ((192 + 64 + 64 + 256) / 2 + 80)  # the head is whole on both
    again = build(DENSE | {"data": {"batch_size": 4}, "parallel": {"recompute": True}})
    assert costs(again, 10).flops == 2 * 16 * (4 * (192 + 64 + 64 + 256) + 3 * 80)


def test_the_work_of_heads_of_their_own_size_by_hand():
    """2 heads of 16 columns, 1 key/value head: qkv 8 x 64, out 32 x 8, scores and mix 2 x 4 x 32; 16 rows."""
    config = build({"model": DENSE["model"] | {"head_size": 16, "n_kv_heads": 1}, "data": {"batch_size": 4}})
    assert costs(config, 10).flops == 2 * 3 * 16 * (512 + 256 + 256 + 256 + 80)


def test_only_fused_attention_skips_what_lies_outside_a_window():
    """Of 4 keys of a row a window of 3 leaves 3 in one of two layers; 2 heads of 16 columns."""
    model = DENSE["model"] | {"num_layers": 2, "head_size": 16, "compute_dtype": "bfloat16"}
    window = {"sliding_window": 3, "window_layers": [1]}
    trees = [{"model": one, "context": {"device_target": "Ascend"}} for one in (model, model | window)]
    full, less = (costs(build(tree | {"data": {"batch_size": 4}}), 10).flops for tree in trees)
    assert full - less == 2 * 3 * 16 * 2 * 32
    composed = {"context": {"device_target": "Ascend", "fused_operators": False}, "data": {"batch_size": 4}}
    assert costs(build(trees[1] | composed), 10).flops == full


def test_the_work_of_a_shared_expert_of_its_own_width():
    """16 rows through a shared expert of 20 hidden columns in the place of 16: 2 matrices of 8 x 4 more."""
    moe = {"expert_num": 4, "shared_expert_num": 1}
    usual, wide = (
        costs(build(DENSE | {"data": {"batch_size": 4}, "moe": moe | more}), 10).flops
        for more in ({}, {"shared_intermediate_size": 20})
    )
    assert wide - usual == 2 * 3 * 16 * 2 * 8 * 4


def test_a_stage_keeps_the_windows_of_its_layers():
    model = {"num_layers": 4, "sliding_window": 3, "window_layers": [0, 3]}
    config = build({"model": model, "parallel": {"pipeline_stage": 2, "micro_batch_num": 2}})
    assert [stage_config(config, stage).model.window_layers for stage in (0, 1)] == [[0], [1]]


def test_experts_work_by_their_slots():
    """1 group of 16 rows, 4 experts, factor 2: 8 slots each, 32 in all, whoever fills them; the router is 8 x 4."""
    moe = {"expert_num": 4, "capacity_factor": 2.0}
    config = build(DENSE | {"data": {"batch_size": 4}, "moe": moe})
    assert costs(config, 10).flops == 2 * 3 * (16 * (192 + 64 + 64 + 8 * 4 + 80) + 32 * 256)


def test_one_device_sends_nothing():
    assert costs(build(DENSE), 10).exchanges == ()


def test_bytes_that_leave_a_device():
    """Of 100 bytes in a ring of 4: three quarters, and twice that where they are summed and handed round."""
    assert Exchange("AlltoAll", "expert", 4, 100).sent == 75
    assert Exchange("AllReduce", "data", 4, 100, 2).sent == 300


def test_activations_shrink_with_what_cuts_or_repeats_them():
    plain = {"data": {"batch_size": 64}, "moe": {"expert_num": 8}}

    def kept(**parallel):
        return costs(build(plain | {"parallel": parallel}), 256).activations

    assert kept(data_parallel=2) == kept() / 2
    assert kept(recompute=True) < kept()
    assert kept(model_parallel=2, sequence_parallel=True) < kept(model_parallel=2) < kept()


def test_fused_attention_keeps_no_weights():
    """Of 64 rows of a head 16 float32 numbers each, in the place of 64 float32 and 64 in half precision."""
    half = {"model": {"hidden_size": 64, "seq_length": 64, "compute_dtype": "bfloat16", "num_layers": 1}}
    tree = half | {"moe": {"expert_num": 1}, "data": {"batch_size": 1}, "context": {"device_target": "Ascend"}}
    composed = tree | {"context": {"device_target": "Ascend", "fused_operators": False}}
    less = costs(build(composed), 256).activations - costs(build(tree), 256).activations
    assert less == 64 * 4 * (64 * (4 + 2) - 16 * 4)


@pytest.mark.slow
def test_half_precision_takes_the_fused_operators(compile_layout):
    """Two attentions, of which each normalises queries and keys; a dense network, a shared expert and the experts,
    which have a gate each; the other norms are LayerNorm."""
    operators = compile_layout("rich dp4 ep2 tp2").operators
    for name, number in (("FlashAttentionScore", 2), ("Swiglu", 3), ("RmsNorm", 4)):
        assert operators[name] == number == operators[f"{name}Grad"]
    assert compile_layout("rich dp4 ep2 tp2 dropless recompute zero1").operators["MoeTokenPermute"] == 4  # two again


@pytest.mark.parametrize(
    "tree, line",
    [
        ({"moe": {"expert_num": 4, "router": "tree"}}, r"moe\.router: tree; overrides `construct`, which a"),
        ({"model": {"type": "vision"}}, r"model\.type: vision; only networks that read text"),
        ({"parallel": {"pipeline_stage": 2, "micro_batch_num": 2}}, r"model\.tie_word_embeddings: True; False with"),
    ],
)
def test_what_the_step_refuses_is_refused(tree, line):
    with pytest.raises(UserError, match=line):
        costs(build(tree), 256)


def test_the_routers_that_are_refused_are_those_that_override_construct():
    from switchyard.moe.routing.base import known_routers

    assert tuple(name for name, router in known_routers().items() if router.overrides_construct) == UNSHARDED_ROUTERS
