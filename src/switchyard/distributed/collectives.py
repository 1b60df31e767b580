"""Lets processes exchange inside their graphs, where MindSpore's compiler does not shard the graph itself.

On CPU it cannot, and its collectives are AllReduce (sum) and AllGather over all processes; so AlltoAll is AllGather and
a slice here, with the gradient written out, since the one of AllGather would be ReduceScatter, which is missing too.

Legend: E experts, e = E / expert_parallel of them on one process, S slots of an expert on one process, W processes,
g = expert_parallel of them share one set of experts.
"""

from collections.abc import Callable

from mindspore import Tensor, nn, ops

from switchyard.config import Config
from switchyard.distributed.expert_shard import keep_shards
from switchyard.distributed.gradients import GlobalNorm
from switchyard.distributed.mesh import LocalMesh, Total
from switchyard.distributed.placement import EXPERT, full_shape, placement
from switchyard.distributed.processes import Processes, local_config


class ProcessMesh(LocalMesh):
    """Shards the batch, and experts, over processes.

    Each process minimises its own part of one loss: its tokens' cross-entropy over the number of all valid tokens, and
    its groups' auxiliary losses over the number of all real tokens. So gradients are summed, never averaged: those of
    experts over the processes that hold the same shard, since the rows of the others have come through the exchange
    already.
    """

    def __init__(self, processes: Processes):
        super().__init__(processes)
        self.dropless = "slots" if self.degrees.expert_parallel > 1 else "blocks"
        self.draws_full = False

    def config(self, config: Config) -> Config:
        """Returns the configuration of this process's share of the batch and of the routing groups."""
        return local_config(config, self.processes)

    def place(self, model: nn.Cell) -> None:
        """Leaves a model, before it is compiled, its shard of the experts, and gives its layers the way to the others.

        Raises:
            UserError: experts that cannot be sharded.
        """
        for _, cell in model.cells_and_names():
            if self.degrees.expert_parallel > 1 and hasattr(cell, "exchange_over"):
                cell.exchange_over(ToExperts(self.processes), ToTokens(self.processes))
        keep_shards(model.get_parameters(), self.processes)

    def total(self) -> nn.Cell:
        """Returns a cell that sums figures over the processes: [1, X] -> [X]."""
        return TotalOfProcesses()

    def everywhere(self, axes: int) -> Callable:
        """Returns an operator that gathers the rows of all processes: [B / W, ...] -> [B, ...]."""
        return ops.AllGather()

    def full_shapes(self, model: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the full parameters, by name."""
        own = super().full_shapes(model)
        return {name: full_shape(name, shape, self.degrees) for name, shape in own.items()}

    def gradient_sum(self, parameters) -> nn.Cell:
        """Returns a cell that sums gradients over the processes that hold the same shard."""
        return GradientSum(self.processes, parameters)

    def gradient_norm(self, parameters) -> nn.Cell:
        """Returns a cell that computes the norm of gradients of which experts are sharded."""
        return NormOfProcesses(self.processes, parameters)


class _Swap(nn.Cell):
    """Exchanges rows by AlltoAll, in both directions, within the expert-parallel group of this process."""

    def __init__(self, processes: Processes):
        super().__init__()
        group = processes.degrees.expert_group(processes.rank)  # neighbours: see ParallelDims
        self.all, self.first, self.size = processes.size, group[0], len(group)
        self.place = group.index(processes.rank)
        self.gather, self.transpose = ops.AllGather(), ops.Transpose()

    def scatter(self, rows: Tensor) -> Tensor:
        """Returns the rows that the group has for this process's experts: [E, S, ...] -> [e, g * S, ...]."""
        shape = rows.shape
        own = shape[0] // self.size
        gathered = self.gather(rows.reshape(*shape[:2], -1)).reshape(self.all, *shape[:2], -1)  # [W, E, S, D]
        start = self.place * own
        parts = gathered[self.first : self.first + self.size, start : start + own]  # [g, e, S, D]
        return self.transpose(parts, (1, 0, 2, 3)).reshape(own, self.size * shape[1], *shape[2:])

    def collect(self, rows: Tensor) -> Tensor:
        """Returns the inverse of `scatter`: [e, g * S, ...] -> [E, S, ...]."""
        shape = rows.shape
        slots = shape[1] // self.size
        gathered = self.gather(rows.reshape(*shape[:2], -1))  # [W * e, g * S, D]
        gathered = gathered.reshape(self.all, shape[0], self.size, slots, -1)  # [W, e, g, S, D]
        parts = gathered[self.first : self.first + self.size, :, self.place]  # [g, e, S, D]
        return parts.reshape(self.size * shape[0], slots, *shape[2:])


class ToExperts(_Swap):
    """Sends rows of this process to their experts: [E, S, ...] -> rows of the group for its own [e, g * S, ...]."""

    def construct(self, rows: Tensor) -> Tensor:
        return self.scatter(rows)

    def bprop(self, rows, out, d_out):
        return (self.collect(d_out),)


class ToTokens(_Swap):
    """Sends rows back to their tokens: [e, g * S, ...] -> [E, S, ...]."""

    def construct(self, rows: Tensor) -> Tensor:
        return self.collect(rows)

    def bprop(self, rows, out, d_out):
        return (self.scatter(d_out),)


class TotalOfProcesses(nn.Cell):
    """Sums figures over the processes: [1, X] -> [X].

    The gradient passes as it is: each process differentiates its own part of the sum.
    """

    def __init__(self):
        super().__init__()
        self.own, self.reduce, self.expand_dims = Total(), ops.AllReduce(), ops.ExpandDims()

    def construct(self, figures: Tensor) -> Tensor:
        return self.reduce(self.own(figures))

    def bprop(self, figures, out, d_out):
        return (self.expand_dims(d_out, 0),)


class GradientSum(nn.Cell):
    """Sums gradients of this process's part of the loss to those of the full loss, for this process's parameters.

    Args:
        processes: this one and the others.
        parameters: those that the gradients are of, sharded already.
    """

    def __init__(self, processes: Processes, parameters):
        super().__init__(auto_prefix=False)
        degrees = processes.degrees
        self.replicas, self.shards = degrees.outer, degrees.expert_parallel
        self.place = degrees.coordinates(processes.rank).expert
        self.is_sharded = shards_of(parameters, self.shards)
        self.reduce = ops.AllReduce()

    def construct(self, gradients: tuple) -> tuple:
        """Takes one gradient for each parameter."""
        summed = ()
        for index, gradient in enumerate(gradients):
            if not self.is_sharded[index]:
                gradient = self.reduce(gradient)
            elif self.replicas > 1:
                gradient = self.over_replicas(gradient)
            summed = (*summed, gradient)
        return summed

    def over_replicas(self, gradient: Tensor) -> Tensor:
        """Sums over the processes with the same expert shard [e, ...]: AllReduce here knows no smaller group."""
        before, after = self.place * gradient.shape[0], (self.shards - 1 - self.place) * gradient.shape[0]
        rest = gradient.shape[1:]
        parts = ()
        if before > 0:
            parts = (*parts, ops.zeros((before, *rest), gradient.dtype))
        parts = (*parts, gradient * 1.0)
        if after > 0:
            parts = (*parts, ops.zeros((after, *rest), gradient.dtype))
        return self.reduce(ops.concat(parts, 0))[before : before + gradient.shape[0]]


class NormOfProcesses(nn.Cell):
    """Computes the norm of the full gradient: a shard counts once, however many processes hold it."""

    def __init__(self, processes: Processes, parameters):
        super().__init__(auto_prefix=False)
        self.replicas = processes.degrees.outer
        self.is_sharded = shards_of(parameters, processes.degrees.expert_parallel)
        self.norm_full, self.norm_sharded, self.reduce = GlobalNorm(), GlobalNorm(), ops.AllReduce()

    def construct(self, gradients: tuple) -> Tensor:
        """Takes one gradient for each parameter; returns []."""
        full, sharded = (), ()
        for index, gradient in enumerate(gradients):
            if self.is_sharded[index]:
                sharded = (*sharded, gradient)
            else:
                full = (*full, gradient)
        if len(sharded) == 0:
            return self.norm_full(full)
        squares = self.reduce((self.norm_sharded(sharded) ** 2).reshape(1))[0]
        return ops.sqrt(self.norm_full(full) ** 2 + squares / self.replicas)


def shards_of(parameters, expert_parallel: int) -> tuple[bool, ...]:
    """Returns, for each parameter, whether a process holds a shard of it."""
    return tuple(expert_parallel > 1 and is_expert(p.name, p.shape) for p in parameters)


def is_expert(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether a parameter, or its moment, has an axis of experts."""
    return EXPERT in placement(name, tuple(shape), Processes().degrees)
