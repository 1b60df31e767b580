"""Degrees become MindSpore layouts: what every Cell asks in its `shard(mesh)`.

A network is cut in two ways. A matrix product or transpose carries layouts of its inputs and result, and the compiler
makes the collectives that lie between (AlltoAll, AllReduce, ReduceScatter). Everything else is local to a data slice,
so a whole stretch of it is one `Morph`: an operator with declared layouts that the compiler replaces by the function
itself, on the slices of one device. No operator is left without a layout, which would silently be cut along axis 0 by
all devices, with an AllGather around it.
"""

from collections.abc import Callable

from mindspore import get_context, ops
from mindspore.communication import create_group
from mindspore.parallel import Layout

from switchyard.config import Config
from switchyard.distributed.placement import Degrees

AXES = ("outer", "expert", "model")  # slowest first, as ranks are numbered: see placement.py
# "data": the slices of the batch. "rows": the slices of the rows [N, D] between two layers
NAMES = {None: "None", "data": ("outer", "expert"), "outer": "outer", "expert": "expert", "model": "model"}


class Mesh:
    """The devices of one pipeline stage, by outer data slice, expert slice and model slice.

    Attributes:
        degrees: of the configuration.
        groups: routing groups G in all; a device holds G / data_parallel of them.
        length: tokens S of a sequence.
        noise: layout of the noise [J, N, D], or of the [1, 1, 1] that stands for it where a network reads none.
        alone: a stage is one GPU, whose backend wants the graph of a pipeline without functions, and so no `local`.
        sequence: rows between two layers are cut over the model slices too (arXiv 2205.05198, section 4.2.2).
    """

    def __init__(self, config: Config, noisy: bool = False):
        self.degrees = Degrees.of(config.parallel)
        self.groups, self.length = config.groups, config.model.seq_length
        self.sequence = config.parallel.sequence_parallel
        self.alone = self.degrees.stage_devices == 1 and get_context("device_target") == "GPU"
        degrees = self.degrees
        self.layout = Layout((degrees.outer, degrees.expert_parallel, degrees.model_parallel), AXES)
        self.noise = self.cut(None, "data" if noisy else None, None)
        self.known: set[str] = set()  # names of groups that were made

    def cut(self, *axes: str | None) -> Layout:
        """Layout of a tensor: for each of its axes what cuts it, "data", "rows", "outer", "expert", "model" or None."""
        return self.layout(*(self._name(axis) for axis in axes))

    def _name(self, axis):
        if axis == "rows":
            return AXES if self.sequence else NAMES["data"]
        return NAMES[axis]

    def group(self, ranks: tuple[int, ...]) -> str:
        """Name of the communication group of ranks at even distances, which is made if need be.

        The name holds the ranks, since graphs list all ranks of a cluster for such a group; see graph.group_of.
        """
        name = f"ranks_{ranks[0]}_to_{ranks[-1]}_by_{ranks[1] - ranks[0]}"
        if name not in self.known:
            create_group(name, list(ranks))
            self.known.add(name)
        return name

    def local(self, work: Callable, inputs: tuple, outputs: tuple, shapes: Callable, types: Callable) -> Callable:
        """An operator that does `work` on the slices of one device.

        Args:
            work: function or method of a Cell. It sees local shapes, reads no Parameter that is not an argument, and
                returns a tensor or a flat tuple. Where there is nothing to cut it is handed back as it is.
            inputs, outputs: layouts of its arguments and results; replicated arguments get their gradients summed.
            shapes, types: shapes and types of the whole arguments -> those of the whole results.
        """
        if self.alone:
            return work
        morph = ops.Morph(work, shapes, types).add_prim_attr("self_define_shard", True)
        return morph.shard(in_strategy=inputs, out_strategy=outputs)


def first(*arguments):
    """The result has the shape, or the type, of the first argument."""
    return arguments[0]
