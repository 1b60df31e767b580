"""Implements each operator of a compiled graph in numpy: one function per operator, by family.

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
    "StopGradient": np.asarray,
}  # fmt: skip


def _of_one(function):
    return lambda attributes, x: function(x)  # a further input would be numpy's `out`


def _of_two(function):
    return lambda attributes, x, y: function(x, y)


OPERATORS.update({name: _of_one(function) for name, function in UNARY.items()})
OPERATORS.update({name: _of_two(function) for name, function in BINARY.items()})


@operator("Muls")
def muls(_, x, scalar):
    """Returns x times a number, in x's type."""
    return x * np.asarray(scalar).astype(x.dtype)


@operator("Divs")
def divs(_, x, scalar):
    """Returns x divided by a number, in x's type."""
    return x / np.asarray(scalar).astype(x.dtype)


@operator("AddScalar")
def add_scalar(_, x, scalar, factor=1):
    """Returns x plus a number times a factor, in x's type."""
    return x + np.asarray(scalar * factor).astype(x.dtype)


@operator("SubScalar")
def sub_scalar(_, x, scalar, factor=1):
    """Returns x minus a number times a factor, in x's type."""
    return x - np.asarray(scalar * factor).astype(x.dtype)


@operator("PowTensorScalar")
def pow_scalar(_, x, scalar):
    """Returns x to the power of a number."""
    return x ** np.asarray(scalar).astype(x.dtype)


@operator("ReLU")
def relu(_, x):
    """Returns max(x, 0)."""
    return np.maximum(x, 0)


@operator("ReluGrad")
def relu_grad(_, d_out, out):
    """Returns the gradient of ReLU by its output."""
    return d_out * (out > 0)


@operator("Sigmoid")
def sigmoid(_, x):
    """Returns 1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


@operator("SigmoidGrad")
def sigmoid_grad(_, out, d_out):
    """Returns the gradient of Sigmoid by its output."""
    return d_out * out * (1 - out)


@operator("Softplus")
def softplus(_, x):
    """Returns log(1 + exp(x))."""
    return np.logaddexp(np.zeros_like(x), x)


@operator("SoftplusGrad")
def softplus_grad(_, d_out, x):
    """Returns the gradient of Softplus by its input."""
    return d_out / (1 + np.exp(-x))


@operator("Rsqrt")
def rsqrt(_, x):
    """Returns 1 / sqrt(x)."""
    return 1 / np.sqrt(x)


@operator("RsqrtGrad")
def rsqrt_grad(_, out, d_out):
    """Returns the gradient of Rsqrt by its output."""
    return -0.5 * d_out * out**3


@operator("SqrtGrad")
def sqrt_grad(_, out, d_out):
    """Returns the gradient of Sqrt by its output."""
    return d_out * 0.5 / out


@operator("ReciprocalGrad")
def reciprocal_grad(_, out, d_out):
    """Returns the gradient of Reciprocal by its output."""
    return -d_out * out * out


@operator("TanhGrad")
def tanh_grad(_, out, d_out):
    """Returns the gradient of Tanh by its output."""
    return d_out * (1 - out * out)


@operator("MaximumGrad", "MinimumGrad")
def maximum_grad(attributes, x, y, d_out, *rest):
    """Returns the gradient of Maximum to whichever is larger (Minimum is differentiated by Select)."""
    first = x >= y
    return d_out * first, d_out * ~first


@operator("MulNoNan")
def multiply_no_nan(_, x, y):
    """Returns x times y, and 0 where y is 0, whatever x is."""
    return np.where(y == 0, np.zeros_like(x), x * y)


@operator("Select")
def select(_, condition, x, y):
    """Returns x where the condition holds, else y."""
    return np.where(condition, x, y)


@operator("Cast")
def cast(_, x, kind):
    """Returns x in another type."""
    return np.asarray(x).astype(TYPE_NUMBERS[int(kind)])


@operator("ScalarCast")
def scalar_cast(_, x, kind):
    """Returns a number in another type."""
    return TYPE_NUMBERS[int(kind)](x)


@operator("AddN")
def add_n(_, parts):
    """Returns the sum of a tuple of tensors."""
    return sum(parts[1:], parts[0])


# ---- order and tuples: no arithmetic
@operator("Load", "Depend", "MoveTo")
def first_input(_, x, *rest):
    """Returns the first input as it is."""
    return x


@operator("TensorMove")
def copy(_, x):
    """Returns a copy, which a later update of x in place does not change."""
    return np.array(x)


@operator("UpdateState")
def update_state(_, *inputs):
    """Orders side effects."""
    return Monad()


@operator("MakeTuple", "MakeList")
def make_tuple(_, *inputs):
    """Returns the inputs as a tuple."""
    return tuple(inputs)


@operator("TupleGetItem", "ListGetItem")
def tuple_item(_, parts, index):
    """Returns one entry of a tuple."""
    return parts[int(index)]


# ---- products and reductions
@operator("MatMul", "BatchMatMul")
def matmul(_, a, b, transpose_a, transpose_b):
    """Returns the matrix product over the last two axes; float16 is added up in float32."""
    wide = np.float32 if a.dtype == np.float16 else a.dtype
    a, b = (np.swapaxes(x, -1, -2) if turned else x for x, turned in ((a, transpose_a), (b, transpose_b)))
    return np.matmul(a.astype(wide), b.astype(wide)).astype(a.dtype)


def _reduced(function, x, axes, keep):
    axes = axes_of(axes) or tuple(range(np.ndim(x)))
    return function(x, axis=axes, keepdims=bool(keep)).astype(x.dtype)


@operator("ReduceSum")
def reduce_sum(_, x, axes, keep, skip):
    """Returns the sum over axes."""
    return x if skip and not axes_of(axes) else _reduced(np.sum, x, axes, keep)


@operator("SumExt")
def sum_ext(_, x, axes, keep, kind):
    """Returns the sum over axes, in another type if one is named."""
    return _reduced(np.sum, x, axes, keep).astype(type_of(kind, x.dtype))


@operator("ReduceMean")
def reduce_mean(_, x, axes, keep):
    """Returns the mean over axes."""
    return _reduced(np.mean, x, axes, keep)


@operator("MeanExt")
def mean_ext(_, x, axes, keep, kind):
    """Returns the mean over axes, in another type if one is named."""
    return _reduced(np.mean, x, axes, keep).astype(type_of(kind, x.dtype))


@operator("ReduceMax")
def reduce_max(_, x, axes, keep):
    """Returns the largest value over axes."""
    return _reduced(np.max, x, axes, keep)


@operator("ReduceMin")
def reduce_min(_, x, axes, keep):
    """Returns the smallest value over axes."""
    return _reduced(np.min, x, axes, keep)


@operator("Max")
def largest(_, x):
    """Returns the largest value."""
    return np.max(x)


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


@operator("CumsumExt")
def cumsum_ext(_, x, axis, kind):
    """Returns the running sum along an axis."""
    return np.cumsum(x, int(axis), dtype=type_of(kind, x.dtype))


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
