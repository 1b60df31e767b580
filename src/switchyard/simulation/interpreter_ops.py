"""Implements the operators of a compiled graph in numpy, by family; one of a single expression is an entry of a table.

A function gets the operator's attributes and its inputs, and returns its output (a tuple where there are several). The
order of inputs is that of MindSpore 2.9's primitives. Where a device would read garbage (an index out of range) an
error is raised, and what it would leave undefined is NaN, so that a leak shows.
"""

import numpy as np

from switchyard.distributed.compiled_graph import Monad

# mindspore.dtype numbers, as they stand in the graph's inputs
TYPE_NUMBERS = {
    30: np.bool_, 32: np.int8, 33: np.int16, 34: np.int32, 35: np.int64, 37: np.uint8, 42: np.float16, 43: np.float32,
    44: np.float64,
}  # fmt: skip
OPERATORS = {}


class IllegalInput(AssertionError):
    """Inputs of which a device would read or make garbage: a fault of the graph, not of the interpreter."""


def operator(*names: str):
    """Registers the function as the implementation of the primitives of these names."""

    def enter(function):
        for name in names:
            OPERATORS[name] = function
        return function

    return enter


def axes_of(value) -> tuple[int, ...]:
    """Returns a number, a tuple or an array as a tuple of whole numbers."""
    return tuple(int(part) for part in np.ravel(value)) if value is not None else ()


def sigmoid(x):
    """Returns 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def type_of(number, otherwise):
    """Returns the numpy type of a mindspore.dtype number."""
    return otherwise if number is None else TYPE_NUMBERS[int(number)]


# ---- elementwise: numpy's function of the same meaning
BINARY = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Minimum": np.minimum, "Maximum": np.maximum,
    "Less": np.less, "LessEqual": np.less_equal, "Greater": np.greater, "GreaterEqual": np.greater_equal,
    "Equal": np.equal, "NotEqual": np.not_equal, "FloorMod": np.mod, "Mod": np.mod, "FloorDiv": np.floor_divide,
    "RealDiv": np.true_divide, "Div": np.true_divide, "Pow": np.power, "LogicalAnd": np.logical_and,
    "LogicalOr": np.logical_or, "LessScalar": np.less, "EqScalar": np.equal, "GreaterEqualScalar": np.greater_equal,
    "RemainderTensorScalar": np.mod, "FloorDivScalar": np.floor_divide,
}  # fmt: skip
UNARY = {
    "Neg": np.negative, "Square": np.square, "Exp": np.exp, "Log": np.log, "Sqrt": np.sqrt, "Tanh": np.tanh,
    "Abs": np.abs, "Floor": np.floor, "LogicalNot": np.logical_not, "Cos": np.cos, "Sin": np.sin,
    "IsFinite": np.isfinite, "ZerosLike": np.zeros_like, "OnesLike": np.ones_like, "Reciprocal": np.reciprocal,
    "StopGradient": np.asarray, "TensorMove": np.array,  # a copy, which a later update of x in place does not change
    "ReLU": lambda x: np.maximum(x, 0), "Sigmoid": sigmoid, "Rsqrt": lambda x: 1 / np.sqrt(x),
    "Softplus": lambda x: np.logaddexp(np.zeros_like(x), x), "Max": np.max,
}  # fmt: skip
# gradients by the operator's own output; those of Softplus and ReLU are below, with their inputs the other way round
BY_OUTPUT = {
    "SigmoidGrad": lambda out, d_out: d_out * out * (1 - out),
    "RsqrtGrad": lambda out, d_out: -0.5 * d_out * out**3,
    "SqrtGrad": lambda out, d_out: d_out * 0.5 / out,
    "ReciprocalGrad": lambda out, d_out: -d_out * out * out,
    "TanhGrad": lambda out, d_out: d_out * (1 - out * out),
}
OPERATORS |= {name: lambda _, x, function=function: function(x) for name, function in UNARY.items()}
OPERATORS |= {
    name: lambda _, x, y, function=function: function(x, y) for name, function in (BINARY | BY_OUTPUT).items()
}
OPERATORS |= {
    "Muls": lambda _, x, scalar: x * np.asarray(scalar).astype(x.dtype),
    "Divs": lambda _, x, scalar: x / np.asarray(scalar).astype(x.dtype),
    "AddScalar": lambda _, x, scalar, factor=1: x + np.asarray(scalar * factor).astype(x.dtype),
    "SubScalar": lambda _, x, scalar, factor=1: x - np.asarray(scalar * factor).astype(x.dtype),
    "PowTensorScalar": lambda _, x, scalar: x ** np.asarray(scalar).astype(x.dtype),
    "ReluGrad": lambda _, d_out, out: d_out * (out > 0),
    "SoftplusGrad": lambda _, d_out, x: d_out / (1 + np.exp(-x)),
    # to whichever is larger; Minimum is differentiated by Select
    "MaximumGrad": lambda _, x, y, d_out, *rest: (d_out * (x >= y), d_out * ~(x >= y)),
    "DivNoNan": lambda _, x, y: np.where(y == 0, np.zeros_like(x), x / np.where(y == 0, np.ones_like(y), y)),
    "MulNoNan": lambda _, x, y: np.where(y == 0, np.zeros_like(x), x * y),  # 0 where y is 0, whatever x is
    "Select": lambda _, condition, x, y: np.where(condition, x, y),
    "Cast": lambda _, x, kind: np.asarray(x).astype(TYPE_NUMBERS[int(kind)]),
    "ScalarCast": lambda _, x, kind: TYPE_NUMBERS[int(kind)](x),
    "AddN": lambda _, parts: sum(parts[1:], parts[0]),
}
OPERATORS["MinimumGrad"] = OPERATORS["MaximumGrad"]

# ---- order and tuples: no arithmetic
OPERATORS |= dict.fromkeys(("Load", "Depend", "MoveTo"), lambda _, x, *rest: x)
OPERATORS |= dict.fromkeys(("MakeTuple", "MakeList"), lambda _, *inputs: inputs)
OPERATORS |= dict.fromkeys(("TupleGetItem", "ListGetItem"), lambda _, parts, index: parts[int(index)])
OPERATORS["UpdateState"] = lambda _, *inputs: Monad()


# ---- products and reductions
@operator("MatMul", "BatchMatMul")
def matmul(_, a, b, transpose_a, transpose_b):
    """Returns the matrix product over the last two axes; float16 is added up in float32."""
    wide = np.float32 if a.dtype == np.float16 else a.dtype
    a, b = (np.swapaxes(x, -1, -2) if turned else x for x, turned in ((a, transpose_a), (b, transpose_b)))
    return np.matmul(a.astype(wide), b.astype(wide)).astype(a.dtype)


def reduced(function, x, axes, keep, kind=None):
    """Returns a reduction of x over axes, all where none is named, in x's type and then in the named type."""
    axes = axes_of(axes) or tuple(range(np.ndim(x)))
    return function(x, axis=axes, keepdims=bool(keep)).astype(x.dtype).astype(type_of(kind, x.dtype))


OPERATORS |= {
    "ReduceSum": lambda _, x, axes, keep, skip: x if skip and not axes_of(axes) else reduced(np.sum, x, axes, keep),
    "ReduceMean": lambda _, x, axes, keep: reduced(np.mean, x, axes, keep),
    "ReduceMax": lambda _, x, axes, keep: reduced(np.max, x, axes, keep),
    "ReduceMin": lambda _, x, axes, keep: reduced(np.min, x, axes, keep),
    "SumExt": lambda _, x, axes, keep, kind: reduced(np.sum, x, axes, keep, kind),
    "MeanExt": lambda _, x, axes, keep, kind: reduced(np.mean, x, axes, keep, kind),
    "CumsumExt": lambda _, x, axis, kind: np.cumsum(x, int(axis), dtype=type_of(kind, x.dtype)),
}


@operator("Argmax")
def argmax(attributes, x, axis=None, *rest):
    """Returns the index of the largest value along an axis, the first of equal ones."""
    return np.argmax(x, int(attributes.get("axis", -1) if axis is None else axis)).astype(np.int32)


@operator("CumSum")
def cumsum(_, x, axis, exclusive, reverse):
    """Returns the running sum along an axis; exclusive: without the entry itself."""
    axis = int(axis)
    x = np.flip(x, axis) if reverse else x
    total = np.cumsum(x, axis, dtype=x.dtype)
    total = total - x if exclusive else total
    return np.flip(total, axis) if reverse else total


# ---- softmax
@operator("Softmax")
def softmax(_, x, axes):
    """Returns exp(x) / sum of exp(x) along an axis."""
    axis = axes_of(axes)[0]
    raised = np.exp(x - x.max(axis, keepdims=True))
    return raised / raised.sum(axis, keepdims=True)


@operator("SoftmaxBackward")
def softmax_backward(_, d_out, out, axis):
    """Returns the gradient of Softmax by its output."""
    return out * (d_out - (d_out * out).sum(axes_of(axis)[0], keepdims=True))


@operator("LogSoftmax")
def log_softmax(attributes, x, axis=None):
    """Returns the log of Softmax."""
    axis = int(attributes["axis"] if axis is None else axis)
    shifted = x - x.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


@operator("LogSoftmaxGrad")
def log_softmax_grad(attributes, out, d_out, axis=None):
    """Returns the gradient of LogSoftmax by its output."""
    axis = int(attributes["axis"] if axis is None else axis)
    return d_out - np.exp(out) * d_out.sum(axis, keepdims=True)
