"""Defines the one object in which devices differ: what is local to a device, and what devices send each other.

There are three meshes, and the rest of the program asks them the same questions:
    LocalMesh     one device: every collective is the identity.
    ProcessMesh   processes that exchange in their graphs by AllReduce and AllGather (see collectives.py).
    CompiledMesh  devices over which MindSpore's compiler shards one graph (Ascend, GPU).

A compiled network is sharded in two ways. A matrix product or transpose carries layouts of its inputs and result, and
the compiler makes the collectives that lie between (AlltoAll, AllReduce, ReduceScatter). Everything else is local to a
data shard, so a whole stretch of it is one `Morph`: an operator with declared layouts that the compiler replaces by the
function itself, on the shards of one device. No operator is left without a layout: it would silently be sharded along
axis 0 by all devices, with an AllGather around it.
"""

import json
from collections.abc import Callable
from pathlib import Path

from mindspore import Tensor, get_context, nn, ops
from mindspore.communication import create_group, get_rank
from mindspore.parallel import Layout
from mindspore.parallel.auto_parallel import AutoParallel

from switchyard.config import Config
from switchyard.distributed.arity import fixed
from switchyard.distributed.compiled_graph import Graph, compiled_model, read_graph
from switchyard.distributed.gradients import GlobalNorm, ShardedNorm
from switchyard.distributed.placement import EXPERT, MODEL, ParallelDims, Placement, is_updater
from switchyard.distributed.processes import SINGLE, Processes

SPEED_UP = "parallel_speed_up.json"  # name of the file that hands parallel.transformer_opt to the compiler
AXES = ("outer", "expert", "model")  # slowest first, as ranks are numbered: see placement.py
# "data": the shards of the batch. "rows": the shards of the tokens [N, D] between two layers
NAMES = {None: "None", "data": ("outer", "expert"), "outer": "outer", "expert": "expert", "model": "model"}


class LocalMesh:
    """Is one device.

    Attributes:
        processes: the processes of the job; a mesh on the host talks to them between steps.
        degrees: how the model is sharded.
        evaluates: whether weights can be scored where they lie.
        samples: whether a text can be continued with the weights where they lie.
        draws_full: whether a new model draws all of its initial weights; else a device draws its shards alone, in
            `place`, or with `draws_late` once the program is compiled.
        dropless: how choices reach their experts where none may be dropped, see moe.dispatch.dispatchers.
        own_shapes: whether shapes inside a program are those of a device's shards; a compiler shards afterwards.
    """

    dropless, noise, no_noise, sequence, evaluates = "blocks", None, None, False, True
    draws_full, draws_late, own_shapes = True, False, True

    def __init__(self, processes: Processes = SINGLE):
        self.samples = type(self) is LocalMesh and processes.size == 1
        self.processes, self.degrees = processes, processes.degrees

    def layout(self, *axes: str | None) -> Layout | None:
        """Returns the layout of a tensor; None: nothing is sharded. See CompiledMesh.layout."""
        return None

    def config(self, config: Config) -> Config:
        """Returns the configuration of what one device builds."""
        return config

    def place(self, model: nn.Cell) -> None:
        """Shards a new model over the devices."""

    def local(self, work: Callable, inputs: tuple, outputs: tuple, shapes: Callable, types: Callable) -> Callable:
        """Returns an operator that does `work` on the shards of one device; see CompiledMesh.local."""
        return work

    def total(self) -> nn.Cell:
        """Returns a cell that sums figures over the devices: [devices, X] -> [X]."""
        return Total()

    def data_shard(self) -> int:
        """Returns which shard of the batch this device reads, from 0."""
        return self.degrees.data_shard(self.processes.rank)

    def everywhere(self, axes: int) -> Callable:
        """Returns what gives every device the rows [B, ...] of all devices, a tensor of so many axes."""
        return nn.Identity()

    def gradient_sum(self, parameters) -> nn.Cell | None:
        """Returns a cell that sums gradients over the devices; None where nothing is left to sum."""
        return None

    def gradient_norm(self, parameters) -> nn.Cell:
        """Returns a cell that computes the global norm of the gradients of `parameters`."""
        return GlobalNorm()

    def differentiate(self, loss: nn.Cell, parameters) -> Callable:
        """Returns a function: the arguments of `loss` -> (what it returns, the gradients of that)."""
        return ops.value_and_grad(loss, None, parameters)

    def program(self, graph: nn.Cell, inputs: tuple) -> Callable:
        """Returns the program of the devices, to be called with a device's shards of the inputs."""
        return graph

    def compile(self, program: Callable, inputs: Callable[[], tuple]) -> None:
        """Compiles a program where that leaves the parameters only a device's shards, by sample inputs."""

    def speed_up(self, program: Callable, folder: Path) -> None:
        """Hands parallel.transformer_opt to the compiler."""

    def full_shapes(self, model: nn.Cell) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the full parameters of a model that was placed, by name."""
        return {parameter.name: tuple(parameter.shape) for parameter in model.get_parameters()}

    def updated(self, tensors: dict) -> dict:
        """Returns those of named tensors that this device updates."""
        return tensors

    def compiled_graph(self, program: Callable) -> Graph | None:
        """Returns what the compiler has made of a program that was called; None where it shards nothing."""
        return None


class Total(nn.Cell):
    """Sums the figures of the devices: [devices, X] -> [X]."""

    def __init__(self):
        super().__init__()
        self.sum = ops.ReduceSum()

    def construct(self, figures: Tensor) -> Tensor:
        """Takes figures [devices, X] -> [X]."""
        return self.sum(figures, 0)


LOCAL = LocalMesh()


class CompiledMesh(LocalMesh):
    """Shards a graph over the devices of one pipeline stage, by outer data shard, expert shard and model shard.

    Attributes:
        groups: routing groups G in all; a device holds G / data_parallel of them.
        length: tokens S of a sequence.
        noise, no_noise: layouts of the noise [J, N, D] in training, and of the constant in its place at evaluation.
        alone: a stage is one GPU, whose backend wants the graph of a pipeline without functions, and so no `local`.
        sequence: tokens between two layers are sharded over the model shards too (arXiv 2205.05198, section 4.2.2).
    """

    def __init__(self, config: Config, processes: Processes = SINGLE):
        super().__init__(processes)
        self.full_config, self.degrees = config, ParallelDims.of(config.parallel)
        self.groups, self.length = config.groups, config.model.seq_length
        self.sequence = config.parallel.sequence_parallel
        target = get_context("device_target")
        self.dropless = "alltoallv" if target == "Ascend" else "slots"
        self.alone = self.degrees.stage_devices == 1 and target == "GPU"
        degrees = self.degrees
        self.device_layout = Layout((degrees.outer, degrees.expert_parallel, degrees.model_parallel), AXES)
        self.noise, self.no_noise = self.layout(None, "data", None), self.layout(None, None, None)
        self.evaluates = self.degrees.pipeline_stage == 1
        self.draws_full, self.draws_late, self.own_shapes = False, True, False
        self.known: set[str] = set()  # names of groups that were made

    def layout(self, *axes: str | None) -> Layout:
        """Returns the layout of a tensor: for each axis what shards it, "data", "rows", "outer", "expert", "model" or
        None."""
        return self.device_layout(*(self._name(axis) for axis in axes))

    def slices_layout(self, axes: Placement) -> Layout:
        """Returns the layout of a stacked matrix [E, ., .] that ZeRO cuts along axis 1, see `optimizer_cut`."""
        replicas = ("outer",) if EXPERT in axes else ("outer", "expert")
        cut = (("model",) if axes[1] == MODEL else ()) + replicas
        return self.device_layout(NAMES[axes[0]], cut, NAMES[axes[2]])

    def _name(self, axis):
        if axis == "rows":
            return AXES if self.sequence else NAMES["data"]
        return NAMES[axis]

    def group(self, ranks: tuple[int, ...]) -> str:
        """Returns the name of the communication group of ranks at even distances, which is made if need be.

        The name holds the ranks, since graphs list all ranks of a cluster for such a group; see graph.group_of.
        """
        name = f"ranks_{ranks[0]}_to_{ranks[-1]}_by_{ranks[1] - ranks[0]}"
        if name not in self.known:
            create_group(name, list(ranks))
            self.known.add(name)
        return name

    def place(self, model: nn.Cell) -> None:
        """Declares the layouts of a model; the compiler shards the parameters."""
        model.shard(self)
        if self.full_config.parallel.recompute:
            for layer in model.layers:
                layer.recompute()

    def local(self, work: Callable, inputs: tuple, outputs: tuple, shapes: Callable, types: Callable) -> Callable:
        """Returns an operator that does `work` on the shards of one device.

        Args:
            work: function or method of a Cell. It sees local shapes, reads no Parameter that is not an argument, and
                returns a tensor or a flat tuple. Where there is nothing to shard it is handed back as it is.
            inputs, outputs: layouts of its arguments and results; replicated arguments get their gradients summed.
            shapes, types: shapes and types of the full arguments -> those of the full results.
        """
        if self.alone:
            return work
        morph = ops.Morph(fixed(work, len(inputs)), shapes, types).add_prim_attr("self_define_shard", True)
        return morph.shard(in_strategy=inputs, out_strategy=outputs)

    def total(self) -> Callable:
        """Returns a cell that sums figures over the data shards: [data_parallel, X] -> [X]."""
        total = Total()
        total.sum.shard(((self.degrees.data_parallel, 1),))
        return total

    def data_shard(self) -> int:
        """Returns which shard of the batch this device reads, from 0."""
        return self.degrees.data_shard(get_rank())

    def everywhere(self, axes: int) -> Callable:
        """Returns an operator that gathers rows [B, ...] of data shards on every device."""
        full = self.layout(*(None,) * axes)
        return self.local(unchanged, (full,), (full,), first, first)

    def gradient_norm(self, parameters) -> nn.Cell:
        """Returns a cell that computes the global norm of sharded gradients."""
        return ShardedNorm(parameters, self.degrees)

    def differentiate(self, loss: nn.Cell, parameters) -> nn.Cell:
        """Returns a cell: the arguments of `loss` -> (what it returns, the gradients of that)."""
        return LossAndGradients(loss, parameters)

    def program(self, graph: nn.Cell, inputs: tuple) -> AutoParallel:
        """Returns the network to compile; its parts know their layouts, `inputs` how its arguments are sharded."""
        parallel = self.full_config.parallel
        step = AutoParallel(graph, parallel_mode="semi_auto")
        step.dataset_strategy(inputs)
        step.no_init_parameters_in_compile()  # a parameter without numbers takes no memory, however large the full one
        if parallel.pipeline_stage > 1:
            step.pipeline(stages=parallel.pipeline_stage, scheduler="1f1b")
        if parallel.optimizer_shard:
            step.hsdp(shard_size=-1, threshold=0, optimizer_level=f"level{parallel.optimizer_shard}")
        if parallel.comm_fusion:
            step.comm_fusion({"openstate": True} | {kind: fused(size) for kind, size in parallel.comm_fusion.items()})
        return step

    def compile(self, program: AutoParallel, inputs: Callable[[], tuple]) -> None:
        """Compiles a program, which leaves its parameters the shards of this device."""
        program.compile(*inputs())

    def speed_up(self, program: AutoParallel, folder: Path) -> None:
        """Hands parallel.transformer_opt to the compiler, in a file of a folder that the first process writes."""
        options = self.full_config.parallel.transformer_opt
        if not options:
            return
        path = folder / SPEED_UP
        if self.processes.is_first:
            path.write_text(json.dumps(options, indent=1, allow_nan=False), encoding="utf-8")
        self.processes.barrier()
        program.transformer_opt(str(path.resolve()))

    def updated(self, tensors: dict) -> dict:
        """Returns those of named tensors that this device's stage of the pipeline updates."""
        rank, layers = self.processes.rank, self.full_config.model.num_layers
        return {name: one for name, one in tensors.items() if is_updater(name, self.degrees, rank, layers)}

    def compiled_graph(self, program: AutoParallel) -> Graph:
        """Returns this device's graph of a program that was compiled."""
        return read_graph(compiled_model(program))


class LossAndGradients(nn.Cell):
    """Computes a loss, which is one tensor, and its gradients.

    The compiler joins the two forward passes because both call the same cell. It would not join the pass of a cell with
    several results, and compute the layers twice.
    """

    def __init__(self, loss: nn.Cell, parameters):
        super().__init__(auto_prefix=False)
        self.loss, self.parameters = loss, parameters
        self.gradient = ops.GradOperation(get_by_list=True)

    def construct(self, *batch) -> tuple:
        """Takes the arguments of the loss."""
        return self.loss(*batch), self.gradient(self.loss, self.parameters)(*batch)


def fused(size: int | str) -> dict:
    """Returns what `comm_fusion` wants for a kind of collective; size in MB, or "auto"."""
    return {"mode": "auto", "config": None} if size == "auto" else {"mode": "size", "config": size}


def first(*arguments):
    """Returns its first argument: the result has that one's shape, or type."""
    return arguments[0]


def unchanged(rows: Tensor) -> Tensor:
    """Returns the rows; what comes in in full leaves in full."""
    return rows * 1
