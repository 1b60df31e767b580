"""Implements operators that move or make values without arithmetic, in numpy; see interpreter_ops."""

import numpy as np

from switchyard.simulation.interpreter_ops import OPERATORS, TYPE_NUMBERS, axes_of, operator


def axis_of(attributes, axis) -> int:
    """Returns the axis that an operator's input names, else the axis of its attributes."""
    return int(attributes["axis"] if axis is None else axis)


OPERATORS |= {
    "Shape": lambda _, x: tuple(x.shape),  # of the rank's shard
    "Reshape": lambda _, x, to: np.reshape(x, axes_of(to)),
    "Transpose": lambda _, x, order: np.transpose(x, axes_of(order)),
    "TransposeExtView": lambda _, x, first, second: np.swapaxes(x, int(first), int(second)),
    "ExpandDims": lambda _, x, axis: np.expand_dims(x, int(axis)),
    "Tile": lambda _, x, times: np.tile(x, axes_of(times)),
    "Concat": lambda attributes, parts, axis=None: np.concatenate(parts, axis_of(attributes, axis)),
    "Stack": lambda attributes, parts: np.stack(parts, int(attributes["axis"])),
    "Unstack": lambda attributes, x: tuple(np.moveaxis(x, int(attributes["axis"]), 0)),
    "SplitWithSize": lambda _, x, sizes, axis: tuple(np.split(x, np.cumsum(axes_of(sizes))[:-1], int(axis))),
    "RepeatInterleaveTensor": lambda _, x, times, axis, size: np.repeat(x, times, int(axis)),
    # an unknown functor of the compiler is a KeyError
    "ShapeCalc": lambda attributes, *inputs: SHAPES[attributes["functor"]](*inputs),
    # constants of a shape
    "Zeros": lambda _, to, kind: np.zeros(axes_of(to), TYPE_NUMBERS[int(kind)]),
    "Ones": lambda _, to, kind: np.ones(axes_of(to), TYPE_NUMBERS[int(kind)]),
    "FillV2": lambda _, to, value: np.full(axes_of(to), value),
    "ZerosLikeExt": lambda _, x, *rest: np.zeros_like(x),
    "Range": lambda _, first, last, step, *rest: np.arange(first, last, step, dtype=np.asarray(first).dtype),
    "Arange": lambda _, first, last, step, kind: np.arange(int(first), int(last), int(step)).astype(
        TYPE_NUMBERS[int(kind)]
    ),
}


@operator("Squeeze")
def squeeze(attributes, x, axis=None):
    """Removes axes of length 1."""
    return np.squeeze(x, axes_of(attributes["axis"] if axis is None else axis) or None)


@operator("BroadcastTo")
def broadcast_to(attributes, x, to=None):
    """Returns x repeated to a shape; -1 keeps an axis."""
    to = axes_of(attributes["shape"] if to is None else to)
    kept = (1,) * (len(to) - x.ndim) + x.shape
    return np.broadcast_to(x, tuple(old if new == -1 else new for old, new in zip(kept, to))).copy()


@operator("Split")
def split(attributes, x, axis=None, number=None):
    """Splits x into equal parts along an axis."""
    number = attributes["output_num"] if number is None else number
    return tuple(np.split(x, int(number), axis_of(attributes, axis)))


@operator("StridedSlice")
def strided_slice(_, x, begin, end, step, begin_mask, end_mask, ellipsis, new_axis, shrink):
    """Returns x[begin:end:step] along each axis; bit d of a mask changes axis d."""
    assert not int(ellipsis) and not int(new_axis), "masks of ellipsis and new axes"
    index = []
    for axis, (first, last, stride) in enumerate(zip(axes_of(begin), axes_of(end), axes_of(step))):
        if int(shrink) >> axis & 1:
            index.append(first)
            continue
        begins, ends = int(begin_mask) >> axis & 1, int(end_mask) >> axis & 1
        index.append(slice(None if begins else first, None if ends else last, stride))
    return x[tuple(index)]


@operator("StridedSliceGrad")
def strided_slice_grad(attributes, d_out, to, begin, end, step, *masks):
    """Returns zeros of a shape with d_out where StridedSlice took it from."""
    names = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
    out = np.zeros(axes_of(to), d_out.dtype)
    strided_slice(None, out, begin, end, step, *(masks or [attributes[name] for name in names]))[...] = d_out
    return out


@operator("Slice")
def slice_from(_, x, begin, size):
    """Returns a block of given size."""
    begin = axes_of(begin)
    ends = [length if count == -1 else first + count for first, count, length in zip(begin, axes_of(size), x.shape)]
    return x[tuple(slice(first, last) for first, last in zip(begin, ends))]


# ---- what gradients ask of shapes that are known at run time only
def concat_offsets(parts, axis):
    """Returns the offset of each tensor in the result of Concat."""
    ends = np.cumsum([part.shape[int(axis)] for part in parts])
    dimensions, place = parts[0].ndim, int(axis) % parts[0].ndim
    starts = [end - part.shape[place] for end, part in zip(ends, parts)]
    return tuple(tuple(start if one == place else 0 for one in range(dimensions)) for start in starts)


def broadcast_axes(x, y):
    """Returns the axes over which the gradients of two operands are summed after a broadcast of both."""
    both, axes = np.broadcast_shapes(x.shape, y.shape), ()
    for shape in (x.shape, y.shape):
        new = len(both) - len(shape)
        padded = (1,) * new + shape
        repeated = (i for i, (own, joint) in enumerate(zip(padded, both)) if i < new or (own == 1 and joint != 1))
        axes = (*axes, tuple(repeated))
    return axes


SHAPES = {
    "ShapeCalc_g_concat": concat_offsets,
    "ShapeCalc_BroadcastGradientArgs": broadcast_axes,
    # of MoeTokenPermute's gradient only K, the second, is read
    "ShapeCalc_moe_token_permute_shapecalc": lambda index: (None, (index.shape[1] if index.ndim == 2 else 1,)),
}
