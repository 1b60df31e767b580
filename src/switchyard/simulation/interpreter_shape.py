"""Operators that move or make values without arithmetic, in numpy; see interpreter_ops."""

import numpy as np

from switchyard.simulation.interpreter_ops import TYPE_NUMBERS, axes_of, operator


# ---- shape
@operator("Shape")
def shape(_, x):
    """Returns the local shape."""
    return tuple(x.shape)


@operator("Reshape")
def reshape(_, x, to):
    """Returns the same values in another shape."""
    return np.reshape(x, axes_of(to))


@operator("Transpose")
def transpose(_, x, order):
    """Axes in another order."""
    return np.transpose(x, axes_of(order))


@operator("TransposeExtView")
def swap_axes(_, x, first, second):
    """Exchanges two axes; a view."""
    return np.swapaxes(x, int(first), int(second))


@operator("ExpandDims")
def expand_dims(_, x, axis):
    """Adds an axis of length 1."""
    return np.expand_dims(x, int(axis))


@operator("Squeeze")
def squeeze(attributes, x, axis=None):
    """Removes axes of length 1."""
    return np.squeeze(x, axes_of(attributes["axis"] if axis is None else axis) or None)


@operator("Tile")
def tile(_, x, times):
    """Returns x repeated along each axis."""
    return np.tile(x, axes_of(times))


@operator("BroadcastTo")
def broadcast_to(attributes, x, to=None):
    """Returns x repeated to a shape; -1 keeps an axis."""
    to = axes_of(attributes["shape"] if to is None else to)
    kept = (1,) * (len(to) - x.ndim) + x.shape
    return np.broadcast_to(x, tuple(old if new == -1 else new for old, new in zip(kept, to))).copy()


@operator("Concat")
def concat(attributes, parts, axis=None):
    """Tensors behind each other along an axis."""
    return np.concatenate(parts, int(attributes["axis"] if axis is None else axis))


@operator("Stack")
def stack(attributes, parts):
    """Tensors of one shape along a new axis."""
    return np.stack(parts, int(attributes["axis"]))


@operator("Unstack")
def unstack(attributes, x):
    """Returns the tensors stacked along an axis."""
    return tuple(np.moveaxis(x, int(attributes["axis"]), 0))


@operator("Split")
def split(attributes, x, axis=None, number=None):
    """Splits x into equal parts along an axis."""
    number = attributes["output_num"] if number is None else number
    return tuple(np.split(x, int(number), int(attributes["axis"] if axis is None else axis)))


@operator("SplitWithSize")
def split_with_size(_, x, sizes, axis):
    """Parts of given sizes along an axis."""
    return tuple(np.split(x, np.cumsum(axes_of(sizes))[:-1], int(axis)))


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
    """Zeros of a shape with d_out where StridedSlice took it from."""
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


@operator("RepeatInterleaveTensor")
def repeat_interleave(_, x, times, axis, size):
    """Returns each entry as often as `times` says."""
    return np.repeat(x, times, int(axis))


# ---- what gradients ask of shapes that are known at run time only
def concat_offsets(parts, axis):
    """Returns the offset of each tensor in the result of Concat."""
    ends = np.cumsum([part.shape[int(axis)] for part in parts])
    dimensions, place = parts[0].ndim, int(axis) % parts[0].ndim
    starts = [end - part.shape[place] for end, part in zip(ends, parts)]
    return tuple(tuple(start if one == place else 0 for one in range(dimensions)) for start in starts)


def broadcast_axes(x, y):
    """Returns the axes over which the gradients of two operands are summed after a broadcast of both."""
    both = np.broadcast_shapes(x.shape, y.shape)
    return tuple(_repeated(shape, both) for shape in (x.shape, y.shape))


def _repeated(shape, both):
    padded = (1,) * (len(both) - len(shape)) + shape
    new = len(both) - len(shape)
    return tuple(i for i, (own, joint) in enumerate(zip(padded, both)) if i < new or (own == 1 and joint != 1))


def permuted_choices(index):
    """Returns the shapes that the gradient of MoeTokenPermute asks for: only K, the second, is read."""
    return None, (index.shape[1] if index.ndim == 2 else 1,)


SHAPES = {
    "ShapeCalc_g_concat": concat_offsets,
    "ShapeCalc_BroadcastGradientArgs": broadcast_axes,
    "ShapeCalc_moe_token_permute_shapecalc": permuted_choices,
}


@operator("ShapeCalc")
def shape_calc(attributes, *inputs):
    """Computes shapes by a functor of the compiler; an unknown functor is a KeyError."""
    return SHAPES[attributes["functor"]](*inputs)


# ---- constants of a shape
@operator("Zeros")
def zeros(_, to, kind):
    """Zeros of a shape."""
    return np.zeros(axes_of(to), TYPE_NUMBERS[int(kind)])


@operator("Ones")
def ones(_, to, kind):
    """Ones of a shape."""
    return np.ones(axes_of(to), TYPE_NUMBERS[int(kind)])


@operator("FillV2")
def fill(_, to, value):
    """Returns a tensor of one value."""
    return np.full(axes_of(to), value)


@operator("ZerosLikeExt")
def zeros_like(_, x, *rest):
    """Zeros of x's shape and type."""
    return np.zeros_like(x)


@operator("Arange")
def arange(_, first, last, step, kind):
    """Returns first, first + step, ... below last."""
    return np.arange(int(first), int(last), int(step)).astype(TYPE_NUMBERS[int(kind)])


@operator("Range")
def range_of(_, first, last, step, *rest):
    """Returns first, first + step, ... below last, in their type."""
    return np.arange(first, last, step, dtype=np.asarray(first).dtype)
