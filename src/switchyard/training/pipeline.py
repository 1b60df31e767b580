"""The training step cut into pipeline stages: 1F1B, as MindSpore's compiler makes it of one network.

Every device compiles the whole network and keeps the cells of its stage; between stages the compiler puts Send and
Receive. It asks for much, and hangs or fails with words of its own otherwise:
    - one lazily inlined cell that holds a micro-batch's whole forward pass, called for every micro-batch. GPUs refuse
      it; there a stage is one device, and without `local` operators the cell is inlined at once;
    - whatever is not of one stage alone inside a cell with `pipeline_stage`, every `local` operator above all;
    - what crosses comes out of a plain operator with a layout, the last one of its cell;
    - where the cell is inlined, the first parameter of a stage (a gain) must meet an operator with a layout before any
      Reshape: it takes the shape of what is received else;
    - nothing behind the gradients may join those of different stages, but a tuple that AddN sums.

Legend: A micro-batches, B sequences of one, S sequence, N = B * S tokens, D width, M conditional layers, E experts,
J noise slices; W = 2 + M * (TALLY + 2 E) figures of a micro-batch.
"""

import os

import numpy as np
from mindspore import Tensor, lazy_inline, nn, ops

from switchyard.config import Config
from switchyard.distributed.mesh import Mesh
from switchyard.distributed.placement import Degrees
from switchyard.distributed.stages import stages_of_layers
from switchyard.training.parallel_step import ParallelLoss, StepEnd, TallyJoin, share_of

SLICES_STAY_CUT = "PIPELINE_SLICE_SKIP_REDISTRIBUTION"  # else the compiler gathers a batch before it takes a part of it


class FirstCell(nn.Cell):
    """Tokens to rows, on the first stage."""

    def __init__(self, model: nn.Cell):
        super().__init__(auto_prefix=False)
        self.model, self.pipeline_stage = model, 0

    def construct(self, tokens: Tensor, noise: Tensor) -> Tensor:
        """Tokens [B, S] int32, noise [J, N, D] -> rows [N, D]."""
        return self.model.enter(tokens, noise)


class JoinedTallies(TallyJoin):
    """The tallies of a stage's conditional layers, side by side, to be sent to the last stage."""

    def __init__(self, mesh: Mesh, stage: int):
        super().__init__(auto_prefix=False)
        self.pipeline_stage = stage
        self.shard(mesh)

    def construct(self, *tallies) -> Tensor:
        """Tallies [data_parallel, X] of some layers -> the negative of [data_parallel, Y]: LastCell turns it back."""
        return self.negative(self.join(tallies))

    def shard(self, mesh: Mesh) -> None:
        """A row for each data slice; a plain operator at the end, behind which the compiler can send."""
        super().shard(mesh)
        self.negative = ops.Neg().shard(((mesh.degrees.data_parallel, 1),))


class LastCell(ParallelLoss):
    """Rows to loss and figures, on the last stage.

    Args:
        model, config, mesh: as of ParallelLoss.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: Mesh):
        super().__init__(model, config, mesh)
        self.pipeline_stage = config.parallel.pipeline_stage - 1

    def construct(self, x: Tensor, labels: Tensor, valid: Tensor, factors: Tensor, *tallies) -> Tensor:
        """x [N, D], labels [B, S] int32, valid [B, S] float32, factors [1, A], of a micro-batch its factor of the loss
        at its place and 0 else; tallies of JoinedTallies -> [A * W]: its figures at its place and 0 else."""
        logits, count = self.model.logits(x), self.count(valid, (0, 1))
        if self.layers == 0:
            return self.total(self.local(logits, labels, valid, count, factors), 0)
        turned = ()
        for tally in tallies:
            turned = (*turned, self.turned(tally))
        return self.total(self.local(logits, labels, valid, count, factors, self.join(turned)), 0)

    def places(self, config: Config) -> int:
        """Of all micro-batches, so that their sum keeps them apart."""
        return config.micro_batches

    def scaled(self, loss: Tensor, factor: Tensor) -> Tensor:
        """The loss [] times this micro-batch's factor, of [1, A]."""
        return loss * factor.sum()

    def placed(self, figures: Tensor, factors: Tensor) -> Tensor:
        """Figures [1, W] at the place of the factor that is not 0, of [1, A] -> [1, A * W]."""
        place = ops.stop_gradient((factors != 0).astype(figures.dtype)).reshape(-1, 1)  # [A, 1]
        return (place * figures).reshape(1, -1)

    def dense_part(self, logits, labels, valid, count, factor) -> Tensor:
        """[1, A * W]."""
        return self.placed(super().dense_part(logits, labels, valid, count, factor), factor)

    def part(self, logits, labels, valid, count, factor, tally) -> Tensor:
        """[1, A * W]."""
        return self.placed(super().part(logits, labels, valid, count, factor, tally), factor)

    def shard(self, mesh: Mesh) -> None:
        """As ParallelLoss."""
        super().shard(mesh)
        self.turned = ops.Neg().shard(((mesh.degrees.data_parallel, 1),))


class MicroBatch(nn.Cell):
    """Forward pass of one micro-batch through all stages, written out for each: the graph grows with their number.

    Args:
        model: a Decoder on which `shard` was called.
        config: layers, degrees.
        mesh: the devices of a stage.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: Mesh):
        super().__init__(auto_prefix=False)
        self.first, self.last, self.layers = FirstCell(model), LastCell(model, config, mesh), model.layers
        stages = stages_of_layers(config)
        for layer, stage in zip(self.layers, stages):
            layer.pipeline_stage = stage
        of = [stages[index] for index in config.moe_layers]  # of each conditional layer
        self.runs = tuple(tuple(k for k, own in enumerate(of) if own == stage) for stage in sorted(set(of)))
        self.joined = nn.CellList([JoinedTallies(mesh, stage) for stage in sorted(set(of))], auto_prefix=False)
        self.noisy, self.no_noise = model.noise_slices > 0, Tensor(np.zeros((1, 1, 1), np.float32))
        self.turn = ops.Transpose().shard(((mesh.degrees.data_parallel, 1, 1),))

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, *rest) -> Tensor:
        """tokens, labels [B, S] int32, valid [B, S] float32, noise [N, J, D] where the model reads some, factors [1, A]
        -> see LastCell."""
        noise = self.turn(rest[0], (1, 0, 2)) if self.noisy else self.no_noise  # [J, N, D]
        x, tallies, joined = self.first(tokens, noise), (), ()
        for layer in self.layers:
            x, tally = layer(x, tokens, valid, noise)
            if layer.conditional:
                tallies = (*tallies, tally)
        for join, run in zip(self.joined, self.runs):
            own = ()
            for index in run:
                own = (*own, tallies[index])
            joined = (*joined, join(*own))
        return self.last(x, labels, valid, rest[-1], *joined)


class SharedMicroBatch(MicroBatch):
    """The same, as one function of the graph that all micro-batches call: compiled once. Not on GPU."""

    @lazy_inline
    def __init__(self, model: nn.Cell, config: Config, mesh: Mesh):
        super().__init__(model, config, mesh)


class Pipelined(nn.Cell):
    """The micro-batches of a step, one after the other: what mindspore.parallel.nn.Pipeline does, and slices that know
    how the inputs are cut.

    Args:
        network: of one micro-batch.
        micro_batches: A.
        cuts: into how many slices axis 0 of each input is cut.
    """

    def __init__(self, network: nn.Cell, micro_batches: int, cuts: list[int]):
        super().__init__(auto_prefix=False)
        self.network, self.micro_size = network, micro_batches
        slices = [ops.StridedSlice().add_prim_attr("out_shard_size", cut) for cut in cuts * micro_batches]
        self.slices, self.inputs = slices, len(cuts)
        sums = [ops.Add().add_prim_attr("pipeline_end", micro) for micro in range(micro_batches)]
        self.adds = [add.shard(((1,), (1,))) for add in sums]

    def construct(self, *inputs) -> Tensor:
        """Inputs [A * X, ..] -> the sum of what comes of each micro-batch [X, ..], which is [Y]."""
        total = None
        for micro in range(self.micro_size):
            parts = ()
            for index in range(self.inputs):
                whole = inputs[index].shape
                length, rest = whole[0] // self.micro_size, len(whole) - 1
                begin, end = (micro * length, *(0,) * rest), ((micro + 1) * length, *whole[1:])
                take = self.slices[micro * self.inputs + index]
                parts = (*parts, take(inputs[index], begin, end, (1,) * len(whole)))
            figures = self.network(*parts)
            total = figures if total is None else self.adds[micro](total, figures)
        return total


class PipelineStepGraph(StepEnd):
    """Forward, backward, clip and AdamW of one device of a pipeline.

    A gradient is added up in `accumulated` over the micro-batches and summed over the devices once.

    Args:
        model: a Decoder on which `shard` was called.
        config: optimizer, loss factors, degrees.
        mesh: the devices of a stage.
        cuts: as of Pipelined.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: Mesh, cuts: list[int]):
        super().__init__(model, config)
        os.environ[SLICES_STAY_CUT] = "1"  # read by the compiler
        kind = MicroBatch if mesh.alone else SharedMicroBatch
        self.loss = Pipelined(kind(model, config, mesh), config.micro_batches, cuts)
        self.accumulated = self.parameters.clone("accu_grads", init="zeros")
        self.ends = SquaresAndFigures(self.parameters, mesh.degrees)
        self.clear, self.sliced = ops.Assign(), config.parallel.optimizer_shard > 0

    def construct(self, *batch) -> tuple:
        """The arguments of ParallelLoss, factors [A, A] with those of the micro-batches on the diagonal -> (figures
        [A * W], the global norm of the gradients before the clip)."""
        figures = self.loss(*batch)
        sums = self.gradient(self.loss, self.parameters)(*batch)
        gradients = sums if self.sliced else ops.depend(self.accumulated, sums)
        norm, figures = self.ends(gradients, figures)
        norm, cleared = self.update(gradients, norm), ()
        for total in self.accumulated:
            cleared = (*cleared, self.clear(total, ops.zeros_like(total)))
        return ops.depend(figures, cleared), norm


class SquaresAndFigures(nn.Cell):
    """Global norm of gradients, and the last stage's figures for all, by one AllReduce behind both passes.

    Args:
        parameters: those that the gradients are of; each is on one stage.
        degrees: how they are cut; a slice that several devices hold counts once.
    """

    def __init__(self, parameters, degrees: Degrees):
        super().__init__()
        self.shares = tuple(share_of(parameter.name, parameter.shape, degrees) for parameter in parameters)
        self.devices = degrees.stage_devices
        self.square, self.sum, self.add = ops.Square(), ops.ReduceSum(), ops.AddN()
        self.sqrt, self.over_devices, self.lift = ops.Sqrt(), ops.AllReduce(), ops.ExpandDims()

    def construct(self, gradients: tuple, figures: Tensor) -> tuple:
        """Gradients of this device; figures [X], those of the last stage, 0 on the others -> (norm [], figures [X])."""
        squares = ()
        for index, gradient in enumerate(gradients):
            squares = (*squares, self.sum(self.square(gradient)) * self.shares[index])
        squares = self.lift(self.add(squares), 0)  # of the parameters of this stage: the others fall out of a tuple
        total = self.over_devices(ops.concat((squares, figures / self.devices)))
        return self.sqrt(total[0]), total[1:]
