"""WHAT works: feed-forward experts stacked on one axis, run as one batched matrix product.

Legend: E experts, S rows of an expert, D width, F hidden width, P blocks, b rows of a block.
"""

from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.distributed.mesh import CompiledMesh, first
from switchyard.distributed.placement import axes_of
from switchyard.nn.activation import create_activation
from switchyard.nn.cast import Cast, MatrixCast
from switchyard.nn.fused import NONE
from switchyard.nn.initializers import InitialWeights


class FeedForwardExperts(nn.Cell):
    """Applies E feed-forward networks: [E, S, D] -> [E, S, D], parameters stacked on E (never a loop over experts).

    ReLU and GELU: act(x W_in) W_out. SwiGLU (arXiv 2002.05202, eq. 6): (silu(x W_gate) * x W_in) W_out.

    Args:
        std: (of the first matrices, of the last) initial standard deviation.
        random: draws the initial weights, see nn.initializers.
        dtype: of the matrix products; parameters and result stay float32.
        out: width of the result, where it is not D.
        fused: operators of the device, see nn.fused.
        half_rows: the result has the type of the products.
    """

    def __init__(
        self,
        experts: int,
        width: int,
        hidden: int,
        activation: str,
        std: tuple[float, float],
        random: InitialWeights,
        dtype,
        out: int | None = None,
        fused: frozenset[str] = NONE,
        half_rows: bool = False,
    ):
        super().__init__()
        self.dtype = dtype
        self.gated = activation == "swiglu"

        def weight(name: str, shape: tuple[int, ...], scale: float) -> Parameter:
            return random.normal(scale, shape, name)

        self.w_in = weight("w_in", (experts, width, hidden), std[0])
        self.w_gate = weight("w_gate", (experts, width, hidden), std[0]) if self.gated else None
        self.w_out = weight("w_out", (experts, hidden, out or width), std[1])
        self.product_in = ops.BatchMatMul()
        self.product_gate = ops.BatchMatMul()
        self.product_out = ops.BatchMatMul()
        self.activation = create_activation(activation, fused)
        self.to_dtype, self.widen = Cast(dtype), Cast(dtype if half_rows else mstype.float32)
        self.narrow_in, self.narrow_gate, self.narrow_out = (MatrixCast(dtype) for _ in range(3))
        self.local = self.gate_hidden if self.gated else self.bend_hidden
        self.take = ops.Gather()
        self.mix = ops.MatMul()
        self.lora_in, self.lora_gate, self.lora_out = None, None, None  # see models.adapters

    def construct(self, rows: Tensor) -> Tensor:
        """Applies expert e to slice e of rows [E, S, D]."""
        return self._work(rows, self.w_in, self.w_gate, self.w_out)

    def matrices(self) -> tuple:
        """Returns (w_in, w_out, w_gate or None) for products that are made elsewhere; whole where ZeRO cuts axis 1."""
        w_in, w_gate, w_out = self.w_in, self.w_gate, self.w_out
        if self.narrow_in.joins:
            w_in, w_gate = self.narrow_in(w_in), self.narrow_gate(w_gate) if self.gated else None
        if self.narrow_out.joins:
            w_out = self.narrow_out(w_out)
        return w_in, w_out, w_gate

    def blocks(self, rows: Tensor, block_expert: Tensor) -> Tensor:
        """Applies expert `block_expert` [P] to rows [P, b, D] of each block, reads the chosen experts' weights only."""
        w_gate = self.take(self.w_gate, block_expert, 0) if self.gated else None  # [P, D, F]
        w_in, w_out = self.take(self.w_in, block_expert, 0), self.take(self.w_out, block_expert, 0)
        return self._work(rows, w_in, w_gate, w_out, block_expert)

    def merged(self, rows: Tensor, gates: Tensor) -> Tensor:
        """Applies one network a group to rows [G, N, D]: the experts' parameters weighted by gates [G, E]."""
        w_gate = self._mean(self.w_gate, gates) if self.gated else None  # [G, D, F]
        return self._work(rows, self._mean(self.w_in, gates), w_gate, self._mean(self.w_out, gates))

    def _mean(self, weight, gates):
        experts, rows, columns = weight.shape
        return self.mix(gates, weight.reshape(experts, -1)).reshape(-1, rows, columns)  # [G, D, F]

    def _work(self, rows, w_in, w_gate, w_out, block_expert=None):
        rows = self.to_dtype(rows)
        hidden = self.product_in(rows, self.narrow_in(w_in))  # [E, S, F]
        if self.lora_in is not None:
            hidden = self.lora_in(rows, hidden, block_expert)
        if self.gated:
            gate = self.product_gate(rows, self.narrow_gate(w_gate))  # [E, S, F]
            if self.lora_gate is not None:
                gate = self.lora_gate(rows, gate, block_expert)
            hidden = self.local(gate, hidden)
        else:
            hidden = self.local(hidden)
        out = self.product_out(hidden, self.narrow_out(w_out))  # [E, S, D]
        if self.lora_out is not None:
            out = self.lora_out(hidden, out, block_expert)
        return self.widen(out)

    def gate_hidden(self, gate: Tensor, hidden: Tensor) -> Tensor:
        """Weights hidden [E, S, F] by the non-linearity of its gate."""
        return self.activation(gate, hidden)

    def bend_hidden(self, hidden: Tensor) -> Tensor:
        """Applies the non-linearity to hidden [E, S, F]."""
        return self.activation(hidden)

    def shard(self, mesh: CompiledMesh) -> None:
        """Shards parameters as `axes_of` says: E by experts, F by the model shards, over which the second product's
        result is summed. Where E is full, as of a dense feed-forward, rows are sharded over all data shards.
        """
        first_axes, last_axes = axes_of(self.w_in.name, 3), axes_of(self.w_out.name, 3)
        experts, _, hidden = first_axes
        rows = "data" if experts is None else "outer"
        before, within = mesh.layout(experts, rows, None), mesh.layout(experts, rows, hidden)
        for product in (self.product_in, self.product_gate):
            product.shard((before, mesh.layout(*first_axes)), (within,))
        self.product_out.shard((within, mesh.layout(*last_axes)), (before,))
        inputs = (within, within) if self.gated else (within,)
        self.local = mesh.local(self.local, inputs, (within,), first, first)
        self.to_dtype.shard(mesh, experts, rows, None)
        self.shard_matrices(mesh)
        self.widen.shard(mesh, experts, rows, None)

    def shard_matrices(self, mesh: CompiledMesh) -> None:
        """Declares the layouts of the parameters only, for products that are made elsewhere, see `matrices`."""
        self.narrow_in.shard_matrix(mesh, self.w_in)
        self.narrow_out.shard_matrix(mesh, self.w_out)
        if self.gated:
            self.narrow_gate.shard_matrix(mesh, self.w_gate)
