"""Experts sharded over devices without drops: rows travel to the devices that hold their experts, and back.

What is local to a device is one Morph, collectives of the expert-parallel group included; the router stands before it.
A device sorts its choices by expert, tells the others how many rows it has for each expert (AlltoAll), sends the rows,
sorts what arrives by expert, multiplies group by group, and sends the results back. Two ways to send (`moe.dispatch`):
    dropless         AlltoAllV: exactly the routed rows travel; sizes are known at run time, the host waits for them.
    dropless_static  AlltoAll of buffers that hold the worst case: no dynamic shape, no wait, more memory and traffic.

Every device sends one zero row to each expert besides, so that no expert and no device gets nothing, which operators
leave undefined. A choice that goes nowhere (padding) counts nothing, whatever row it reads.

Rows are put in the order of their experts by MoeTokenPermute and back by MoeTokenUnpermute, or by sorting and
gathering (`context.fused_operators`). Buffers are filled from the table at once, so they have no use for the two.

Legend: T rows of a device, K choices of a row, R = T * K, E experts, Z zero rows, p devices of a group, e = E / p
experts of one, C slots from one device to another, A rows that arrive, D width, F hidden width of a device's slice.
"""

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import get_rank
from mindspore.ops.auto_generate import (
    CumsumExt,
    GroupedMatmulV4,
    IndexSelect,
    MoeTokenPermute,
    MoeTokenUnpermute,
    SortExt,
)

from switchyard.config import Config
from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.errors import UserError
from switchyard.moe.dispatch.capacity import buffer_slots, check_sorted_rows, zero_rows
from switchyard.nn.activation import create_activation
from switchyard.nn.fused import NONE


class AlltoAllV(nn.Cell):
    """Sends rows [N, D] through the experts they chose, on several devices: [N, D]; shapes of all devices together.

    Args:
        config: sizes, `moe.dispatch`, the activation.
        mesh: the devices; communication must be started.
        dtype: of the products and of the rows that travel; gates, weights and result are float32.
        fused: operators of the device, see nn.fused.
        static: by buffers of a fixed size.

    Raises:
        UserError: no Ascend, which alone has these operators; a batch whose sort keys float32 cannot hold.
    """

    def __init__(self, config: Config, mesh: CompiledMesh, dtype, fused: frozenset[str] = NONE, static: bool = False):
        super().__init__()
        moe, degrees = config.moe, mesh.degrees
        if ms.get_context("device_target") != "Ascend":
            raise UserError(f"moe.dispatch: {moe.dispatch}; 'capacity' where degrees shard a model on GPU or CPU")
        self.width, self.expert_num, self.choices = config.model.hidden_size, moe.expert_num, moe.choices
        self.slices, self.own = degrees.expert_parallel, moe.expert_num // degrees.expert_parallel
        self.rows = config.rows // degrees.data_parallel
        self.routed = self.rows * self.choices  # R
        self.slots = buffer_slots(config)  # C
        self.buffered = self.slices > 1 and static
        self.zeros, self.dtype = zero_rows(config, static), dtype  # Z
        self.permute = MoeTokenPermute() if "MoeTokenPermute" in fused and not self.buffered else None
        self.unpermute = MoeTokenUnpermute()
        check_sorted_rows(config, static)
        self.sort, self.take, self.sum, self.prefix = SortExt(), IndexSelect(), ops.ReduceSum(), CumsumExt()
        self.one_hot, self.product = ops.OneHot(), GroupedMatmulV4()
        self.on, self.off = Tensor(1.0, mstype.float32), Tensor(0.0, mstype.float32)
        self.zero_row = Tensor(np.zeros((1, self.width), np.float32))
        gated = config.model.activation == "swiglu"
        self.activation = create_activation(config.model.activation, fused)
        self._join(mesh, degrees)
        rows, within = mesh.layout("data", None), mesh.layout("expert", None, "model")
        inputs = (rows, rows, rows, within, mesh.layout("expert", "model", None)) + ((within,) if gated else ())
        self.local = mesh.local(self.work, inputs, (rows,), first, first)

    def _join(self, mesh: CompiledMesh, degrees) -> None:
        """Collectives of this rank's groups, where they have more than one member."""
        self.over_model, rank = None, get_rank()
        if degrees.model_parallel > 1:
            self.over_model = ops.AllReduce(ops.ReduceOp.SUM, mesh.group(degrees.model_group(rank)))
        if self.slices > 1:
            group = mesh.group(degrees.expert_group(rank))
            self.swap = ops.AlltoAll(self.slices, 0, 0, group)
            self.send_rows = ops.AlltoAllV(group=group, block_size=self.width)
            self.send_ids = ops.AlltoAllV(group=group, block_size=1)
            self.to_host = ops.MoveTo().add_prim_attr("recompute", False)

    def construct(self, rows: Tensor, experts: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, w_gate=None):
        """Takes rows [N, D], experts [G, ..] int32 (E = nowhere), gates [G, ..], matrices; returns rows [N, D]."""
        if w_gate is None:
            return self.local(rows, experts, gates, w_in, w_out)
        return self.local(rows, experts, gates, w_in, w_out, w_gate)

    # ---- from here on shapes are those of one device
    def work(self, rows: Tensor, experts: Tensor, gates: Tensor, w_in: Tensor, w_out: Tensor, w_gate=None) -> Tensor:
        """Takes rows [T, D], experts and gates [g, R / g], matrices [e, D, F], [e, F, D]; returns rows [T, D]."""
        ids = experts.reshape(-1)  # [R]
        real = (ids < self.expert_num).astype(mstype.int32)  # [R]
        if not self.buffered:  # no size may depend on padding: choices that go nowhere go to the experts in turn
            ids = ids * real + ops.arange(self.routed) % self.expert_num * (1 - real)
        ids = ops.concat((ids, (ops.arange(self.zeros) % self.expert_num).astype(ids.dtype)))  # [R + Z]
        weights = (w_in.astype(self.dtype), w_out.astype(self.dtype))
        if w_gate is not None:
            weights = (*weights, w_gate.astype(self.dtype))
        weight = gates.reshape(-1) * real.astype(mstype.float32)  # [R]
        if self.permute is not None:
            out = self.by_permutation(rows, ids, weight, weights)
        else:
            out = self.by_sorting(rows, ids, real, weight, weights)
        return out if self.over_model is None else self.over_model(out)

    def by_permutation(self, rows: Tensor, ids: Tensor, weight: Tensor, weights: tuple) -> Tensor:
        """Maps rows [T, D], experts [R + Z], weights of choices [R] to [T, D], by the fused operators.

        K zero rows are the choices of one further row of zeros, whose result is left out.
        """
        more = self.zeros // self.choices
        table = ops.concat((rows.astype(self.dtype), ops.zeros((more, self.width), self.dtype)))  # [T + Z / K, D]
        table, place = self.permute(table, ids.reshape(-1, self.choices))  # [R + Z, D], [R + Z]
        back = self.through_experts(table, ids, weights).astype(mstype.float32)
        weight = ops.concat((weight, ops.zeros((self.zeros,), mstype.float32))).reshape(-1, self.choices)
        out = self.unpermute(back, place, weight).reshape(self.rows + more, self.width)
        return out[: self.rows]

    def by_sorting(self, rows: Tensor, ids: Tensor, real: Tensor, weight: Tensor, weights: tuple) -> Tensor:
        """Does the same by sorting and gathering; choices whose `real` [R] is 0 go nowhere and read a zero row."""
        table = ops.concat((rows.astype(self.dtype), self.zero_row.astype(self.dtype)))  # [T + 1, D]
        source = self.rows + (ops.arange(self.routed) // self.choices - self.rows) * real  # [R]: the row each reads
        source = ops.concat((source, ops.full((self.zeros,), self.rows, dtype=source.dtype)))  # [R + Z]
        _, order = self.sort(ids.astype(mstype.float32))
        place = self.inverse(order)[: self.routed]  # [R]: where a choice stands among the sorted
        source = self.take(source, 0, order)  # [R + Z]
        if self.buffered:
            back, place = self.through_buffers(table, ids, source, place, real, weights)
        else:
            back = self.through_experts(self.take(table, 0, source), ids, weights)  # [R + Z, D]
        chosen = self.take(back, 0, place).astype(mstype.float32).reshape(self.rows, self.choices, self.width)
        return self.sum(chosen * weight.reshape(self.rows, self.choices, 1), 1)  # [T, D]

    def counts(self, ids: Tensor) -> Tensor:
        """Counts how often each expert stands in ids: [E]."""
        return self.sum(self.one_hot(ids, self.expert_num, self.on, self.off), 0)

    def inverse(self, permutation: Tensor) -> Tensor:
        """Returns where each number stands in a permutation."""
        return self.sort(permutation.astype(mstype.float32))[1]

    def as_counts(self, rows: Tensor) -> Tensor:
        """Returns the rows of each group as GroupedMatmul wants them."""
        return rows.astype(mstype.int64)

    def through_experts(self, rows: Tensor, ids: Tensor, weights: tuple) -> Tensor:
        """Returns what experts make of rows [R + Z, D] in the order of their experts, ids [R + Z] in any order."""
        counts = self.counts(ids)
        if self.slices == 1:
            return self.multiply(rows, self.as_counts(counts), weights)
        counts = counts.reshape(self.slices, self.own)  # [p, e]
        arriving = self.swap(counts)  # [p, e]: from each device for each expert here
        groups = self.as_counts(self.sum(arriving, 0))
        sent, received = self.as_counts(self.sum(counts, 1)), self.as_counts(self.sum(arriving, 1))
        sent = ops.depend(sent, groups)  # one wait for both
        sent, received = self.to_host(sent, "CPU", True), self.to_host(received, "CPU", True)
        arrived = self.send_rows(rows.reshape(-1), sent, received).reshape(-1, self.width)  # [A, D]
        if self.own == 1:
            out = self.multiply(arrived, groups, weights)
        else:
            sorted_ids, _ = self.sort(ids.astype(mstype.float32))
            out = self.multiply_unsorted(arrived, self.send_ids(sorted_ids, sent, received), groups, weights)
        return self.send_rows(out.reshape(-1), received, sent).reshape(-1, self.width)

    def multiply_unsorted(self, rows: Tensor, ids: Tensor, counts: Tensor, weights: tuple) -> Tensor:
        """Does what `multiply` does of rows [A, D] in any order, float32 ids [A] of their experts."""
        if self.permute is not None:  # where A is unknown the compiler forgets D, too
            rows, place = self.permute(rows, ids.astype(mstype.int32))
            out = self.multiply(rows.reshape(-1, self.width), counts, weights)
            return self.unpermute(out, place).reshape(-1, self.width)
        _, order = self.sort(ids)
        return self.take(self.multiply(self.take(rows, 0, order), counts, weights), 0, self.inverse(order))

    def through_buffers(self, table, ids, source, place, real, weights):
        """Sends rows by buffers -> (what came back and a zero row [p * C + 1, D], where each choice stands in it)."""
        counts = self.counts(ids).reshape(self.slices, self.own)  # [p, e]
        arriving = self.swap(counts)  # [p, e]
        sent = self.sum(counts, 1)  # [p]
        start = (self.prefix(sent, 0) - sent).astype(mstype.int32)  # [p]
        slot = ops.expand_dims(ops.arange(self.slots), 0).astype(mstype.int32)  # [1, C]
        full = (slot < sent.astype(mstype.int32).reshape(-1, 1)).astype(mstype.int32)  # [p, C]
        at = ops.minimum(start.reshape(-1, 1) + slot, self.routed + self.expert_num - 1)  # [p, C]
        # an empty slot reads the zero row, whose gradient, undefined like the slot's, is thrown away
        read = self.rows + (self.take(source, 0, at.reshape(-1)) - self.rows) * full.reshape(-1)
        buffers = self.take(table, 0, read).reshape(self.slices, self.slots, self.width)
        arrived = self.swap(buffers).reshape(-1, self.width)  # [p * C, D]
        end = ops.expand_dims(self.prefix(arriving, 1).astype(mstype.int32), 1)  # [p, 1, e]
        passed = (ops.expand_dims(slot, 2) >= end).astype(mstype.float32)  # [p, C, e]
        _, order = self.sort(self.sum(passed, 2).reshape(-1))  # by expert, empty slots last
        out = self.multiply(self.take(arrived, 0, order), self.as_counts(self.sum(arriving, 0)), weights)
        out = self.take(out, 0, self.inverse(order)).reshape(self.slices, self.slots, self.width)
        back = self.swap(out).reshape(-1, self.width)  # [p * C, D]
        back = ops.concat((back, self.zero_row.astype(self.dtype)))
        to = ops.minimum(ids[: self.routed], self.expert_num - 1) // self.own  # [R]
        position = place.astype(mstype.int32) - self.take(start, 0, to)
        nowhere = self.slices * self.slots
        return back, nowhere + (to * self.slots + position - nowhere) * real

    def multiply(self, rows: Tensor, counts: Tensor, weights: tuple) -> Tensor:
        """Applies experts to rows [A, D] sorted by expert, counts [e] each; rows past the last are undefined."""
        hidden = self.grouped(rows, weights[0], counts)  # [A, F]
        if len(weights) == 3:
            hidden = self.activation(self.grouped(rows, weights[2], counts), hidden)
        else:
            hidden = self.activation(hidden)
        return self.grouped(hidden, weights[1], counts)  # [A, D]

    def grouped(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Multiplies rows of each group by its matrix: [A, X], [e, X, Y] -> [A, Y]."""
        none = None  # bias, scales, offsets, activation inputs: not used
        split, by_rows, as_counts, activation = 3, 0, 1, 0
        settings = (split, by_rows, as_counts, activation, none)
        return self.product([rows], [weights], none, none, none, none, none, none, counts, none, none, none, *settings)[
            0
        ]
