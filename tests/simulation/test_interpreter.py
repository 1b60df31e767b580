"""Operators and collectives of the interpreter against numbers typed by hand, and what it refuses."""

import numpy as np
import pytest

from switchyard.distributed.compiled_graph import Graph, Node
from switchyard.simulation import interpreter
from switchyard.simulation.interpreter import ClusterError, NotExecutable, run_cluster
from switchyard.simulation.interpreter_ops import OPERATORS


def sum_graph(group):
    """x -> AllReduce(x) over a group."""
    node = Node("AllReduce", ("x",), "y", {"op": "sum", "group_rank_ids": group}, shape=(), dtype=np.float32)
    return Graph(["x"], ["y"], [node])


def test_ranks_meet_at_a_sum():
    graphs = [sum_graph((0, 2)), sum_graph((1,)), sum_graph((0, 2))]
    outputs, met = run_cluster(graphs, [[np.float32(value)] for value in (1, 2, 4)], [{}] * 3)
    assert [float(out[0]) for out in outputs] == [5, 2, 5]
    assert met == {("AllReduce", (0, 2)): 1, ("AllReduce", (1,)): 1}


def test_a_rank_that_nobody_meets_is_a_deadlock():
    with pytest.raises(ClusterError, match="deadlock"):
        run_cluster([sum_graph((0, 1)), Graph(["x"], ["x"], [])], [[np.float32(1)]] * 2, [{}] * 2)


def test_members_of_different_groups_are_refused():
    with pytest.raises(ClusterError, match=r"rank 0 is at AllReduce \(0, 1\), rank 1 at AllReduce \(1, 0\)"):
        run_cluster([sum_graph((0, 1)), sum_graph((1, 0))], [[np.float32(1)]] * 2, [{}] * 2)


def way(kind, tag=0):
    """Graph of rank 0, which sends x to rank 1, or of rank 1, which receives it."""
    place = {"dest_rank": 1} if kind == "Send" else {"src_rank": 0}
    attributes = {"sr_tag": tag, "group_rank_ids": (0, 1)} | place
    return Graph(["x"], ["y"], [Node(kind, ("x",), "y", attributes, shape=(), dtype=np.float32)])


def test_what_is_sent_is_received():
    outputs, met = run_cluster([way("Send"), way("Receive")], [[np.float32(3)], [np.float32(0)]], [{}] * 2)
    assert [float(out[0]) for out in outputs] == [3, 3]
    assert met == {("Send", (0, 1)): 1}


def test_messages_that_do_not_match_are_refused():
    with pytest.raises(ClusterError, match="rank 0 is at Send 0, rank 1 at its Receive 1"):
        run_cluster([way("Send"), way("Receive", 1)], [[np.float32(3)]] * 2, [{}] * 2)
    with pytest.raises(ClusterError, match="deadlock"):  # nobody receives
        run_cluster([way("Send"), Graph(["x"], ["x"], [])], [[np.float32(3)]] * 2, [{}] * 2)
    with pytest.raises(ClusterError, match=r"rank 1 is at AllReduce \(0, 1\), rank 0 at Send"):
        run_cluster([way("Send"), sum_graph((0, 1))], [[np.float32(3)]] * 2, [{}] * 2)


def test_a_function_hands_out_its_backward_pass_and_adds_to_a_parameter_of_the_caller():
    """forward(p, x) -> (-x, what adds x to p when it is called); p is read after it was handed on."""
    back = Graph(["p", "x", "g"], ["s"], [Node("AssignAdd", ("p", "x"), "s", {})])
    parts = [
        Node("Neg", ("x1",), "n", {}),
        Node("Partial", ("back", "p1", "x1"), "c", {}),
        Node("MakeTuple", ("n", "c"), "o", {}),
    ]
    nodes = [
        Node("Constant", (), "one", {"value": 1}),
        Node("Depend", ("w", "x"), "same", {}),
        Node("call forward", ("same", "x"), "f", {}),
        Node("TupleGetItem", ("f", "one"), "b", {}),
        Node("call b", ("x",), "done", {}),
        Node("Add", ("same", "x"), "y", {}),
    ]
    functions = {"forward": Graph(["p1", "x1"], ["o"], parts), "back": back}
    graph = Graph(["x"], ["y"], nodes, {"w": ("weight", (), np.float32)}, functions)
    weights = {"weight": np.float32(10)}
    ((out,),), _ = run_cluster([graph], [[np.float32(2)]], [weights])
    assert (float(out), float(weights["weight"])) == (14, 12)


def test_an_unknown_operator_is_named():
    graph = Graph(["x"], ["y"], [Node("Fancy", ("x",), "y", {}, "Default/a-A/Fancy-op0")])
    with pytest.raises(ClusterError, match="operator Fancy: cannot be executed"):
        run_cluster([graph], [[1]], [{}])


@pytest.mark.parametrize(
    ("kind", "attributes", "says"),
    [
        ("Neg", {}, "operator Neg: this form cannot be executed: TypeError"),  # of two inputs
        (
            "ShapeCalc",
            {"functor": "ShapeCalc_other"},
            "operator ShapeCalc ShapeCalc_other: this form cannot be executed",
        ),
        ("Assign", {}, "operator Assign: this form cannot be executed"),
    ],
)
def test_a_form_of_an_operator_that_is_not_known_is_named(kind, attributes, says):
    names = ("x", "x") if kind != "Assign" else ("x",)
    graph = Graph(["x"], ["y"], [Node(kind, names, "y", attributes, "Default/a-A/op0")])
    with pytest.raises(NotExecutable, match=says) as caught:
        run_cluster([graph], [[np.ones(2)]], [{}])
    assert "\n" not in str(caught.value)


def test_inputs_that_no_device_allows_are_a_fault_of_the_graph():
    parts = [Node("Constant", (), "axis", {"value": 0}), Node("Gather", ("x", "at", "axis"), "y", {}, "Default/g")]
    graph = Graph(["x", "at"], ["y"], parts)
    with pytest.raises(ClusterError, match=r"^operator Gather: index out of range \(Default/g\)") as caught:
        run_cluster([graph], [[np.ones((2, 3)), np.array([2])]], [{}])
    assert not isinstance(caught.value, NotExecutable)


def test_shapes_that_gradients_ask_for():
    """Where each part of a Concat begins; over which axes the gradients of x + y are summed."""
    x, y = np.ones((3, 4)), np.ones((3, 2))
    assert OPERATORS["ShapeCalc"]({"functor": "ShapeCalc_g_concat"}, (x, y), -1) == ((0, 0), (0, 4))
    assert OPERATORS["ShapeCalc"]({"functor": "ShapeCalc_g_concat"}, (x, x), 0) == ((0, 0), (3, 0))
    axes = OPERATORS["ShapeCalc"]
    assert axes({"functor": "ShapeCalc_BroadcastGradientArgs"}, x, x) == ((), ())
    assert axes({"functor": "ShapeCalc_BroadcastGradientArgs"}, np.ones((2, 3, 4)), np.ones((3, 1))) == ((), (0, 2))
    assert axes({"functor": "ShapeCalc_BroadcastGradientArgs"}, np.ones(4), np.ones((3, 1))) == ((0,), (1,))


def test_another_shape_than_the_compiler_says_is_refused():
    graph = Graph(["x"], ["y"], [Node("Neg", ("x",), "y", {}, shape=(3,), dtype=np.float32)])
    with pytest.raises(ClusterError, match=r"Neg: \(2,\), where the compiler says \(3,\)"):
        run_cluster([graph], [[np.ones(2, np.float32)]], [{}])


def test_all_to_all_moves_parts_and_back():
    held = [np.arange(4).reshape(1, 4), np.arange(4, 8).reshape(1, 4)]
    there = interpreter.all_to_all({"split_dim": 1, "concat_dim": 0}, held)
    assert there[0].tolist() == [[0, 1], [4, 5]] and there[1].tolist() == [[2, 3], [6, 7]]
    back = interpreter.all_to_all({"split_dim": 0, "concat_dim": 1}, there)
    assert [part.tolist() for part in back] == [part.tolist() for part in held]


def test_scatter_is_the_sum_cut():
    parts = interpreter.EXCHANGES["ReduceScatter"]({}, [np.array([1, 2]), np.array([10, 20])])
    assert [part.tolist() for part in parts] == [[11], [22]]
    assert interpreter.EXCHANGES["AllGather"]({}, parts)[1].tolist() == [11, 22]


def test_uneven_parts_must_agree_on_both_sides():
    one, two = np.arange(6.0), np.arange(10.0, 14.0)
    held = [(one, (1, 2), (1, 1)), (two, (1, 1), (2, 1))]
    out = interpreter.all_to_all_v({"block_size": 2}, held)
    assert out[0].tolist() == [0, 1, 10, 11] and out[1].tolist() == [2, 3, 4, 5, 12, 13]
    with pytest.raises(ClusterError, match="a member expects"):
        interpreter.all_to_all_v({"block_size": 2}, [held[0], (two, (1, 1), (1, 2))])
    with pytest.raises(ClusterError, match="receives nothing"):
        interpreter.all_to_all_v({"block_size": 1}, [(one, (0, 6), (0, 0)), (two, (0, 4), (6, 4))])


def test_rows_behind_the_last_group_are_undefined():
    x, w = np.ones((4, 2), np.float32), np.stack([np.eye(2), 2 * np.eye(2)]).astype(np.float32)
    rest = (None,) * 6
    (out,) = OPERATORS["GroupedMatmulV4"](
        {}, (x,), (w,), *rest, np.array([1, 2]), None, None, None, 3, 0, 1, 0, None
    )  # fmt: skip
    assert out[:3].tolist() == [[1, 1], [2, 2], [2, 2]] and np.isnan(out[3]).all()


def test_an_index_out_of_range_is_an_error():
    with pytest.raises(AssertionError, match="index out of range"):
        OPERATORS["Gather"]({}, np.ones((2, 3)), np.array([2]), 0)


@pytest.mark.parametrize(
    "forward, backward, x",
    [
        ("LogSoftmax", lambda y, d: OPERATORS["LogSoftmaxGrad"]({}, y, d, -1), [[0.1, 0.5, -0.3]]),
        ("Rsqrt", lambda y, d: OPERATORS["RsqrtGrad"]({}, y, d), [[0.4, 2.0]]),
        ("Sigmoid", lambda y, d: OPERATORS["SigmoidGrad"]({}, y, d), [[-0.7, 0.2]]),
        ("Sqrt", lambda y, d: OPERATORS["SqrtGrad"]({}, y, d), [[0.4, 2.0]]),
        ("Tanh", lambda y, d: OPERATORS["TanhGrad"]({}, y, d), [[0.4, -2.0]]),
    ],
)
def test_gradients_are_those_of_differences(forward, backward, x):
    x, step = np.array(x), 1e-6
    weight = np.linspace(1, 2, x.size).reshape(x.shape)
    options = (-1,) if forward == "LogSoftmax" else ()
    work = OPERATORS[forward]
    by_formula = backward(work({}, x, *options), weight)
    for place in np.ndindex(x.shape):
        more, less = x.copy(), x.copy()
        more[place] += step
        less[place] -= step
        slope = ((work({}, more, *options) - work({}, less, *options)) * weight).sum() / (2 * step)
        assert abs(slope - by_formula[place]) < 1e-6


def test_adam_weight_decay_is_the_plain_twin():
    """One step with the bias correction folded into rate, eps and decay, as nn.adamw does it."""
    from switchyard.nn.adamw import plain_adamw

    random = np.random.default_rng(0)
    p, g = random.normal(size=5), random.normal(size=5)
    root = np.sqrt(1 - 0.99)
    rate, decay = 0.1 * root / (1 - 0.9), 0.3 * (1 - 0.9) / root
    _, changed = interpreter.adam_weight_decay({}, p, 0 * p, 0 * p, rate, 0.9, 0.99, 1e-8 * root, decay, g)
    wanted = plain_adamw(p, 0 * p, 0 * p, g, 1, 0.1, 0.9, 0.99, 1e-8, 0.3)
    for index, array in enumerate(wanted):
        np.testing.assert_allclose(changed[index], array, rtol=1e-9, atol=1e-12)
