"""The conditional layer for a network of one's own.

Legend: N rows (B * S of sequences), D width, E experts, K choices of a row, G routing groups, J noise slices.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import constexpr

from switchyard.api.arguments import LayerKeys, layer_config
from switchyard.api.attached import AttachLoss
from switchyard.api.registry import with_names
from switchyard.distributed.mesh import LOCAL, CompiledMesh, LocalMesh, first
from switchyard.errors import UserError
from switchyard.models.decoder import DTYPES
from switchyard.moe import layer as core
from switchyard.moe import metrics
from switchyard.moe.statistics import weighted_losses
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.noise import NoiseSlices

if TYPE_CHECKING:
    from typing_extensions import Unpack

BELOW_ONE = 1.0 - 2.0**-24  # some devices draw 1, of which a logarithm is taken
LOADS = len(metrics.SCALARS)  # where the loads begin in the statistics


@constexpr
def check_inputs(shape: tuple[int, ...], width: int, groups: int, missing: tuple[str, ...]) -> None:
    """Refuses inputs that the layer cannot read, while a graph is compiled (UserError).

    Args:
        shape: of x.
        width: D.
        groups: G.
        missing: names of inputs that the layer reads and that were not given.
    """
    if len(shape) not in (2, 3) or shape[-1] != width:
        raise UserError(f"x: {list(shape)}; must be [N, {width}] or [B, S, {width}]: hidden_size is {width}")
    rows = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    if rows % groups:
        raise UserError(f"x: {list(shape)}; moe.groups ({groups}) must divide its {rows} rows")
    for name in missing:
        raise UserError(f"{name}: not given; this layer reads it: layer(x, {name}=...)")


class MoELayer(nn.Cell):
    """Sends each row through the experts that a router chooses: a feed-forward layer of conditional computation.

    The layer trains inside nn.TrainOneStepCell, mindspore.Model.fit or a loop with mindspore.value_and_grad, in graph
    and PyNative mode. `set_train` of the network switches it, as any Cell, between training (capacity, noise, auxiliary
    losses) and evaluation (nothing is dropped, no noise).

    The balance loss and the other auxiliary losses reach the weights by themselves: their gradient is attached to the
    output. With `return_losses` the layer returns their weighted sum instead, and the network adds it to its loss.
    Both give the same gradients. Where the loss is scaled, as for float16, `sw.set_loss_scale` or `sw.MoECallback`
    hands the scale to the layer. A router that balances by a bias (`sigmoid`) moves it in `sw.update_routers`, after
    each step; `sw.MoECallback` calls that in Model.fit.

    Args:
        hidden_size: width D of a row.
        expert_num: experts E.
        seed: of the initial weights and of the noise that the layer draws; None = drawn by NumPy's global generator,
            which mindspore.set_seed seeds.
        return_losses: whether the layer returns (output, loss) instead of attaching the gradient of the loss.
        vocab_size: of the token ids, for routers that choose by them (`hash`, `random`).
        has_tasks: whether task ids come along, for routers that choose by them (`task`, `multi_gate`).
        mesh: the devices.
        keys: keys of the sections `model` and `moe`, under their YAML names and with the same defaults, see LayerKeys.
            `router`, `experts`, `dispatcher` and the names in `losses` may also be a class or function of one's own.

    Inputs:
        - **x** (Tensor) - rows [N, D] or sequences [B, S, D], of any float type.
        - **valid** (Tensor) - [N] or [B, S], 1 = real, 0 = padding, which comes back as zero; None = all are real.
        - **noise** (Tensor) - [noise_slices, N, D] of U(0, 1); None = drawn anew in each training pass.
        - **token_ids**, **task_ids** (Tensor) - [N] or [B, S] int32, where the router reads them.

    Outputs:
        Tensor of the shape and type of x; with `return_losses` (that tensor, loss [] float32).

    Raises:
        UserError: a wrong argument, in the words of the YAML file.

    Examples:
        >>> import switchyard as sw
        >>> layer = sw.MoELayer(hidden_size=8, expert_num=4, router="top_k", num_experts_chosen=2, seed=1)
        >>> layer.set_train()(ops.ones((2, 5, 8))).shape
        (2, 5, 8)
        >>> layer.metrics()["load"].sum(), sorted(layer.losses)
        (20.0, ['auxiliary', 'balance', 'total', 'z'])
    """

    def __init__(
        self,
        hidden_size: int,
        expert_num: int,
        *,
        seed: int | None = None,
        return_losses: bool = False,
        vocab_size: int | None = None,
        has_tasks: bool = False,
        mesh: LocalMesh = LOCAL,
        **keys: "Unpack[LayerKeys]",
    ):
        super().__init__()
        seed = int(np.random.randint(2**31)) if seed is None else seed
        config = layer_config(hidden_size, expert_num, seed, getattr(mesh, "groups", 1), with_names(dict(keys)))
        self.config, self.return_losses, self.mesh = config, return_losses, mesh
        self.hidden_size, self.groups, slices = hidden_size, config.groups, NoiseSlices()
        std, dtype = (config.model.init_method_std,) * 2, DTYPES[config.model.compute_dtype]
        self.moe = core.MoELayer(config, std, InitialWeights(seed), dtype, slices, vocab_size, has_tasks, mesh=mesh)
        self.noise_slices, self.uniform = slices.count, ops.UniformReal(seed=seed % 2**31 or 1, seed2=1)
        self.balance_factor = config.moe.aux_loss_factor
        self.z_factor = config.moe.z_loss_factor if "z" in self.moe.router.losses else 0.0
        self.local_sum, self.total, self.attach = self.sum_of_groups, mesh.total(), AttachLoss()
        self.is_sharded, self.has_bias = False, len(self.moe.router.state()) > 0
        self.loss_scale = held("loss_scale", 1.0)
        self.statistics = held("statistics", np.zeros(metrics.width(expert_num)))
        self.load = held("load", np.zeros(expert_num)) if self.has_bias else None

    def construct(self, x: Tensor, valid=None, noise=None, token_ids=None, task_ids=None):
        """Returns what the class says."""
        check_inputs(x.shape, self.hidden_size, self.groups, self.missing(noise, token_ids, task_ids))
        tokens = x.reshape(-1, self.hidden_size).astype(mstype.float32)  # [N, D]
        valid = self.grouped(valid, tokens.shape[0])  # [G, N / G]
        if noise is None:
            noise = self.draw(tokens.shape[0])
        out, stats, _ = self.moe(tokens, valid, noise, token_ids, task_ids)
        out = out.reshape(x.shape).astype(x.dtype)
        loss = self.noted(stats)
        if self.return_losses:
            return out, loss
        if self.training:
            return self.attach(out, loss * self.loss_scale)
        return ops.depend(out, loss)  # a compiler leaves out a call whose result nobody reads, and what it notes

    def missing(self, noise: Tensor, token_ids: Tensor, task_ids: Tensor) -> tuple[str, ...]:
        """Returns the names of inputs that the layer reads, cannot make, and that are None."""
        names = ()  # type: tuple[str, ...]  # a comment: this is compiled
        if self.is_sharded and self.training and noise is None:
            names = (*names, "noise")
        if self.moe.takes_tokens and token_ids is None:
            names = (*names, "token_ids")
        if self.moe.takes_tasks and task_ids is None:
            names = (*names, "task_ids")
        return names

    def grouped(self, valid: Tensor, rows: int) -> Tensor:
        """Returns valid [N], [B, S] or None as the groups read it: [G, N / G] float32."""
        if valid is None:
            return ops.ones((self.groups, rows // self.groups), mstype.float32)
        return valid.reshape(self.groups, -1).astype(mstype.float32)

    def draw(self, rows: int) -> Tensor:
        """Draws the noise of a pass: [J, N, D] of U(0, 1); [1, 1, 1], which nobody reads, where there is none."""
        if not self.training or self.noise_slices == 0:
            return ops.zeros((1, 1, 1), mstype.float32)
        return ops.minimum(self.uniform((self.noise_slices, rows, self.hidden_size)), BELOW_ONE)

    def noted(self, stats: Tensor) -> Tensor:
        """Keeps the statistics [G, 6 + 2 E] of the pass for the host, and returns the weighted losses: []."""
        figures = self.total(self.local_sum(stats))  # [6 + 2 E], of all devices
        kept = ops.stop_gradient(figures)
        ops.assign(self.statistics, kept)
        if self.training and self.has_bias:
            ops.assign_add(self.load, kept[LOADS : LOADS + self.moe.expert_num])
        return weighted_losses(figures.reshape(1, -1), kept[metrics.TOKENS], self.balance_factor, self.z_factor)

    def sum_of_groups(self, stats: Tensor) -> Tensor:
        """Sums the statistics of a device over its groups: [G, 6 + 2 E] -> [1, 6 + 2 E]."""
        return stats.sum(0, keepdims=True)

    # ---- on the host
    @property
    def losses(self) -> dict[str, float]:
        """The auxiliary losses of the last pass, by name.

        balance, z: means over the rows, without their weights. auxiliary: the weighted sum of those in `losses`, and
        of a loss that the router brings. total: the weighted sum of all, which is attached or returned.
        """
        stats = self.statistics.asnumpy()
        balance, z = metrics.loss_metrics(stats, self.moe.expert_num)
        auxiliary = float(stats[metrics.AUXILIARY] / max(stats[metrics.TOKENS], 1.0))
        total = self.balance_factor * balance + self.z_factor * z + auxiliary
        return {"balance": balance, "z": z, "auxiliary": auxiliary, "total": total}

    def metrics(self) -> dict[str, Any]:
        """Returns what the router did in the last pass.

        Returns:
            load [E]: choices per expert, before any is dropped. importance [E]: gate mass per expert. dropped: share of
            the choices that got no slot. entropy: of the router, nats. max_violation: largest load / mean load - 1. z:
            mean squared log-partition. tokens: real rows.
        """
        stats = self.statistics.asnumpy()
        found = {name: value[0] for name, value in metrics.metrics(stats, self.moe.expert_num).items()}
        scalars = {name: float(value) for name, value in found.items() if name not in metrics.SUMS}
        return {**found, **scalars, "tokens": int(stats[metrics.TOKENS])}

    def set_loss_scale(self, scale: Any) -> None:
        """Sets what the gradient of the attached losses is multiplied by: the scale of the network's own loss.

        Args:
            scale: a number, or a Tensor with one, whose value is copied.
        """
        value = float(scale.asnumpy()) if isinstance(scale, Tensor) else float(scale)
        ops.assign(self.loss_scale, Tensor(value, mstype.float32))  # a compiled value_and_grad does not see set_data

    def update_router(self) -> None:
        """Moves the bias of a router that balances by one, by the load of all training passes since the last call."""
        if self.load is not None:
            self.moe.router.update(self.load.asnumpy().copy())
            ops.assign(self.load, Tensor(np.zeros(self.load.shape, np.float32)))

    def shard(self, mesh: CompiledMesh) -> None:
        """Declares the layouts: rows are sharded by data shards, experts by expert shards.

        Training passes are then given their noise [max(J, 1), N, D], which is sharded as the rows are.

        Raises:
            UserError: losses that are attached, which no compiled mesh can do; a router or experts that cannot be
                sharded.
        """
        if not self.return_losses:
            raise UserError("return_losses: False; a compiled mesh cannot attach losses: set it to True, add the loss")
        self.moe.shard(mesh)
        self.is_sharded = True
        shards, width, pair = mesh.degrees.data_parallel, metrics.width(self.moe.expert_num), mesh.layout("data", None)

        def summed(stats):
            return [shards, width]

        self.local_sum = mesh.local(self.sum_of_groups, (pair,), (pair,), summed, first)


def held(name: str, values) -> Parameter:
    """Returns numbers that a pass and the host share, float32; no optimizer trains them."""
    return Parameter(Tensor(np.asarray(values, np.float32)), name=name, requires_grad=False)
