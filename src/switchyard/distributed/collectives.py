"""What processes exchange inside a training step, written by hand: rows for experts, gradients, norms and figures.

Where MindSpore's compiler cuts the graph itself (semi_auto on Ascend and GPU) none of this is used. On CPU it cannot,
and its collectives are AllReduce (sum) and AllGather over all processes; so AlltoAll is AllGather and a slice here,
with the gradient written out, since the one of AllGather would be ReduceScatter, which is missing too.

Legend: E experts, e = E / expert_parallel of them on one process, S slots of an expert on one process, W processes,
g = expert_parallel of them share one set of experts, M conditional layers.
"""

from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.placement import EXPERT, placement, slice_of
from switchyard.distributed.processes import Processes
from switchyard.moe.layer import MoELayer
from switchyard.moe.own_classes import require_stacked
from switchyard.moe.routing.losses import max_violation
from switchyard.nn.adamw import GlobalNorm


class _Swap(nn.Cell):
    """Base of the two ways of an AlltoAll within the expert-parallel group of this process."""

    def __init__(self, processes: Processes):
        super().__init__()
        group = processes.degrees.expert_group(processes.rank)  # neighbours: see Degrees
        self.all, self.first, self.size = processes.size, group[0], len(group)
        self.place = group.index(processes.rank)
        self.gather, self.turn = ops.AllGather(), ops.Transpose()

    def scatter(self, rows: Tensor) -> Tensor:
        """[E, S, ...] -> [e, g * S, ...]: the rows that the group has for this process's experts."""
        shape = rows.shape
        own = shape[0] // self.size
        gathered = self.gather(rows.reshape(*shape[:2], -1)).reshape(self.all, *shape[:2], -1)  # [W, E, S, D]
        start = self.place * own
        parts = gathered[self.first : self.first + self.size, start : start + own]  # [g, e, S, D]
        return self.turn(parts, (1, 0, 2, 3)).reshape(own, self.size * shape[1], *shape[2:])

    def collect(self, rows: Tensor) -> Tensor:
        """[e, g * S, ...] -> [E, S, ...]: the inverse."""
        shape = rows.shape
        slots = shape[1] // self.size
        gathered = self.gather(rows.reshape(*shape[:2], -1))  # [W * e, g * S, D]
        gathered = gathered.reshape(self.all, shape[0], self.size, slots, -1)  # [W, e, g, S, D]
        parts = gathered[self.first : self.first + self.size, :, self.place]  # [g, e, S, D]
        return parts.reshape(self.size * shape[0], slots, *shape[2:])


class ToExperts(_Swap):
    """Rows of this process for all experts -> rows of its group for its own experts: [E, S, ...] -> [e, g * S, ...]."""

    def construct(self, rows: Tensor) -> Tensor:
        return self.scatter(rows)

    def bprop(self, rows, out, d_out):
        return (self.collect(d_out),)


class ToRows(_Swap):
    """The way back: [e, g * S, ...] -> [E, S, ...]."""

    def construct(self, rows: Tensor) -> Tensor:
        return self.collect(rows)

    def bprop(self, rows, out, d_out):
        return (self.scatter(d_out),)


class Sum(nn.Cell):
    """Sum over all processes of a tensor of any shape, a count say; no gradient passes."""

    def __init__(self):
        super().__init__()
        self.reduce = ops.AllReduce()

    def construct(self, values: Tensor) -> Tensor:
        flat = ops.stop_gradient(values).reshape(-1).astype(mstype.float32)
        return ops.stop_gradient(self.reduce(flat)).reshape(values.shape)


class Joint(nn.Cell):
    """What a step adds up over the processes: counts, gradients, their norm, figures.

    Each process minimises its own part of one loss: its tokens' cross-entropy over the number of all valid tokens, and
    its groups' balance losses times its share of the real rows. So gradients are summed, never averaged: those of
    experts over the processes that hold the same slice, since the rows of the others have come through the exchange
    already.

    Args:
        processes: this one and the others.
        parameters: those that are trained, cut already.
        layers, experts: M and E of the audit, 0 where there is none.
    """

    def __init__(self, processes: Processes, parameters, layers: int, experts: int):
        super().__init__(auto_prefix=False)
        degrees, self.size = processes.degrees, processes.size
        self.copies, self.slices = degrees.outer, degrees.expert_parallel
        self.place = degrees.coordinates(processes.rank).expert
        self.is_cut = tuple(self.slices > 1 and is_expert(parameter.name, parameter.shape) for parameter in parameters)
        self.layers, self.experts = layers, experts
        self.count, self.reduce = Sum(), ops.AllReduce()
        self.norm_whole, self.norm_cut = GlobalNorm(), GlobalNorm()

    def construct(self, gradients: tuple) -> tuple:
        """Gradients of this process's part -> those of the whole loss, of this process's parameters."""
        summed = ()
        for index, gradient in enumerate(gradients):
            if not self.is_cut[index]:
                gradient = self.reduce(gradient)
            elif self.copies > 1:
                gradient = self.over_copies(gradient)
            summed = (*summed, gradient)
        return summed

    def over_copies(self, gradient: Tensor) -> Tensor:
        """Sum over the processes with the same expert slice [e, ...]: AllReduce here knows no smaller group."""
        before, after = self.place * gradient.shape[0], (self.slices - 1 - self.place) * gradient.shape[0]
        rest = gradient.shape[1:]
        parts = ()
        if before > 0:
            parts = (*parts, ops.zeros((before, *rest), gradient.dtype))
        parts = (*parts, gradient * 1.0)
        if after > 0:
            parts = (*parts, ops.zeros((after, *rest), gradient.dtype))
        return self.reduce(ops.concat(parts, 0))[before : before + gradient.shape[0]]

    def norm(self, gradients: tuple) -> Tensor:
        """Root of the sum of squares of the whole gradient: a slice counts once, whatever holds it."""
        whole, cut = (), ()
        for index, gradient in enumerate(gradients):
            if self.is_cut[index]:
                cut = (*cut, gradient)
            else:
                whole = (*whole, gradient)
        if len(cut) == 0:
            return self.norm_whole(whole)
        squares = self.norm_cut(cut) ** 2
        return ops.sqrt(self.norm_whole(whole) ** 2 + self.count(squares) / self.copies)

    def parts(self, figures: tuple, part: Tensor) -> tuple:
        """Figures of this process's rows, of which it has the share `part` -> its part of those of all rows: means over
        rows are multiplied by it, see training.step.LossCell."""
        load, importance, dropped, entropy, violation, router_z = figures[3:9]
        means = figures[0], figures[1] * part, figures[2] * part
        return (*means, load, importance, dropped, entropy * part, violation, router_z * part)

    def figures(self, figures: tuple) -> tuple:
        """This process's part of the figures of a micro-batch, see `parts` -> those of the whole."""
        loss, balance, z = figures[0], figures[1], figures[2]
        if len(figures) == 3:
            summed = self.count(ops.stack((loss, balance, z)))
            return summed[0], summed[1], summed[2]
        load, importance, dropped, entropy, _, router_z = figures[3:9]  # [M, E] twice, [M] each
        choices = load.sum(1)
        parts = (ops.stack((loss, balance, z)), load.reshape(-1), importance.reshape(-1), dropped * choices)
        summed = self.count(ops.concat((*parts, entropy, router_z)))
        amounts, layers = self.layers * self.experts, self.layers
        load = summed[3 : 3 + amounts].reshape(layers, -1)
        importance = summed[3 + amounts : 3 + 2 * amounts].reshape(layers, -1)
        rest = summed[3 + 2 * amounts :].reshape(3, layers)  # dropped, entropy, z
        dropped = rest[0] / ops.maximum(load.sum(1), 1.0)
        return summed[0], summed[1], summed[2], load, importance, dropped, rest[1], max_violation(load), rest[2]


def create_joint(model: nn.Cell, config: Config, processes: Processes) -> Joint | None:
    """What the step of a model that `cut_model` has cut adds up; None where one process works alone."""
    if processes.size == 1:
        return None
    return Joint(processes, model.trainable_params(), len(config.moe_layers), config.moe.expert_num)


def is_expert(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter, or its moment, has an axis of experts."""
    return EXPERT in placement(name, tuple(shape), Processes().degrees)


def cut_model(model: nn.Cell, processes: Processes) -> None:
    """Leaves a model, before it is compiled, its slice of the experts, and gives its layers the way to the others."""
    if processes.size == 1:
        return
    for _, cell in model.cells_and_names():
        if hasattr(cell, "over_processes"):
            cell.over_processes = Sum()
        if isinstance(cell, MoELayer) and processes.degrees.expert_parallel > 1:
            require_stacked(cell.experts, cell.expert_num)
            cell.to_experts, cell.to_rows = ToExperts(processes), ToRows(processes)
    whole = {parameter.name: parameter for parameter in model.get_parameters()}
    for name, part in own_arrays({name: value.asnumpy() for name, value in whole.items()}, processes).items():
        if part.shape != whole[name].shape:
            whole[name].set_data(Tensor(part), slice_shape=True)


def own_arrays(arrays: dict, processes: Processes) -> dict:
    """The slices that this process holds of whole parameters or moments, by name."""
    degrees, rank = processes.degrees, processes.rank
    if processes.size == 1:
        return arrays
    return {
        name: array[slice_of(array.shape, placement(name, array.shape, degrees), degrees, rank)]
        for name, array in arrays.items()
    }


def whole_arrays(parameters: dict, processes: Processes) -> dict:
    """The inverse of `own_arrays`, on every process: parameters or moments by name -> whole NumPy arrays."""
    arrays, degrees = {}, processes.degrees
    for name, parameter in parameters.items():
        array = parameter.asnumpy()
        if degrees.expert_parallel > 1 and is_expert(name, array.shape):
            parts = processes.gather(array)  # [W, e, ...]
            array = parts[: degrees.expert_parallel].reshape(-1, *array.shape[1:])  # the first set of experts
        arrays[name] = array
    return arrays
