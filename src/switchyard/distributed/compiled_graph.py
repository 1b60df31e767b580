"""Reads a compiled graph: nodes, collectives and their bytes.

The compiler hands it out as MindIR. It is the final one: after the parallel pass, differentiation and all
optimizations. Reading needs protobuf and the description of the format in the installed MindSpore; MindSpore itself
is imported by the process that compiles alone.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from switchyard.device import mindspore_folder
from switchyard.errors import UserError

COLLECTIVES = ("AllReduce", "AlltoAll", "AlltoAllV", "AlltoAllVC", "AllGather", "ReduceScatter", "Send", "Receive")
CONSTANT, CALL = "Constant", "call "
OWN_GROUP = re.compile(r"ranks_(\d+)_to_(\d+)_by_(\d+)")  # see CompiledMesh.group
ZERO_BY_HAND = "-JoinedSlices/"  # in scopes, see nn.cast

# TensorProto.DataType -> numpy; bfloat16 (16) has no counterpart and is read by its bits
TENSOR_TYPES = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_,
    10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64, 16: np.uint16, 17: np.float64,
}  # fmt: skip
# AttributeProto.AttributeType
FLOAT, DOUBLE, STRING, TENSOR, FLOAT_TENSORS, TENSORS, TUPLE, LIST, NONE = 1, 11, 8, 17, 10, 19, 20, 21, 25
INTEGERS, BOOL, MONADS = (2, 3, 4, 5, 6, 7, 12, 13), 9, (23, 24)
LAYOUT_ATTRIBUTES = ("in_layout", "out_layout", "in_strategy", "out_strategy")


class Monad:
    """Orders side effects in a graph; has no value."""


@dataclass(frozen=True)
class Node:
    """Describes one operation: `kind` with attributes, names of inputs and outputs, its place in the network.

    `shape` and `dtype` are what the compiler says of the output: None where it is no single tensor; -1 is a size that
    is known at run time only.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict
    scope: str = ""
    parameter: str = ""  # whose gradient a collective sums
    instance: str = ""
    shape: tuple[int, ...] | None = None
    dtype: type | None = None


@dataclass
class Graph:
    """Nodes in order of execution; `parameters`: a node's input -> (parameter name, local shape, numpy type)."""

    inputs: list[str]
    outputs: list[str]
    nodes: list[Node]
    parameters: dict[str, tuple[str, tuple[int, ...], type]] = field(default_factory=dict)
    functions: dict[str, "Graph"] = field(default_factory=dict)
    input_shapes: list[tuple[int, ...]] = field(default_factory=list)


def compiled_model(step) -> bytes:
    """Returns the MindIR of a Cell, as it was compiled last."""
    from mindspore.graph.api import _cell_graph_executor

    phase = list(step.compile_cache)[-1]
    return _cell_graph_executor._graph_executor.get_func_graph_proto(phase, "mind_ir", False)


def read_graph(blob: bytes) -> Graph:
    """Parses a MindIR model."""
    model = _format().ModelProto()
    model.ParseFromString(blob)
    primitives = {primitive.name: primitive for primitive in model.primitives}
    attributes = {}
    for name, primitive in primitives.items():
        kept = (part for part in primitive.attribute if part.name not in LAYOUT_ATTRIBUTES)
        attributes[name] = {part.name: value_of(part) for part in kept}
    graph = _graph(model.graph, primitives, attributes)
    graph.functions = {part.name: _graph(part, primitives, attributes) for part in model.functions}
    return graph


@cache
def _format():
    """Returns the module that describes MindIR; loaded by its path, since importing MindSpore takes seconds."""
    if "mindspore" in sys.modules:
        from mindspore.train import mind_ir_pb2

        return mind_ir_pb2
    os.environ.setdefault("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION", "python")  # what the generated file is made for
    path = mindspore_folder() / "train" / "mind_ir_pb2.py"
    spec = importlib.util.spec_from_file_location("switchyard_mind_ir", path)
    if not path.is_file() or spec is None:
        raise UserError(f"mindspore: '{path}' is missing; MindSpore 2.9 has it")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _graph(proto, primitives, attributes) -> Graph:
    parameters = {}
    for part in proto.parameter:
        name = part.ref_key or part.name.split(":")[-1]
        parameters[part.name] = (name, tuple(part.dims), TENSOR_TYPES[part.data_type])
    nodes = [_node(part, primitives, attributes) for part in proto.node]
    shapes = [tuple(part.tensor[0].dims) if part.tensor else () for part in proto.input]
    names = ([part.name for part in proto.input], [part.name for part in proto.output])
    return Graph(*names, nodes, parameters, {}, shapes)


def _node(proto, primitives, attributes) -> Node:
    if proto.op_type == CONSTANT:
        return Node(CONSTANT, (), proto.output[0], {"value": value_of(proto.attribute[0])})
    name = proto.op_type.split("REF::", 1)[-1]
    shapes = [tensor for part in proto.attribute if part.name == "shape" for tensor in part.tensors]
    one = shapes[0] if len(shapes) == 1 else None
    if name not in primitives:
        return Node(CALL + name, tuple(proto.input), proto.output[0], {}, proto.domain)
    marks = {part.name: part.s for part in proto.primal_attr}
    mirrored = marks.get("mirror_user_id") or b""
    return Node(
        primitives[name].op_type,
        tuple(proto.input),
        proto.output[0],
        attributes[name],
        proto.domain,
        mirrored.decode() if isinstance(mirrored, bytes) else mirrored,
        primitives[name].instance_name,
        None if one is None else tuple(one.dims),
        None if one is None else TENSOR_TYPES.get(one.data_type),
    )


def value_of(proto):
    """Returns an attribute's value: number, text, numpy array, tuple of such, None or Monad."""
    kind = proto.type
    if proto.HasField("functor"):
        return proto.functor.name
    if kind in (TUPLE, LIST):
        return tuple(value_of(part) for part in proto.values)
    if kind in (TENSORS, TENSOR):
        arrays = []
        for tensor in proto.tensors or [proto.t]:
            array = TENSOR_TYPES.get(tensor.data_type)  # a type alone, such as that of what a Receive waits for
            if tensor.raw_data or 0 in tensor.dims:
                array = np.frombuffer(tensor.raw_data, TENSOR_TYPES[tensor.data_type]).reshape(tuple(tensor.dims))
            arrays.append(array)
        return arrays[0] if len(arrays) == 1 else tuple(arrays)
    if kind == STRING:
        text = proto.s or (proto.strings[0] if proto.strings else b"")
        return text.decode() if isinstance(text, bytes) else text
    if kind in (*INTEGERS, BOOL):
        number = int(proto.ints[0]) if proto.ints else int(proto.i)
        return bool(number) if kind == BOOL else number
    if kind in (FLOAT, DOUBLE, FLOAT_TENSORS):
        if proto.floats or proto.doubles:
            return (proto.floats or proto.doubles)[0]
        return proto.d if kind == DOUBLE and proto.d else proto.f
    if kind in MONADS:
        return Monad()
    if kind == NONE:
        return None
    raise NotImplementedError(f"MindIR attribute '{proto.name}' of type {kind}")


@dataclass(frozen=True)
class Collective:
    """Describes one communication operator of the graph of a rank.

    Attributes:
        kind: AllReduce, AlltoAll, AllGather, ReduceScatter, AlltoAllV, Send, Receive.
        group: the ranks that take part.
        direction: forward, recompute (forward again in the backward pass), backward or optimizer.
        layer: where in the network: `layers.0.feed_forward`, `embedding`, `loss`, ...
        cause: why the compiler put it there: forward (a sum or such of a sharded axis), redistribution, mirror
            (gradients summed over replicas), optimizer (shards of ZeRO), own (written in the network).
        parameter: whose gradient it sums, for mirrors.
        shape, bytes: of the rank's tensor: what goes in; of AllGather what comes out. Unknown sizes count as 0.
    """

    kind: str
    group: tuple[int, ...]
    direction: str
    layer: str
    cause: str
    parameter: str
    shape: tuple[int, ...]
    bytes: int


def collectives(graph: Graph) -> list[Collective]:
    """Returns every communication operator, in order of execution; operators of a called function once for each
    call."""
    return list(_collectives(graph, graph.functions))


def _collectives(graph: Graph, functions: dict[str, Graph]) -> Iterator[Collective]:
    known = {name: (shape, dtype) for name, (_, shape, dtype) in graph.parameters.items()}
    made = {node.output: node for node in graph.nodes}
    for node in graph.nodes:
        if node.kind.startswith(CALL):
            called = called_by(node, made, functions)
            yield from _collectives(functions[called], functions) if called else ()
        if node.shape is not None:
            known[node.output] = (node.shape, node.dtype)
        if node.kind not in COLLECTIVES:
            continue
        own = (node.shape, node.dtype)
        if node.kind not in ("AllGather", "Receive") and node.inputs:
            own = known.get(node.inputs[0], own)
        shape, dtype = own if own[0] is not None else ((), np.float32)
        size = int(np.prod([max(0, length) for length in shape])) * np.dtype(dtype or np.float32).itemsize
        direction, layer = place_of(node.scope)
        group = group_of(node)
        yield Collective(node.kind, group, direction, layer, _cause(node), node.parameter, tuple(shape), size)


def exchanged(graph: Graph) -> dict[str, tuple[int, int]]:
    """Returns kind of collective -> (number of collectives, their bytes together)."""
    found = {}
    for one in collectives(graph):
        number, size = found.get(one.kind, (0, 0))
        found[one.kind] = number + 1, size + one.bytes
    return found


def sums_may_race(graph: Graph) -> bool:
    """Returns whether MindSpore's GPU backend gives the AllReduce of a graph a stream of their own, on which they race
    with the kernels that make and read them. It does where there are several and an operator reads each; where one
    is handed out as it is, all stay with the kernels. (Source: AssignGpuStream of MindSpore; docs/gpu.md has what
    was seen.)

    `graph`: without functions.
    """
    sums = [node.output for node in graph.nodes if node.kind == "AllReduce"]
    read = set()
    for node in reversed(graph.nodes):
        if node.kind not in ("MakeTuple", "TupleGetItem", "Depend"):
            read.update(node.inputs)
        elif node.output in read:
            read.update(node.inputs[:1] if node.kind == "Depend" else node.inputs)
    return len(sums) > 1 and all(name in read for name in sums)


def called_by(node: Node, made: dict[str, Node], functions: dict[str, "Graph"]) -> str | None:
    """Returns the function that a call runs, if the graph says so: a function by its name, or the backward pass of one.

    `made`: name of a value -> the node of the caller that makes it.
    """
    name = node.kind.removeprefix(CALL)
    while name not in functions and name in made:
        source = made[name]
        if source.kind.startswith(CALL):
            forward = functions[source.kind.removeprefix(CALL)]
            return next((part.inputs[0] for part in forward.nodes if part.kind == "Partial"), None)
        name = source.inputs[0] if source.inputs else ""
    return name if name in functions else None


def partner_of(node: Node) -> int:
    """Returns the rank to which a Send sends, or from which a Receive receives."""
    attributes = node.attributes
    return group_of(node)[attributes["dest_rank" if node.kind == "Send" else "src_rank"]]


def group_of(node: Node) -> tuple[int, ...]:
    """Returns the ranks of a collective; () where the graph does not say.

    Of groups that a network makes itself the graph lists all ranks, so those have their ranks in the name.
    """
    attributes = node.attributes
    named = OWN_GROUP.fullmatch(str(attributes.get("group", "")))
    if named:
        return tuple(range(int(named[1]), int(named[2]) + 1, int(named[3])))
    return tuple(attributes.get("group_rank_ids") or attributes.get("rank_list") or ())


def _cause(node: Node) -> str:
    if node.kind in ("Send", "Receive"):
        return "pipeline"
    name = node.instance
    if ZERO_BY_HAND in node.scope:
        return "optimizer"
    for mark, cause in (("mirror", "mirror"), ("redistribution", "redistribution"), ("parallel_optimizer", "optimizer"),
                        ("forward_op", "forward")):  # fmt: skip
        if mark in name:
            return cause
    return name or "own"


def place_of(scope: str) -> tuple[str, str]:
    """Returns (direction, layer) of a node's scope, such as
    `Gradients/Default/../layers-CellList/0-Block/attention-Attention`.

    In scopes each part is `name-Class`; the class is left out, and so is what stands around the model.
    """
    direction = "forward"
    if scope.startswith("Gradients") or f"{ZERO_BY_HAND}ReduceScatter" in scope:
        direction = "backward"  # a gradient of our own has the scope of its cell
    elif "recompute" in scope.split("/")[0].lower():
        direction = "recompute"
    parts = [re.sub(r"-[A-Za-z_]\w*$", "", part) for part in scope.split("/")[:-1]]
    parts = [part for part in parts if part not in ("Gradients", "Default", "recompute_Default")]
    parts = [part for part in parts if not part.startswith("Grad_")]
    if "optimizer" in parts:
        return "optimizer", "optimizer"
    if "layers" in parts:
        return direction, ".".join(parts[parts.index("layers") :][:3])
    if "model" in parts:
        return direction, ".".join(parts[parts.index("model") + 1 :][:2]) or "model"
    return direction, "loss" if "loss" in parts else parts[-1] if parts else "step"
