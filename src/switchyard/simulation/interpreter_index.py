"""Implements operators by index (sort, gather, scatter) and grouped experts, in numpy; see interpreter_ops."""

import numpy as np

from switchyard.simulation.interpreter_ops import OPERATORS, IllegalInput, axes_of, operator


def legal(index: np.ndarray, size: int) -> np.ndarray:
    """Returns the index after a check that every entry is in range (IllegalInput)."""
    if index.size and (index.min() < 0 or index.max() >= size):
        raise IllegalInput("index out of range")
    return index


# ---- sort
@operator("TopK")
def top_k(_, x, count):
    """Returns the largest values along the last axis, and their indices."""
    index = np.argsort(-x, axis=-1, kind="stable")[..., : int(count)]
    return np.take_along_axis(x, index, -1), index.astype(np.int32)


def sort(x, axis, descending, index_type):
    """Returns x sorted along an axis, and the index of each value."""
    index = np.argsort(-x if descending else x, axis=int(axis), kind="stable")
    return np.take_along_axis(x, index, int(axis)), index.astype(index_type)


OPERATORS |= {
    "Sort": lambda attributes, x: sort(x, attributes["axis"], attributes["descending"], np.int32),
    "SortExt": lambda _, x, axis, descending, stable: sort(x, axis, descending, np.int64),
}


@operator("OneHot")
def one_hot(_, index, depth, on, off, axis):
    """Returns `on` at the index along a new axis, `off` elsewhere; an index out of range has none."""
    return np.moveaxis(np.where(index[..., None] == np.arange(int(depth)), on, off), -1, int(axis))


# ---- gather and scatter
OPERATORS |= {
    "GatherD": lambda _, x, axis, index: np.take_along_axis(x, legal(index, x.shape[int(axis)]), int(axis)),
    "IndexSelect": lambda _, x, axis, index: np.take(x, legal(index, x.shape[int(axis)]), int(axis)),
}


@operator("Gather")
def gather(_, x, index, axis, batch_dims=0):
    """Returns entries of x along an axis; batch_dims 1: of each group by itself."""
    axis = int(axis)
    legal(index, x.shape[axis])
    if int(batch_dims) == 0:
        return np.take(x, index, axis)
    assert int(batch_dims) == 1 and axis == 1, "batch_dims of Gather"
    return np.stack([np.take(part, places, 0) for part, places in zip(x, index)])


@operator("GatherDGradV2")
def gather_d_grad(_, x, axis, index, d_out):
    """Adds d_out to where GatherD took it from."""
    out, axis = np.zeros(x.shape, d_out.dtype), int(axis)
    places = list(np.indices(index.shape))
    places[axis] = legal(index, x.shape[axis])
    np.add.at(out, tuple(places), d_out)
    return out


@operator("InplaceIndexAddExt")
def index_add(_, x, axis, index, values, factor):
    """Adds values to rows of x, really in place: an aliasing error of the compiler would show."""
    assert int(axis) == 0 and float(factor) == 1 and x.flags.writeable, "InplaceIndexAddExt"
    np.add.at(x, index, values)
    return x


@operator("ScatterNd")
def scatter_nd(_, index, values, to):
    """Returns zeros of a shape with values added at indices."""
    out = np.zeros(axes_of(to), values.dtype)
    np.add.at(out, tuple(np.moveaxis(index, -1, 0)), values)
    return out


@operator("UnsortedSegmentSum")
def segment_sum(_, x, index, count):
    """Sums the rows of x by segment."""
    out = np.zeros((int(count), *x.shape[index.ndim :]), x.dtype)
    np.add.at(out, legal(index, int(count)), x)
    return out


# ---- grouped experts; rows past the last group are undefined on a device, NaN here
def grouped(x, weights, counts, group_type):
    """Returns the rows of each group times the matrix of the group (type 0), or the gradient of the matrices (type
    2)."""
    counts = np.asarray(counts).astype(np.int64)
    if np.any(counts < 0):
        raise IllegalInput("group_list must not decrease")
    ends = np.cumsum(counts)
    parts = list(zip(ends - counts, ends))
    if int(group_type) == 0:  # x [M, K], weights [E, K, N] -> [M, N]
        assert len(ends) == weights.shape[0] and ends[-1] <= x.shape[0], (x.shape, weights.shape, ends)
        out = np.full((x.shape[0], weights.shape[2]), np.nan, x.dtype)
        for expert, (first, last) in enumerate(parts):
            out[first:last] = x[first:last] @ weights[expert]
        return (out,)
    assert int(group_type) == 2 and x.shape[1] == weights.shape[0] and ends[-1] <= weights.shape[0], "group_type"
    return (np.stack([x[:, first:last] @ weights[first:last] for first, last in parts]),)  # [K, M] by [M, N]


@operator("GroupedMatmul")
def grouped_matmul(_, x, w, bias, scale, offset, aq_scale, aq_offset, group_list, split, kind, turn_a, turn_b):
    """Multiplies each group of rows by its matrix; `group_list` holds the ends of the groups."""
    assert all(part is None for part in (bias, scale, offset, aq_scale, aq_offset)), "GroupedMatmul with bias or scale"
    assert not turn_a and not turn_b and int(split) == 3, "GroupedMatmul"
    return grouped(x[0], w[0], np.diff(group_list, prepend=0), kind)


@operator("GroupedMatmulV4")
def grouped_matmul_v4(_, x, w, *rest):
    """Multiplies each group of rows by its matrix; `group_list` holds counts (list type 1) or the ends of the groups
    (0).
    """
    *unused, group_list, in_a, in_b, in_c, split, kind, list_type, act, _ = rest
    assert all(part is None for part in (*unused, in_a, in_b, in_c)), "GroupedMatmulV4 with bias or scale"
    assert int(split) == 3 and not int(act), "GroupedMatmulV4"
    return grouped(x[0], w[0], group_list if int(list_type) else np.diff(group_list, prepend=0), kind)
