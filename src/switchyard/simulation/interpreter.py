"""Executes the compiled graphs of all ranks together, in numpy and in lock step: a cluster in one process.

Every rank runs its graph until it meets a collective, and waits there; when all members of its group wait at the same
one, what each holds is exchanged. Members that meet different collectives, and ranks that wait for ever, are errors.
It proves the graph that the compiler emits, not the kernels, the network or the memory of a device.
"""

from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from switchyard.distributed.compiled_graph import CALL, CONSTANT, Graph, Node, group_of, partner_of
from switchyard.simulation import interpreter_fused, interpreter_index, interpreter_shape  # noqa: F401  (they enter their operators)
from switchyard.simulation.interpreter_ops import OPERATORS, IllegalInput

Arrays = dict[str, np.ndarray]


class ClusterError(Exception):
    """Graphs that cannot be executed together: different collectives, a deadlock, inputs that no operator allows."""


class NotExecutable(ClusterError):
    """Reports an operator, or a form of one, that the interpreter does not know. The graph may still be correct."""


# ---- operators that change parameters: -> (result, {position of an input: its new value})
def adam(attributes, p, m, v, power1, power2, rate, beta1, beta2, eps, gradient, *rest):
    """Computes Adam (arXiv 1412.6980, algorithm 1); the powers are those of the betas."""
    assert not attributes.get("use_nesterov"), "Adam with Nesterov momentum"
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    p = p - rate * np.sqrt(1 - power2) / (1 - power1) * m / (np.sqrt(v) + eps)
    return (p, m, v), {0: p, 1: m, 2: v}


def adam_weight_decay(_, p, m, v, rate, beta1, beta2, eps, decay, gradient, *rest):
    """Computes Adam without bias correction, p decays by rate * decay (ops.AdamWeightDecay)."""
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient * gradient
    p = p - rate * (m / (np.sqrt(v) + eps) + decay * p)
    return (p, m, v), {0: p, 1: m, 2: v}


UPDATES = {
    "Assign": lambda _, parameter, value, *rest: (value, {0: value}),
    "AssignAdd": lambda _, parameter, value, *rest: (parameter + value, {0: parameter + value}),
    "AssignSub": lambda _, parameter, value, *rest: (parameter - value, {0: parameter - value}),
    "Adam": adam,
    "AdamWeightDecay": adam_weight_decay,
}


# ---- collectives: (attributes, what each member holds, in order of the group) -> what each gets
def all_reduce(attributes, inputs):
    """Gives every member the sum, or the largest or smallest."""
    join = {"sum": sum, "max": np.maximum.reduce, "min": np.minimum.reduce}[attributes["op"]]
    return [join(inputs)] * len(inputs)


def all_to_all(attributes, inputs):
    """Sends part q of member r, split along split_dim, to member q, which joins what it receives along concat_dim."""
    parts = [np.split(x, len(inputs), attributes["split_dim"]) for x in inputs]
    return [np.concatenate([part[r] for part in parts], attributes["concat_dim"]) for r in range(len(inputs))]


def all_to_all_v(attributes, inputs):
    """Exchanges parts of any size: (flat x, counts sent, counts received), in units of block_size."""
    block, parts = int(attributes["block_size"]), []
    for x, sent, _ in inputs:
        sizes = [int(count) * block for count in np.ravel(sent)]
        if x.ndim != 1 or len(sizes) != len(inputs) or sum(sizes) != x.size:
            raise ClusterError(f"AlltoAllV: {x.shape} does not hold what is sent, {sizes}")
        parts.append(np.split(x, np.cumsum(sizes)[:-1]))
    out = []
    for r, (_, _, received) in enumerate(inputs):
        sizes = [int(count) * block for count in np.ravel(received)]
        if sizes != [part[r].size for part in parts]:
            raise ClusterError(f"AlltoAllV: a member expects {sizes}, others send {[part[r].size for part in parts]}")
        if not sum(sizes):
            raise ClusterError("AlltoAllV: a rank receives nothing; its output is undefined on the device")
        out.append(np.concatenate([part[r] for part in parts]))
    return out


def all_to_all_vc(attributes, inputs):
    """Exchanges parts by one matrix [source, destination] for all members; `transpose` reads it transposed."""
    matrices = [np.asarray(counts).reshape(len(inputs), len(inputs)) for _, counts in inputs]
    if not all(np.array_equal(matrices[0], matrix) for matrix in matrices):
        raise ClusterError("AlltoAllVC: members hold different matrices")
    counts = matrices[0].T if attributes["transpose"] else matrices[0]
    return all_to_all_v(attributes, [(x, counts[r], counts[:, r]) for r, (x, _) in enumerate(inputs)])


EXCHANGES = {
    "AllReduce": all_reduce,
    "AlltoAll": all_to_all,
    "AlltoAllV": all_to_all_v,
    "AlltoAllVC": all_to_all_vc,
    "AllGather": lambda _, inputs: [np.concatenate(inputs, 0)] * len(inputs),
    "ReduceScatter": lambda _, inputs: np.split(sum(inputs), len(inputs), 0),
    "Send": lambda _, inputs: inputs,  # to the Receive
}
WITH_COUNTS = ("AlltoAllV", "AlltoAllVC")
TRANSFERS = ("Send", "Receive")


@dataclass(frozen=True)
class Reference:
    """Refers to a parameter, whose value is read when an operator reads it."""

    name: str


@dataclass(frozen=True)
class Closure:
    """Holds a function with its first arguments: the backward pass of a call, with the values kept by the forward
    pass."""

    function: Graph
    captured: tuple


HANDED_ON = ("Depend", "MakeTuple", "TupleGetItem")  # they hand on a parameter, and read nothing of it


def run_rank(graph: Graph, inputs: Sequence, weights: Arrays) -> Generator:
    """Runs one rank's graph: yields (node, value) at a collective, is sent the result, returns the outputs.

    `weights` (name -> local array) are changed as the graph's updates say.
    """
    constants = {}  # each is in the graph or in one of its functions, and read by all
    for part in (graph, *graph.functions.values()):
        constants |= {node.output: node.attributes["value"] for node in part.nodes if node.kind == CONSTANT}
    outputs = yield from _run(graph, inputs, weights, graph.functions, constants)
    return tuple(_read(out, weights) for out in outputs)


def _run(graph, inputs, weights, functions, constants) -> Generator:
    """Runs the graph or a function of it; outputs that are parameters stay References."""
    values = dict(zip(graph.inputs, inputs, strict=True)) | constants
    for name, (parameter, _, _) in graph.parameters.items():
        values[name] = Reference(parameter)
    for node in graph.nodes:
        if node.kind == CONSTANT:
            continue
        if node.kind == "Partial":
            captured = tuple(values[name] for name in node.inputs[1:])
            values[node.output] = Closure(functions[node.inputs[0]], captured)
            continue
        given = [values[name] for name in node.inputs]
        if node.kind.startswith(CALL):
            called = node.kind.removeprefix(CALL)
            part = Closure(functions[called], ()) if called in functions else values[called]
            given = (*part.captured, *given)
            (values[node.output],) = yield from _run(part.function, given, weights, functions, constants)
            continue
        operands = given if node.kind in HANDED_ON else [_read(value, weights) for value in given]
        if node.kind in EXCHANGES or node.kind == "Receive":
            out = yield node, tuple(operands) if node.kind in WITH_COUNTS else operands[0]
        elif node.kind in UPDATES:
            out, changed = _computed(UPDATES, node, operands)
            for place, value in changed.items():  # bound anew, never in place: others may hold the old value
                weights[given[place].name] = np.asarray(value).astype(operands[place].dtype)
        else:
            out = _computed(OPERATORS, node, operands)
        values[node.output] = checked(node, out)
    return tuple(values[name] for name in graph.outputs)


def _computed(known, node, operands):
    """Computes one operator (ClusterError: inputs that it does not allow; NotExecutable)."""
    if node.kind not in known:
        raise NotExecutable(f"operator {node.kind}: cannot be executed ({node.scope})")
    try:
        return known[node.kind](node.attributes, *operands)
    except IllegalInput as error:
        raise ClusterError(f"operator {node.kind}: {error} ({node.scope})") from None
    except (AssertionError, TypeError, ValueError, LookupError, AttributeError) as error:
        form = f"{node.kind} {node.attributes.get('functor', '')}".strip()
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise NotExecutable(f"operator {form}: this form cannot be executed: {reason} ({node.scope})") from error


def _read(value, weights):
    """Returns a value without References."""
    if isinstance(value, Reference):
        return weights[value.name]
    return tuple(_read(part, weights) for part in value) if isinstance(value, tuple) else value


def checked(node: Node, out):
    """Returns the output in the type that the compiler says, if it has the shape that it says (ClusterError)."""
    if node.shape is None or not isinstance(out, np.ndarray | np.generic):
        return out
    out = np.asarray(out)
    if len(node.shape) != out.ndim or any(said not in (-1, size) for said, size in zip(node.shape, out.shape)):
        raise ClusterError(f"{node.kind}: {out.shape}, where the compiler says {node.shape} ({node.scope})")
    return out.astype(node.dtype, copy=False)


def run_cluster(
    graphs: Sequence[Graph],
    inputs: Sequence[Sequence],
    weights: Sequence[Arrays],
    exchanges: Mapping[str, Callable] = EXCHANGES,
) -> tuple[list[tuple], Counter]:
    """Runs all ranks to their end.

    Args:
        graphs, inputs, weights: of each rank, in order; the weights are updated.
        exchanges: what collectives do; tests hand in broken ones.

    Returns:
        The outputs of each rank, and how often each (kind, group) met.

    Raises:
        ClusterError: see there.
    """
    running = [run_rank(*parts) for parts in zip(graphs, inputs, weights)]
    outputs, met = [None] * len(running), Counter()
    waiting, answers = {}, dict.fromkeys(range(len(running)))
    while answers or waiting:
        for rank in list(answers):
            try:
                waiting[rank] = running[rank].send(answers.pop(rank))
            except StopIteration as end:
                outputs[rank] = end.value
        for rank in sorted(waiting):
            if rank in waiting:
                _meet(rank, waiting, answers, met, exchanges, len(running))
        if waiting and not answers:
            where = {rank: (node.kind, group_of(node)) for rank, (node, _) in waiting.items()}
            raise ClusterError(f"deadlock: {where}")
    return outputs, met


def _meet(rank, waiting, answers, met, exchanges, size) -> None:
    """Resolves the collective at which a rank waits, if all its group is there."""
    node, _ = waiting[rank]
    if node.kind in TRANSFERS:
        _transfer(rank, waiting, answers, met, exchanges)
        return
    group = group_of(node) or tuple(range(size))
    if not all(member in waiting for member in group):
        return
    for member in group:
        other, _ = waiting[member]
        theirs = group_of(other) or tuple(range(size))
        if (other.kind, theirs) != (node.kind, group):
            raise ClusterError(f"rank {rank} is at {node.kind} {group}, rank {member} at {other.kind} {theirs}")
    results = exchanges[node.kind](node.attributes, [waiting[member][1] for member in group])
    met[node.kind, group] += 1
    for member, result in zip(group, results):
        del waiting[member]
        answers[member] = result


def _transfer(rank, waiting, answers, met, exchanges) -> None:
    """Hands over from a rank that sends to one that receives, if both are there; each waits for the other."""
    node, _ = waiting[rank]
    partner, tag = partner_of(node), node.attributes["sr_tag"]
    other = waiting.get(partner, (None,))[0]
    if other is None or other.kind not in TRANSFERS or other.kind == node.kind or partner_of(other) != rank:
        return
    if other.attributes["sr_tag"] != tag:
        raise ClusterError(
            f"rank {rank} is at {node.kind} {tag}, rank {partner} at its {other.kind} {other.attributes['sr_tag']}"
        )
    sender, receiver = (rank, partner) if node.kind == "Send" else (partner, rank)
    node, sent = waiting[sender]
    (out,) = exchanges["Send"](node.attributes, [sent])
    met["Send", (sender, receiver)] += 1
    answers[sender], answers[receiver] = sent, out
    del waiting[sender], waiting[receiver]
