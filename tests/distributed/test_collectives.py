"""Golden counts: which collectives the compiler makes of the decoder's training step, and in which groups.

Whatever has no layout would show up here as an AllGather or a StridedSlice around it.
"""

from collections import Counter

import numpy as np
import pytest
from oracles.layouts import DEVICES, DROPLESS, LAYOUTS, RANK, SHORT, VOCAB
from oracles.marks import long_but

from switchyard.config import build
from switchyard.distributed.compiled_graph import sums_may_race
from switchyard.distributed.placement import ParallelDims, kept_slices, placement, stages_of
from switchyard.simulation.compile import compile_step

ALL = tuple(range(8))
FORWARD, BACKWARD = "forward", "backward"

# 15 parameters: table, final norm; of each layer two norms, qkv, out; two dense matrices; router, two of the experts.
# Forward: the sum of valid tokens and the sum of all figures; and the gradients' norm.
GOLDEN = {
    "dp8": {("AllReduce", ALL): 15 + 3},
    "ep8": {("AllReduce", ALL): 13 + 3, ("AlltoAll", ALL): 4},
    "dp8 ep4": {("AllReduce", ALL): 13 + 3, ("AllReduce", (1, 5)): 2, ("AlltoAll", (4, 5, 6, 7)): 4},
    "dp8 ep4 zero1": {
        ("AllReduce", ALL): 3,
        ("AlltoAll", (4, 5, 6, 7)): 4,
        ("AllGather", ALL): 13,
        ("AllGather", (1, 5)): 2,
        ("ReduceScatter", ALL): 13,
        ("ReduceScatter", (1, 5)): 2,
    },
    # gathered again in the backward pass, with the gains of the five norms, which RmsNormGrad reads
    "dp8 ep4 zero3": {
        ("AllReduce", ALL): 3,
        ("AlltoAll", (4, 5, 6, 7)): 4,
        ("AllGather", ALL): 13 + 8 + 5,
        ("AllGather", (1, 5)): 2 + 2,
        ("ReduceScatter", ALL): 13,
        ("ReduceScatter", (1, 5)): 2,
    },
    # (4, 5) are the model slices, (1, 3, 5, 7) the data slices; two attentions, a dense network and the experts each
    # sum over the model slices once forward and once backward
    "dp4 ep2 tp2": {
        ("AllReduce", ALL): 7 + 1,
        ("AllReduce", (1, 3, 5, 7)): 6 + 2,
        ("AllReduce", (1, 5)): 2,
        ("AllReduce", (4, 5)): 8,
        ("AlltoAll", (5, 7)): 4,
    },
    # the attentions' sums become ReduceScatter and AllGather; what goes into an attention, a network, a router or the
    # head is gathered
    "dp4 ep2 tp2 sequence": {
        ("AllReduce", ALL): 7 + 1,
        ("AllReduce", (1, 3, 5, 7)): 6 + 2,
        ("AllReduce", (1, 5)): 2,
        ("AllReduce", (4, 5)): 4,
        ("AllGather", (4, 5)): 5 + 2,
        ("ReduceScatter", (4, 5)): 2 + 5,
        ("AlltoAll", (5, 7)): 4,
    },
    # ranks (4..7) are the last stage, 8 parameters of its layer, norm and head, two of them the experts; gradients are
    # summed once, all else is three times: a micro-batch each. (1, 5) hand rows and tallies to and fro. One sum of norm
    # and figures over all; that of valid tokens, and of the figures forward and backward, in the data slices
    "pp2 dp4 ep2": {
        ("AllReduce", ALL): 1,
        ("AllReduce", (4, 5, 6, 7)): 7 + 3 * 3,
        ("AllReduce", (5, 7)): 2,
        ("AlltoAll", (4, 5)): 3 * 4,
        ("Receive", (1, 5)): 3 * 2,
        ("Send", (1, 5)): 3 * 2,
    },
    "dp8 ep4 recompute": {("AllReduce", ALL): 13 + 3, ("AllReduce", (1, 5)): 2, ("AlltoAll", (4, 5, 6, 7)): 4 + 1},
    # the program of a micro-batch, which is called for each
    "dp8 ep4 accumulation": {("AllReduce", ALL): 13 + 3, ("AllReduce", (1, 5)): 2, ("AlltoAll", (4, 5, 6, 7)): 4},
    "dp8 ep4 float16": {("AllReduce", ALL): 13 + 3, ("AllReduce", (1, 5)): 2, ("AlltoAll", (4, 5, 6, 7)): 4},
    # the counts first, then rows there, ids of their experts, and rows back; of the gradient rows there and back
    "dp8 ep4 dropless": {
        ("AllReduce", ALL): 13 + 3,
        ("AllReduce", (1, 5)): 2,
        ("AlltoAll", (4, 5, 6, 7)): 1,
        ("AlltoAllV", (4, 5, 6, 7)): 3 + 2,
    },
    "dp8 ep4 dropless_static": {
        ("AllReduce", ALL): 13 + 3,
        ("AllReduce", (1, 5)): 2,
        ("AlltoAll", (4, 5, 6, 7)): 1 + 2 + 2,
    },
}


@pytest.fixture(params=long_but(GOLDEN, GOLDEN.keys() & set(SHORT)))
def compiled(request, compile_layout):
    """(name, degrees, report, golden counts) of a layout."""
    name = request.param
    return name, ParallelDims.of(build((LAYOUTS | DROPLESS)[name]).parallel), compile_layout(name), GOLDEN[name]


def test_every_layout_has_golden_counts():
    assert set(GOLDEN) == set(LAYOUTS | DROPLESS)


@pytest.mark.slow
def test_collectives_are_those_of_the_table(compiled):
    name, _, report, golden = compiled
    assert Counter((one.kind, one.group) for one in report.collectives) == golden
    if "dropless" in name:
        kind = "AlltoAll" if "static" in name else "AlltoAllV"
        assert report.count(kind, FORWARD, "layers.1") == 3 and report.count(kind, BACKWARD, "layers.1") == 2
        assert report.operators["GroupedMatmulV4"] == 6  # two products, each with two gradients
        permuted = 0 if "static" in name else 2  # by expert, and again where they arrive
        assert report.operators["MoeTokenPermute"] == permuted == report.operators["InnerMoeTokenUnpermute"]
    elif ("AlltoAll", (4, 5, 6, 7)) in golden and "recompute" not in name:
        assert report.count("AlltoAll", FORWARD, "layers.1") == 2 == report.count("AlltoAll", BACKWARD, "layers.1")


@pytest.mark.slow
def test_on_gpus_no_sum_races_where_there_are_data_slices(compiled):
    """The sum of figures is handed out as it is. A pipeline's is read, but a stage of it is one GPU."""
    name, degrees, report, _ = compiled
    assert degrees.data_parallel > 1 and sums_may_race(report.graph) == ("pp2" in name)


@pytest.mark.slow
def test_norms_are_fused(compiled):
    """Two of each layer and the last; the composed one would take a root of each row's mean. A stage has one layer."""
    name, _, report, _ = compiled
    norms, again = 3 if "pp2" in name else 5, 4 if "recompute" in name else 0
    wanted = {"RmsNorm": norms + again, "RmsNormGrad": norms, "Rsqrt": 0}
    assert {kind: report.operators[kind] for kind in wanted} == wanted


@pytest.mark.slow
def test_communication_settings_order_the_graph_and_change_no_collective(compile_layout):
    """Each gathered weight, and each AlltoAll, is held by one Depend more to what it is to overlap with."""
    settings = {
        "comm_fusion": {"allreduce": "auto", "allgather": 32, "reducescatter": "auto"},
        "transformer_opt": {"computation_allgather_overlap": True, "grad_matmul_communication_overlap": "AlltoAll"},
    }
    name = "dp8 ep4 zero1"
    tree = LAYOUTS[name] | {"parallel": LAYOUTS[name]["parallel"] | settings}
    plain, report = compile_layout(name), compile_step(tree, DEVICES, RANK, vocab=VOCAB)
    assert Counter((one.kind, one.group) for one in report.collectives) == GOLDEN[name]
    assert report.operators["Depend"] == plain.operators["Depend"] + 13 + 4
    by_compiler = [node for node in report.graph.nodes if "parallel_optimizer" in node.instance]
    labels = {node.attributes["fusion"] for node in by_compiler if node.kind in ("AllGather", "ReduceScatter")}
    assert labels and 0 not in labels  # what the device may join


@pytest.mark.slow
def test_rows_are_sliced_only_where_the_sequence_is_cut(compiled):
    """A StridedSlice of a redistribution: of the embedding's rows and of what each feed-forward brings back."""
    name, _, report, _ = compiled
    slices = [node for node in report.graph.nodes if node.kind == "StridedSlice" and node.shape]  # of rows
    made = [node for node in slices if "redistribution" in node.instance]
    assert len(made) == (3 if "sequence" in name else 0)


@pytest.mark.slow
def test_parameters_lie_where_the_placement_says(compiled):
    """Local shapes, those of both moments and of ZeRO's slices too."""
    _, degrees, report, _ = compiled
    whole = {
        "embedding.table": (32, 16),
        "norm.gain": (16,),
        "layers.0.attention.qkv.weight": (16, 48),
        "layers.1.attention.out.weight": (16, 16),
        "layers.0.feed_forward.w_in": (1, 16, 32),
        "layers.1.feed_forward.router.weight": (16, 8),
        "layers.1.feed_forward.experts.w_in": (8, 16, 32),
        "layers.1.feed_forward.experts.w_out": (8, 32, 16),
    }
    stage = degrees.coordinates(RANK).stage
    whole = {name: shape for name, shape in whole.items() if stage == stages_of(name, 2, degrees)[0]}
    for name, shape in whole.items():
        cut = placement(name, shape, degrees)
        local = np.empty(shape)[kept_slices(shape, cut, degrees, RANK)].shape
        for prefix in ("", "moment1.", "moment2."):
            assert report.parameters[prefix + name] == local, prefix + name
