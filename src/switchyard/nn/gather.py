"""Moving rows by index, in both directions: the gradient of a gather is the gather by the inverse index.

Legend: G groups, N rows of a group, M slots of a group, K choices of a row, D width. A choice is numbered n * K + k.
`dispatch_index` [G, M] names the choice that fills a slot, N * K where none does; `combine_index` [G, N * K] names the
slot that a choice got, M where it got none.

The index behind the last row names a row of zeros. A product with 0 would not do: 0 times NaN or Inf is NaN, so one
such row would spoil rows that have nothing to do with it. Gathering from a table with one more row costs two thirds of
gathering and multiplying (forward, 2,048 rows of 256 on two CPU cores: 0.96 and 1.45 ms; with `where` 1.61 ms).
EmbeddingLookup needs no row of zeros and takes a quarter of the time, but MindSpore 2.9's compiler ends with a
segmentation fault where the graph of a whole training step contains it, on CPU and GPU. Gather on a GPU ends the
process at an index beyond the table.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops.auto_generate import SplitWithSize

from switchyard.distributed.mesh import CompiledMesh

SHRINK = 2.0**-8  # of sums over D values: float16 ends at 65,504


def with_zero_row(table: Tensor) -> Tensor:
    """Returns a table with a row of zeros behind its last: [G, N, D] -> [G, N + 1, D]."""
    return ops.concat((table, ops.ZerosLike()(table[:, :1])), 1)


def index_or_zero_row(index: Tensor, mask: Tensor, rows: int) -> Tensor:
    """Returns indices [G, I] where the mask [G, I] is above 0, else `rows`, which names a row of zeros."""
    means = mask.astype(index.dtype)
    return index * means + rows * (1 - means)


class TakeRows(nn.Cell):
    """`table[g, index[g, i]]` without a gradient of its own: [G, N, D], [G, I] -> [G, I, D].

    One group is gathered flat, which is the faster kernel on CPU and GPU.
    """

    def __init__(self):
        super().__init__()
        self.gather, self.gather_flat = ops.Gather(1), ops.Gather()

    def construct(self, table: Tensor, index: Tensor) -> Tensor:
        if table.shape[0] > 1:
            return self.gather(table, index, 1)  # [G, I, D]
        rows = self.gather_flat(table.reshape(table.shape[1:]), index.reshape(-1), 0)  # [I, D]
        return ops.expand_dims(rows, 0)  # [1, I, D]


class TakeSlicedRows(nn.Cell):
    """TakeRows of a device that holds some of the groups: no branch on their number, which only the compiler knows."""

    def __init__(self):
        super().__init__()
        self.gather = ops.Gather(1)

    def construct(self, table: Tensor, index: Tensor) -> Tensor:
        return self.gather(table, index, 1)  # [G, I, D]


class Moving(nn.Cell):
    """Holds what Dispatch and Combine share.

    Args:
        choices: K.
    """

    def __init__(self, choices: int):
        super().__init__()
        self.choices, self.each = choices, (1,) * choices
        self.take, self.split = TakeRows(), SplitWithSize()

    def shard(self, mesh: CompiledMesh) -> None:
        """Works on the groups of one device, whatever their number."""
        self.take = TakeSlicedRows()

    def _of_choices(self, values):
        """Returns the values of the first choices, of the second ones...: [G, N * K] -> K times [G, N]."""
        if self.choices == 1:
            return (values,)
        parts = ()
        for part in self.split(values.reshape(-1, self.choices), self.each, 1):  # [G * N, 1]
            parts = (*parts, part.reshape(values.shape[0], -1))
        return parts


class Dispatch(Moving):
    """Copies rows into slots: [G, N, D] -> [G, M, D]. An empty slot holds zeros, and its gradient goes nowhere.

    Args: as of Moving.
    """

    def construct(self, rows: Tensor, dispatch_index: Tensor, combine_index: Tensor) -> Tensor:
        """`combine_index` serves the gradient only."""
        source = dispatch_index if self.choices == 1 else dispatch_index // self.choices  # N where none
        return self.take(with_zero_row(rows), source)  # [G, M, D]

    def bprop(self, rows, dispatch_index, combine_index, out, d_out):
        table = with_zero_row(d_out)  # [G, M + 1, D]
        slots = self._of_choices(combine_index)
        d_rows = self.take(table, slots[0])  # [G, N, D]
        for slot in slots[1:]:
            d_rows = d_rows + self.take(table, slot)
        return d_rows, ops.zeros_like(dispatch_index), ops.zeros_like(combine_index)


class Combine(Moving):
    """Brings the slots' outputs back, weighted: y[n] = sum over k of gates[n, k] * outputs[combine_index[n, k]].

    [G, M, D], gates [G, N * K] -> [G, N, D]. A choice without a slot counts nothing.

    Args:
        choices: K.
        on_gpu: rows are weighted by a product of equal shapes, which a GPU does in a quarter of the time.
    """

    def __init__(self, choices: int, on_gpu: bool = False):
        super().__init__(choices)
        self.on_gpu, self.take_gates = on_gpu, TakeRows()
        self.sum, self.ones = ops.MatMul(), ops.Ones()  # functions fail in a compiled `bprop`

    def construct(self, outputs: Tensor, gates: Tensor, dispatch_index: Tensor, combine_index: Tensor) -> Tensor:
        """`dispatch_index` serves the gradient only."""
        table, slots, gates = with_zero_row(outputs), self._of_choices(combine_index), self._of_choices(gates)
        rows = self._weighted(self.take(table, slots[0]), gates[0])  # [G, N, D]
        for k in range(1, self.choices):
            rows = rows + self._weighted(self.take(table, slots[k]), gates[k])
        return rows

    def _weighted(self, rows, weight):
        """Rows [G, I, D] times weights [G, I]."""
        weight = ops.expand_dims(weight, 2).astype(rows.dtype)  # [G, I, 1]
        if not self.on_gpu:
            return rows * weight
        eight = (weight * self.ones((1, 1, 8), rows.dtype)).reshape(-1, 8)  # a product wants rows of 16 bytes
        full = self.sum(eight, self.ones((8, rows.shape[-1]), rows.dtype) * 0.125)  # [G * I, D]
        return rows * full.reshape(rows.shape)

    def bprop(self, outputs, gates, dispatch_index, combine_index, out, d_out):
        table, parts = with_zero_row(outputs), ()  # the forward pass' rows again
        for slot in self._of_choices(combine_index):
            parts = (*parts, self._row_sums(self.take(table, slot) * d_out))  # [G * N, 1]
        d_gates = parts[0] if self.choices == 1 else ops.concat(parts, 1)  # [G * N, K]
        d_gates = d_gates.reshape(gates.shape).astype(gates.dtype)  # [G, N * K]
        if d_out.dtype != mstype.float32:
            d_gates = d_gates / SHRINK
        d_outputs = self._to_slots(d_out, gates, dispatch_index)
        return d_outputs, d_gates, ops.zeros_like(dispatch_index), ops.zeros_like(combine_index)

    def _to_slots(self, d_out, gates, dispatch_index):
        """The gradient of the outputs [G, M, D]: the gradient of a slot's row, times its gate."""
        if self.choices == 1:  # weighted by the forward pass' product, before there are more slots than rows
            return self.take(with_zero_row(self._weighted(d_out, gates)), dispatch_index)
        weight = self.take_gates(with_zero_row(ops.expand_dims(gates, 2)), dispatch_index)  # [G, M, 1]
        rows = self.take(with_zero_row(d_out), dispatch_index // self.choices)  # [G, M, D]
        return self._weighted(rows, weight.reshape(dispatch_index.shape))

    def _row_sums(self, rows):
        """[G, N, D] -> [G * N, 1]: a product with ones, ten times faster than ReduceSum on CPU.

        Times SHRINK in half precision, whose largest number is small.
        """
        width = rows.shape[-1]
        ones = self.ones((width, 1), rows.dtype)
        if rows.dtype != mstype.float32:
            ones = ones * SHRINK
        return self.sum(rows.reshape(-1, width), ones)

    def shard(self, mesh: CompiledMesh) -> None:
        """See Moving."""
        super().shard(mesh)
        self.take_gates = TakeSlicedRows()
