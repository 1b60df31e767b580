"""Trains in pipeline stages: 1F1B, as MindSpore's compiler makes it of one network.

Every device compiles the whole network and keeps the cells of its stage; between stages the compiler puts Send and
Receive. It has these conditions, and otherwise hangs or fails with words of its own:
    - one lazily inlined cell that holds a micro-batch's whole forward pass, called for every micro-batch. GPUs refuse
      it; there a stage is one device, and without `local` operators the cell is inlined at once;
    - whatever is not of one stage alone inside a cell with `pipeline_stage`, every `local` operator above all;
    - what crosses comes out of a plain operator with a layout, the last one of its cell;
    - where the cell is inlined, the first parameter of a stage (a gain) must meet an operator with a layout before any
      Reshape: it takes the shape of what is received else;
    - nothing behind the gradients may join those of different stages, but a tuple that AddN sums.

Legend: A micro-batches of a call, B sequences of one, S sequence, N = B * S tokens, D width, M conditional layers,
E experts, J noise slices, G routing groups; W = 2 + M * (6 + 2 E) figures of a micro-batch.
"""

import os

from mindspore import Tensor, lazy_inline, nn, ops

from switchyard.config import Config
from switchyard.distributed.gradients import share_of
from switchyard.distributed.mesh import CompiledMesh
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.stages import stages_of_layers
from switchyard.training.loss import TrainLoss
from switchyard.training.micro_batches import calls_of, input_shards
from switchyard.training.optimizer import OptimizerStep

# else the compiler gathers a batch before it takes a part of it
SLICES_STAY_SHARDED = "PIPELINE_SLICE_SKIP_REDISTRIBUTION"


class FirstCell(nn.Cell):
    """Embeds tokens, on the first stage."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model, self.pipeline_stage = model, 0

    def construct(self, tokens: Tensor, valid: Tensor, noise: Tensor) -> Tensor:
        """Takes tokens [B, S] int32, valid [B, S], noise [J, N, D] -> x [N, D]."""
        return self.model.dropout(self.model.embed(tokens, valid), noise)


class StageInputs(nn.Cell):
    """Makes what the layers of a stage read besides x."""

    def __init__(self, model: nn.Cell, stage: int):
        super().__init__(auto_prefix=False)
        self.model, self.pipeline_stage = model, stage

    def construct(self, tokens: Tensor, valid: Tensor) -> tuple:
        """Takes tokens and valid [B, S] -> (ids [N], valid [G, N / G])."""
        return self.model.local_ids(tokens), self.model.local_groups(valid)


class JoinedStatistics(nn.Cell):
    """Puts the statistics of a stage's conditional layers side by side, to be sent to the last stage."""

    def __init__(self, model: nn.Cell, mesh: CompiledMesh, stage: int):
        super().__init__(auto_prefix=False)
        self.model, self.pipeline_stage = model, stage
        self.negative = ops.Neg().shard(((mesh.degrees.data_parallel, 1),))

    def construct(self, *stats) -> Tensor:
        """Returns statistics [G, X] of some layers as the negative of [G, Y], for the compiler sends behind a plain
        operator; LastCell negates it again."""
        return self.negative(self.model.beside(stats))


class LastCell(TrainLoss):
    """Computes loss and figures, on the last stage.

    Args:
        model, config, mesh: as of TrainLoss.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: CompiledMesh):
        super().__init__(model, config, mesh)
        self.pipeline_stage = config.parallel.pipeline_stage - 1
        self.negative = ops.Neg().shard(((mesh.degrees.data_parallel, 1),))

    def construct(self, x: Tensor, labels: Tensor, valid: Tensor, factors: Tensor, *stats) -> Tensor:
        """Takes x [N, D], labels [B, S] int32, valid [B, S] float32, factors [1, A], of a micro-batch its factor of the
        loss at its place and 0 else; statistics of JoinedStatistics -> [A * W]: its figures at its place and 0 else."""
        negative, logits = (), self.model.logits(x)
        for part in stats:
            negative = (*negative, self.negative(part))
        return self.figures(logits, logits, labels, valid, factors, self.model.beside(negative))


class MicroBatch(nn.Cell):
    """Runs one micro-batch through all stages, written out for each: the graph grows with their number.

    Args:
        model: a Decoder on which `shard` was called.
        config: layers, degrees.
        mesh: the devices of a stage.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: CompiledMesh):
        super().__init__(auto_prefix=False)
        self.first, self.last, self.layers = FirstCell(model), LastCell(model, config, mesh), model.layers
        stages = stages_of_layers(config)
        for layer, stage in zip(self.layers, stages):
            layer.pipeline_stage = stage
        self.stages, inputs = tuple(stages), [StageInputs(model, stage) for stage in range(max(stages) + 1)]
        self.stage_inputs = nn.CellList(inputs, auto_prefix=False)
        of = [stages[index] for index in config.moe_layers]  # of each conditional layer
        self.runs = tuple(tuple(k for k, own in enumerate(of) if own == stage) for stage in sorted(set(of)))
        joined = [JoinedStatistics(model, mesh, stage) for stage in sorted(set(of))]
        self.joined = nn.CellList(joined, auto_prefix=False)
        self.transpose = ops.Transpose().shard(((mesh.degrees.data_parallel, 1, 1),))

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, noise: Tensor, factors: Tensor) -> Tensor:
        """Takes tokens, labels [B, S] int32, valid [B, S] float32, noise [N, J, D], factors [1, A]; see LastCell."""
        noise = self.transpose(noise, (1, 0, 2))  # [J, N, D]
        x, stats, joined, read = self.first(tokens, valid, noise), (), (), ()
        for inputs in self.stage_inputs:
            read = (*read, inputs(tokens, valid))
        for index, layer in enumerate(self.layers):
            ids, grouped = read[self.stages[index]]
            x, own, _ = layer(x, ids, grouped, noise, tokens.shape[0])
            if layer.conditional:
                stats = (*stats, own)
        for join, run in zip(self.joined, self.runs):
            own = ()
            for index in run:
                own = (*own, stats[index])
            joined = (*joined, join(*own))
        return self.last(x, labels, valid, factors, *joined)


class SharedMicroBatch(MicroBatch):
    """Runs MicroBatch as one function of the graph that all micro-batches call: compiled once. Not on GPU."""

    @lazy_inline
    def __init__(self, model: nn.Cell, config: Config, mesh: CompiledMesh):
        super().__init__(model, config, mesh)


class Pipelined(nn.Cell):
    """Runs the micro-batches of a step one after the other, as mindspore.parallel.nn.Pipeline does, by slices that
    know how the inputs are sharded.

    Args:
        network: of one micro-batch.
        micro_batches: A.
        shards: into how many shards axis 0 of each input is divided.
    """

    def __init__(self, network: nn.Cell, micro_batches: int, shards: list[int]):
        super().__init__(auto_prefix=False)
        self.network, self.micro_size = network, micro_batches
        slices = [ops.StridedSlice().add_prim_attr("out_shard_size", count) for count in shards * micro_batches]
        self.slices, self.inputs = slices, len(shards)
        sums = [ops.Add().add_prim_attr("pipeline_end", micro) for micro in range(micro_batches)]
        self.adds = [add.shard(((1,), (1,))) for add in sums]

    def construct(self, *inputs) -> Tensor:
        """Takes inputs [A * X, ..] -> the sum of what comes of each micro-batch [X, ..], which is [Y]."""
        total = None
        for micro in range(self.micro_size):
            parts = ()
            for index in range(self.inputs):
                shape = inputs[index].shape
                length, rest = shape[0] // self.micro_size, len(shape) - 1
                begin, end = (micro * length, *(0,) * rest), ((micro + 1) * length, *shape[1:])
                take = self.slices[micro * self.inputs + index]
                parts = (*parts, take(inputs[index], begin, end, (1,) * len(shape)))
            figures = self.network(*parts)
            total = figures if total is None else self.adds[micro](total, figures)
        return total


class PipelineStepGraph(nn.Cell):
    """Does forward, backward, clip and AdamW of one device of a pipeline.

    A gradient is added up in `accumulated` over the micro-batches and summed over the devices once.

    Args:
        model: a Decoder on which `shard` was called.
        config: optimizer, loss factors, degrees.
        mesh: the devices of a stage.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: CompiledMesh):
        super().__init__(auto_prefix=False)
        os.environ[SLICES_STAY_SHARDED] = "1"  # read by the compiler
        kind, shards = MicroBatch if mesh.alone else SharedMicroBatch, input_shards(config)
        self.optimizer = OptimizerStep(model.trainable_params(), config, mesh, calls_of(config))
        self.parameters = self.optimizer.adamw.parameters
        self.loss = Pipelined(kind(model, config, mesh), config.parallel.micro_batch_num, [axes[0] for axes in shards])
        self.gradient = ops.GradOperation(get_by_list=True)
        self.accumulated = self.parameters.clone("accu_grads", init="zeros")
        self.ends = SquaresAndFigures(self.parameters, mesh.degrees)
        self.clear, self.sharded = ops.Assign(), config.parallel.optimizer_shard > 0

    def construct(self, *batch) -> tuple:
        """Takes the arguments of MicroBatch, of all micro-batches, and factors [A, A] with those of each on the
        diagonal; returns (figures [A * W], global norm of the gradients before the clip [])."""
        figures = self.loss(*batch)
        sums = self.gradient(self.loss, self.parameters)(*batch)
        gradients = sums if self.sharded else ops.depend(self.accumulated, sums)
        if self.optimizer.several:
            gradients = self.optimizer.accumulate(gradients)
        if self.optimizer.freezes:
            gradients = self.optimizer.of_learners(gradients)
        norm, figures = self.ends(gradients, figures)
        norm, cleared = self.optimizer.update(gradients, norm), ()
        for total in self.accumulated:
            cleared = (*cleared, self.clear(total, ops.zeros_like(total)))
        return ops.depend(figures, cleared), norm


class SquaresAndFigures(nn.Cell):
    """Gives all stages the global norm of gradients and the last stage's figures, by one AllReduce behind both passes.

    Args:
        parameters: those that the gradients are of; each is on one stage.
        degrees: how they are sharded; a shard that several devices hold counts once.
    """

    def __init__(self, parameters, degrees: ParallelDims):
        super().__init__()
        self.shares = tuple(share_of(parameter.name, parameter.shape, degrees) for parameter in parameters)
        self.devices = degrees.stage_devices
        self.square, self.sum, self.add = ops.Square(), ops.ReduceSum(), ops.AddN()
        self.sqrt, self.over_devices, self.expand_dims = ops.Sqrt(), ops.AllReduce(), ops.ExpandDims()

    def construct(self, gradients: tuple, figures: Tensor) -> tuple:
        """Takes gradients of this device; figures [X] of the last stage, 0 on the others -> (norm [], figures [X])."""
        squares = ()
        for index, gradient in enumerate(gradients):
            squares = (*squares, self.sum(self.square(gradient)) * self.shares[index])
        # of the parameters of this stage: the others fall out of a tuple
        squares = self.expand_dims(self.add(squares), 0)
        total = self.over_devices(ops.concat((squares, figures / self.devices)))
        return self.sqrt(total[0]), total[1:]
