"""Moving rows by index, in both directions: the gradient of a gather is the gather by the inverse index.

Legend: G groups, N rows of a group, M slots of a group, K choices of a row, D width. A choice is numbered n * K + k.
`dispatch_index` [G, M] names the choice that fills a slot, `combine_index` [G, N * K] the slot that a choice got; both
are legal indices everywhere, and `filled` [G, M] and `kept` [G, N * K], 1.0 or 0.0, say where they mean something.

Where they mean nothing a row of zeros is gathered. A product with 0 would not do: 0 times NaN or Inf is NaN, so one
such row would spoil rows that have nothing to do with it. Gathering from a table with one more row costs two thirds of
gathering and multiplying (forward, 2,048 rows of 256 on two CPU cores: 0.96 and 1.45 ms; with `where` 1.61 ms).
EmbeddingLookup needs no row of zeros and takes a quarter of the time, but MindSpore 2.9's compiler ends with a
segmentation fault where the graph of a whole training step contains it, on CPU and GPU.
"""

from mindspore import Tensor, nn, ops

from switchyard.distributed.mesh import CompiledMesh

SHRINK = 2.0**-8  # of sums over D values: float16 ends at 65,504


def with_zero_row(table: Tensor) -> Tensor:
    """Returns a table with a row of zeros behind its last: [G, N, D] -> [G, N + 1, D]."""
    return ops.concat((table, ops.ZerosLike()(table[:, :1])), 1)


def index_or_zero_row(index: Tensor, mask: Tensor, rows: int) -> Tensor:
    """Returns indices [G, I] where the mask [G, I] is above 0, else `rows`, which names a row of zeros."""
    means = mask.astype(index.dtype)
    return index * means + rows * (1 - means)


def selected(values: Tensor, mask: Tensor) -> Tensor:
    """`masks.keep_where` of operators alone, values and mask of one shape: functions fail in a compiled `bprop`."""
    return ops.Select()(mask > 0, values, ops.ZerosLike()(values))


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


class Dispatch(nn.Cell):
    """Copies rows into slots: [G, N, D] -> [G, M, D]. An empty slot holds zeros, and its gradient goes nowhere."""

    def __init__(self, choices: int):
        super().__init__()
        self.choices = choices
        self.take = TakeRows()

    def construct(
        self, rows: Tensor, dispatch_index: Tensor, combine_index: Tensor, filled: Tensor, kept: Tensor
    ) -> Tensor:
        """`combine_index` and `kept` serve the gradient only."""
        source = index_or_zero_row(dispatch_index // self.choices, filled, rows.shape[1])
        return self.take(with_zero_row(rows), source)  # [G, M, D]

    def bprop(self, rows, dispatch_index, combine_index, filled, kept, out, d_out):
        table = with_zero_row(d_out)  # [G, M + 1, D]
        place = index_or_zero_row(combine_index, kept, out.shape[1])  # [G, N * K]
        d_rows = self.take(table, place[:, 0 :: self.choices])  # [G, N, D]
        for k in range(1, self.choices):
            d_rows = d_rows + self.take(table, place[:, k :: self.choices])
        nothing = ops.zeros_like
        return d_rows, nothing(dispatch_index), nothing(combine_index), nothing(filled), nothing(kept)

    def shard(self, mesh: CompiledMesh) -> None:
        """Works on the groups of one device, whatever their number."""
        self.take = TakeSlicedRows()


class Combine(nn.Cell):
    """Brings the slots' outputs back, weighted: y[n] = sum over k of gates[n, k] * outputs[combine_index[n, k]].

    [G, M, D], gates [G, N * K] -> [G, N, D]. A choice without a slot counts nothing.

    `on_gpu`: rows are weighted by a product of equal shapes, which a GPU does in a quarter of the time.
    """

    def __init__(self, choices: int, on_gpu: bool = False):
        super().__init__()
        self.choices, self.on_gpu = choices, on_gpu
        self.take = TakeRows()
        self.take_gates = TakeRows()
        self.sum, self.ones = ops.MatMul(), ops.Ones()  # functions fail in a compiled `bprop`

    def construct(
        self, outputs: Tensor, gates: Tensor, dispatch_index: Tensor, combine_index: Tensor, filled, kept
    ) -> Tensor:
        table = with_zero_row(outputs)  # [G, M + 1, D]
        place = index_or_zero_row(combine_index, kept, outputs.shape[1])  # [G, N * K]
        gates = selected(gates, kept)
        rows = self._of_choice(table, gates, place, 0)
        for k in range(1, self.choices):
            rows = rows + self._of_choice(table, gates, place, k)
        return rows

    def _of_choice(self, table, gates, place, k):
        weight = ops.expand_dims(gates[:, k :: self.choices], 2).astype(table.dtype)  # [G, N, 1]
        return self._weighted(self.take(table, place[:, k :: self.choices]), weight)  # [G, N, D]

    def _weighted(self, rows, weight):
        """Rows [G, N, D] times weights [G, N, 1]."""
        if not self.on_gpu:
            return rows * weight
        eight = weight.reshape(-1, 1) * self.ones((1, 8), weight.dtype)  # a product wants rows of 16 bytes
        full = self.sum(eight, self.ones((8, rows.shape[-1]), weight.dtype) * 0.125)  # [G * N, D]
        return rows * full.reshape(rows.shape)

    def bprop(self, outputs, gates, dispatch_index, combine_index, filled, kept, out, d_out):
        choice = index_or_zero_row(dispatch_index, filled, gates.shape[1])  # [G, M]
        weight = self.take_gates(with_zero_row(ops.expand_dims(gates, 2)), choice).astype(d_out.dtype)  # [G, M, 1]
        source = index_or_zero_row(dispatch_index // self.choices, filled, out.shape[1])  # [G, M]
        d_outputs = self._weighted(self.take(with_zero_row(d_out), source), weight)  # [G, M, D]
        table, parts = with_zero_row(outputs), ()  # the forward pass' rows again
        place = index_or_zero_row(combine_index, kept, outputs.shape[1])  # [G, N * K]
        for k in range(self.choices):
            picked = self.take(table, place[:, k :: self.choices])  # [G, N, D]
            parts = (*parts, self._row_sums(picked * d_out))  # [G * N, 1]
        d_gates = parts[0] if self.choices == 1 else ops.concat(parts, 1)  # [G * N, K]
        d_gates = d_gates.reshape(gates.shape).astype(gates.dtype) / SHRINK  # [G, N * K]
        d_gates = selected(d_gates, kept)
        nothing = ops.zeros_like
        return d_outputs, d_gates, nothing(dispatch_index), nothing(combine_index), nothing(filled), nothing(kept)

    def _row_sums(self, rows):
        """[G, N, D] -> [G * N, 1], times SHRINK: a product with ones, ten times faster than ReduceSum on CPU."""
        width = rows.shape[-1]
        return self.sum(rows.reshape(-1, width), ops.ones((width, 1), rows.dtype) * SHRINK)

    def shard(self, mesh: CompiledMesh) -> None:
        """Works on the groups of one device, whatever their number."""
        self.take, self.take_gates = TakeSlicedRows(), TakeSlicedRows()
