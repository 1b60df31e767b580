"""What is read off a compiled graph, on graphs typed by hand."""

import numpy as np
import pytest

from switchyard.distributed.compiled_graph import Graph, Node, collectives, sums_may_race


def graph(*nodes: tuple[str, tuple[str, ...], str]) -> Graph:
    """Of (kind, inputs, output)."""
    return Graph(["x"], [nodes[-1][2]], [Node(kind, inputs, output, {}) for kind, inputs, output in nodes])


BOTH = (("AllReduce", ("x",), "a"), ("AllReduce", ("y",), "b"))


@pytest.mark.parametrize(
    ("nodes", "races"),
    [
        ((*BOTH, ("Add", ("a", "b"), "out")), True),
        ((*BOTH, ("Mul", ("a", "a"), "c"), ("MakeTuple", ("b", "c"), "out")), False),  # b is handed out as it is
        ((*BOTH, ("Mul", ("a", "a"), "c"), ("Depend", ("c", "b"), "out")), False),  # waited for, not read
        ((*BOTH, ("Depend", ("b", "a"), "c"), ("Mul", ("c", "a"), "out")), True),  # read through the Depend
        ((*BOTH, ("MakeTuple", ("a", "b"), "c"), ("AddN", ("c",), "out")), True),
        ((*BOTH, ("MakeTuple", ("a", "b"), "c"), ("TupleGetItem", ("c",), "out")), False),
        ((*BOTH, ("Add", ("a", "x"), "c"), ("Reshape", ("b",), "d"), ("MakeTuple", ("c", "d"), "out")), True),
        ((("AllReduce", ("x",), "a"), ("Mul", ("a", "a"), "out")), False),  # one alone stays with the kernels
        ((("Mul", ("x", "x"), "out"),), False),
    ],
)
def test_sums_may_race_where_there_are_several_and_each_is_read(nodes, races):
    assert sums_may_race(graph(*nodes)) is races


@pytest.mark.parametrize("kind, direction", [("AllGather", "forward"), ("ReduceScatter", "backward")])
def test_zero_by_hand_is_the_optimizers_and_its_gradient_is_backward(kind, direction):
    """A gradient written by hand has the scope of its cell, which says nothing of a direction."""
    cell = "Default/model-Decoder/layers-CellList/0-Block/feed_forward-M/narrow_in-MatrixCast/join-JoinedSlices"
    scope = f"{cell}/{kind}-op0"
    node = Node(kind, ("x",), "y", {"group_rank_ids": (0, 1)}, scope, instance="gather", shape=(4,), dtype=np.float32)
    (found,) = collectives(Graph(["x"], ["y"], [node]))
    assert (found.direction, found.layer, found.cause) == (direction, "layers.0.feed_forward", "optimizer")
