"""A tensor in another type, also where it is sharded over devices."""

from mindspore import Tensor, nn

from switchyard.distributed.mesh import CompiledMesh, first


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
