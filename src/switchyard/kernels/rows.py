"""Moving rows by index, in both directions: the gradient of a gather is the gather by the inverse index.

Legend: G groups, N rows of a group, M slots of a group, K choices of a row, D width. A choice is numbered n * K + k.
`choice_of` [G, M] names the choice that fills a slot, `slot_of` [G, N * K] the slot that a choice got; both are
legal indices everywhere, and `filled` [G, M] and `kept` [G, N * K], 1.0 or 0.0, say where they mean something.
"""

from mindspore import Tensor, nn, ops

from switchyard.parallel.mesh import Mesh


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
    """Copies rows into slots: [G, N, D] -> [G, M, D].

    An empty slot holds a copy of some row; nothing reads what an expert makes of it, and its gradient is zero.
    """

    def __init__(self, choices: int):
        super().__init__()
        self.choices = choices
        self.take = TakeRows()

    def construct(self, rows: Tensor, choice_of: Tensor, slot_of: Tensor, kept: Tensor) -> Tensor:
        """`slot_of` and `kept` serve the gradient only."""
        return self.take(rows, choice_of // self.choices)  # [G, M, D]

    def bprop(self, rows, choice_of, slot_of, kept, out, d_out):
        d_rows = self._of_choice(d_out, slot_of, kept, 0)  # [G, N, D]
        for k in range(1, self.choices):
            d_rows = d_rows + self._of_choice(d_out, slot_of, kept, k)
        return d_rows, ops.zeros_like(choice_of), ops.zeros_like(slot_of), ops.zeros_like(kept)

    def _of_choice(self, d_out, slot_of, kept, k):
        mask = ops.expand_dims(kept[:, k :: self.choices], 2)  # [G, N, 1]
        return self.take(d_out, slot_of[:, k :: self.choices]) * mask.astype(d_out.dtype)

    def shard(self, mesh: Mesh) -> None:
        """Works on the groups of one device, whatever their number."""
        self.take = TakeSlicedRows()


class Combine(nn.Cell):
    """Brings the slots' outputs back, weighted: y[n] = sum over k of gates[n, k] * outputs[slot_of[n, k]].

    [G, M, D], gates [G, N * K] -> [G, N, D]. A choice without a slot counts nothing.
    """

    def __init__(self, choices: int):
        super().__init__()
        self.choices = choices
        self.take = TakeRows()
        self.take_gates = TakeRows()
        self.sum = ops.MatMul()

    def construct(self, outputs: Tensor, gates: Tensor, choice_of: Tensor, slot_of: Tensor, filled, kept) -> Tensor:
        rows = self._of_choice(outputs, gates * kept, slot_of, 0)
        for k in range(1, self.choices):
            rows = rows + self._of_choice(outputs, gates * kept, slot_of, k)
        return rows

    def _of_choice(self, outputs, gates, slot_of, k):
        weight = ops.expand_dims(gates[:, k :: self.choices], 2).astype(outputs.dtype)  # [G, N, 1]
        return self.take(outputs, slot_of[:, k :: self.choices]) * weight  # [G, N, D]

    def bprop(self, outputs, gates, choice_of, slot_of, filled, kept, out, d_out):
        weight = self.take_gates(ops.expand_dims(gates, 2), choice_of)  # [G, M, 1]
        weight = (weight * ops.expand_dims(filled, 2)).astype(d_out.dtype)
        d_outputs = self.take(d_out, choice_of // self.choices) * weight  # [G, M, D]
        parts = ()
        for k in range(self.choices):
            picked = self.take(outputs, slot_of[:, k :: self.choices])  # [G, N, D]
            parts = (*parts, self._row_sums(picked * d_out))  # [G * N, 1]
        d_gates = parts[0] if self.choices == 1 else ops.concat(parts, 1)  # [G * N, K]
        d_gates = d_gates.reshape(gates.shape)  # [G, N * K]
        d_gates = d_gates.astype(gates.dtype) * kept
        nothing = ops.zeros_like
        return d_outputs, d_gates, nothing(choice_of), nothing(slot_of), nothing(filled), nothing(kept)

    def _row_sums(self, rows):
        """[G, N, D] -> [G * N, 1]: a product with ones, ten times faster than ReduceSum on CPU."""
        width = rows.shape[-1]
        return self.sum(rows.reshape(-1, width), ops.ones((width, 1), rows.dtype))

    def shard(self, mesh: Mesh) -> None:
        """Works on the groups of one device, whatever their number."""
        self.take, self.take_gates = TakeSlicedRows(), TakeSlicedRows()
