"""A tensor in another type, also where it is sharded over devices."""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.communication import get_rank

from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.distributed.placement import axes_of, optimizer_cut


class Cast(nn.Cell):
    """x [...] -> x in `dtype`; nothing where it has that type already."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.local = self.work

    def construct(self, x: Tensor) -> Tensor:
        return self.local(x)

    def work(self, x: Tensor) -> Tensor:
        """The cast itself."""
        return x.astype(self.dtype)

    def shard(self, mesh: CompiledMesh, *axes: str | None) -> None:
        """Shards x along `axes`, before and after."""
        dtype, layout = self.dtype, mesh.layout(*axes)

        def types(x):
            return dtype

        self.local = mesh.local(self.work, (layout,), (layout,), first, types)


class JoinedSlices(nn.Cell):
    """Gathers the parts of a stacked matrix from its replicas, in a type: [E, X / r, Y] -> [E, X, Y].

    The gradient is summed over the replicas in float32, and each keeps its part of it (ZeRO, arXiv 1910.02054).

    Args:
        group: name of the communication group of the replicas.
        parts: r, the number of replicas.
        dtype: of the result.
    """

    def __init__(self, group: str, parts: int, dtype):
        super().__init__()
        self.parts, self.dtype = parts, dtype
        self.gather, self.scatter = ops.AllGather(group), ops.ReduceScatter(ops.ReduceOp.SUM, group)
        self.reshape, self.transpose, self.cast = ops.Reshape(), ops.Transpose(), ops.Cast()

    def construct(self, part: Tensor) -> Tensor:
        """Takes a part [E, X / r, Y] float32."""
        experts, rows, columns = part.shape
        whole = self.gather(self.cast(part, self.dtype))  # [r * E, X / r, Y]
        if experts > 1:
            whole = self.reshape(whole, (self.parts, experts, rows, columns))
            whole = self.transpose(whole, (1, 0, 2, 3))  # [E, r, X / r, Y]
        return self.reshape(whole, (experts, self.parts * rows, columns))  # [E, X, Y]

    def bprop(self, part, out, d_out):
        experts, rows, columns = part.shape
        gradient = self.cast(d_out, mstype.float32)
        if experts > 1:
            gradient = self.reshape(gradient, (experts, self.parts, rows, columns))
            gradient = self.transpose(gradient, (1, 0, 2, 3))  # [r, E, X / r, Y]
        return (self.scatter(self.reshape(gradient, (self.parts * experts, rows, columns))),)  # [E, X / r, Y]


class MatrixCast(Cast):
    """A stacked matrix [E, ., .] in `dtype`, whole where ZeRO cuts it along axis 1.

    Attributes:
        joins: whether ZeRO cuts it so.
    """

    def __init__(self, dtype):
        super().__init__(dtype)
        self.joins, self.join = False, None

    def gather(self, part: Tensor) -> Tensor:
        """Returns the whole of a part, see JoinedSlices."""
        return self.join(part)

    def shard_matrix(self, mesh: CompiledMesh, weight: Parameter) -> None:
        """Shards as `axes_of` says; along axis 1 ZeRO's part goes in and the whole comes out."""
        axes = axes_of(weight.name, 3)
        axis, parts = optimizer_cut(weight.shape, axes, mesh.degrees)
        if axis == 0:
            self.shard(mesh, *axes)
            return
        group = mesh.group(mesh.degrees.replicas(axes, get_rank()))
        self.joins, self.join, dtype = True, JoinedSlices(group, parts, self.dtype), self.dtype

        def types(part):
            return dtype

        if mesh.degrees.optimizer_shard == 3:
            self.recompute()  # gathers again in the backward pass
        self.local = mesh.local(self.gather, (mesh.slices_layout(axes),), (mesh.layout(*axes),), first, types)
