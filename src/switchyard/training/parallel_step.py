"""The training step of one device among many, as MindSpore's semi-automatic parallelism compiles it.

Legend: A micro-batches, B sequences of one, S sequence, N = B * S tokens, D width, V vocabulary, M conditional layers,
E experts, J noise slices.
Shapes are those of all devices together; what `local` operators see is one device's slice of them.
"""

import json

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, get_context, nn, ops
from mindspore import dtype as mstype
from mindspore.parallel.auto_parallel import AutoParallel

from switchyard.config import Config
from switchyard.distributed.mesh import Mesh, first
from switchyard.distributed.placement import Degrees, optimizer_slices, placement
from switchyard.distributed.stages import factors
from switchyard.models import create_model
from switchyard.moe.layer import ROW_MEANS, TALLY
from switchyard.nn.adamw import AdamW, gradient_scale
from switchyard.nn.cross_entropy import TokenLosses
from switchyard.nn.masks import keep_where
from switchyard.training.limits import check_offered

SPEED_UP = "parallel_speed_up.json"  # name of the file that hands parallel.transformer_opt to the compiler


class TallyJoin(nn.Cell):
    """A cell that puts the tallies of conditional layers side by side."""

    def join(self, tallies: tuple) -> Tensor:
        """Tallies [data_parallel, X] of some layers -> [data_parallel, Y]."""
        tally = tallies[0]
        for more in tallies[1:]:
            tally = self.append(tally, more)
        return tally

    def put_beside(self, left: Tensor, right: Tensor) -> Tensor:
        """[1, X], [1, Y] -> [1, X + Y]."""
        return ops.concat((left, right), 1)

    def shard(self, mesh: Mesh) -> None:
        """A row for each data slice."""
        rows = mesh.cut("data", None)
        self.append = mesh.local(self.put_beside, (rows, rows), (rows,), beside, first)


class ParallelLoss(TallyJoin):
    """What training makes small, as in LossCell, and all figures of the step in one sum over the devices.

    Args:
        model: a Decoder on which `shard` was called.
        config: the factors are read.
        mesh: the devices.
        micro: which micro-batch of those that it is given, from 0.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: Mesh, micro: int = 0):
        super().__init__(auto_prefix=False)
        self.micro, self.model, self.token_losses = micro, model, TokenLosses()
        self.balance_factor, self.z_factor = config.moe.aux_loss_factor, config.moe.z_loss_factor
        self.layers, self.slices = len(config.moe_layers), mesh.degrees.data_parallel
        self.columns = TALLY + 2 * config.moe.expert_num
        self.width = (2 + self.layers * self.columns) * self.places(config)
        self.no_noise = Tensor(np.zeros((1, 1, 1), np.float32))
        self.noisy, self.weighted = model.noise_slices > 0, is_weighted(config)
        self.micro_batches = config.train.gradient_accumulation_steps
        self.one = Tensor(np.ones((1, 1), np.float32))
        self.of_rows = Tensor(row_means(config))
        self.shard(mesh)

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, *rest) -> Tensor:
        """Of one micro-batch of tokens, labels [A * B, S] int32, valid [A * B, S] float32, noise [A * N, J, D] where
        the model reads some, factors [1, A] of the losses where `is_weighted` -> [2 + M * (TALLY + 2 E)].

        The first entry is the loss, the only one with a gradient; the second the cross-entropy; then come the sums over
        the data slices of every conditional layer's tally, see MoELayer.tally. No operator reads them behind the sum
        over the devices, which keeps the AllReduce of a GPU in order: see graph.sums_may_race.
        """
        factor = rest[-1] if self.weighted else self.one
        noise = rest[0] if self.noisy else self.no_noise
        if self.micro_batches > 1:
            tokens, labels, valid = self.take(tokens), self.take(labels), self.take(valid)
            factor, noise = self.take_factor(factor), self.take_noise(noise) if self.noisy else noise
        noise = self.turn(noise, (1, 0, 2)) if self.noisy else noise  # [J, N, D]
        logits, tallies = self.model.spread(tokens, valid, noise)
        count = self.count(valid, (0, 1))  # [1, 1]
        if self.layers == 0:
            return self.total(self.local(logits, labels, valid, count, factor), 0)
        tally = self.join(tallies)  # [data_parallel, M * (TALLY + 2 E)]
        return self.total(self.local(logits, labels, valid, count, factor, tally), 0)

    def places(self, config: Config) -> int:
        """Of how many micro-batches the figures are that come out."""
        return 1

    def rows_of(self, rows: Tensor) -> Tensor:
        """The micro-batch of a data slice, [A * X, ..] -> [X, ..]."""
        length = rows.shape[0] // self.micro_batches
        return rows[self.micro * length : (self.micro + 1) * length]

    def factor_of(self, factors: Tensor) -> Tensor:
        """[1, A] -> [1, 1]."""
        return factors[:, self.micro : self.micro + 1]

    def cross_entropy(self, logits, labels, valid, count):
        """Part of a data slice in the mean over all valid tokens: []."""
        losses = self.token_losses(logits, labels.reshape(-1))  # [N]
        return keep_where(losses, valid.reshape(-1)).sum() / ops.maximum(count.sum(), 1.0)

    def dense_part(self, logits: Tensor, labels: Tensor, valid: Tensor, count: Tensor, factor: Tensor) -> Tensor:
        """What a data slice adds: [1, 2]."""
        loss = self.cross_entropy(logits, labels, valid, count)
        return ops.stack((self.scaled(loss, factor), ops.stop_gradient(loss))).reshape(1, 2)

    def scaled(self, loss: Tensor, factor: Tensor) -> Tensor:
        """The loss [] times the factor [1, 1], where there is one."""
        return loss * factor.reshape(()) if self.weighted else loss

    def part(self, logits, labels, valid, count, factor, tally) -> Tensor:
        """What a data slice adds: [1, 2 + M * (TALLY + 2 E)]."""
        loss, layers = self.cross_entropy(logits, labels, valid, count), tally.reshape(self.layers, self.columns)
        balance = self.balance_factor * layers[:, 0] + self.z_factor * layers[:, 1] + layers[:, 2]  # [M]
        rows = ops.maximum(count.sum(), 1.0)  # real ones of all data slices; without windows a row is a token
        total = loss + balance.sum() / rows
        tally = (layers * (self.of_rows / rows + (1.0 - self.of_rows))).reshape(tally.shape)
        losses = ops.stack((self.scaled(total, factor), ops.stop_gradient(loss))).reshape(1, 2)
        return ops.concat((losses, ops.stop_gradient(tally)), 1)

    def shard(self, mesh: Mesh) -> None:
        """Two sums over the devices: of the valid tokens, and of all figures."""
        super().shard(mesh)
        data, rows = mesh.degrees.data_parallel, mesh.cut("data", None)
        width, micro_batches = self.width, self.micro_batches

        def one_of(whole):
            return [whole[0] // micro_batches, *whole[1:]]

        def one_factor(whole):
            return [1, 1]

        long, whole = mesh.cut("data", None, None), mesh.cut(None, None)
        self.take = mesh.local(self.rows_of, (rows,), (rows,), one_of, first)
        self.take_noise = mesh.local(self.rows_of, (long,), (long,), one_of, first)
        self.take_factor = mesh.local(self.factor_of, (whole,), (whole,), one_factor, first)
        self.count = ops.ReduceSum(keep_dims=True).shard(((data, 1),))
        self.total = ops.ReduceSum().shard(((data, 1),))
        self.turn = ops.Transpose().shard(((data, 1, 1),))
        inputs = (rows, rows, rows, mesh.cut(None, None), mesh.cut(None, None))

        def shape(*shapes):
            return [data, width]

        work, inputs = (self.part, (*inputs, rows)) if self.layers else (self.dense_part, inputs)
        self.local = mesh.local(work, inputs, (rows,), shape, first)


def beside(left, right):
    """Shape of two matrices side by side."""
    return [left[0], left[1] + right[1]]


class SlicedNorm(nn.Cell):
    """Global norm of gradients of which every device holds a slice: one AllReduce of a scalar.

    Args:
        parameters: those that the gradients are of.
        degrees: how they are cut; a slice that several devices hold counts once.
    """

    def __init__(self, parameters, degrees: Degrees):
        super().__init__()
        self.shares = tuple(share_of(p.name, p.shape, degrees) for p in parameters)
        self.square, self.sum, self.sqrt, self.over_devices = ops.Square(), ops.ReduceSum(), ops.Sqrt(), ops.AllReduce()

    def construct(self, gradients: tuple) -> Tensor:
        total = 0.0
        for index, gradient in enumerate(gradients):
            total = total + self.sum(self.square(gradient)) * self.shares[index]
        return self.sqrt(self.over_devices(total))


def share_of(name: str, shape: tuple[int, ...], degrees: Degrees) -> float:
    """One by the devices of a stage that hold the same slice of a parameter's gradient."""
    cut = placement(name, shape, degrees)
    return optimizer_slices(shape, cut, degrees, 0) / len(degrees.replicas(cut, 0))


class StepEnd(nn.Cell):
    """What follows the gradients, on one device among many: clip and AdamW.

    Args:
        model: a Decoder on which `shard` was called.
        config: the optimizer.
    """

    def __init__(self, model: nn.Cell, config: Config):
        super().__init__(auto_prefix=False)
        optimizer = config.optimizer
        self.model, self.clip = model, optimizer.clip_grad
        self.scaled = config.model.compute_dtype == "float16"
        self.parameters = ParameterTuple(model.trainable_params())
        decay = (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay)
        self.optimizer = AdamW(self.parameters, *decay)
        self.gradient, self.is_finite = ops.GradOperation(get_by_list=True), ops.IsFinite()
        self.learning_rate = Parameter(Tensor(0.0, mstype.float32), "learning_rate", False)
        self.unscale = Parameter(Tensor(1.0, mstype.float32), "unscale", False) if self.scaled else None

    def update(self, gradients: tuple, norm: Tensor) -> Tensor:
        """The step by gradients and their global norm, both times the loss scale -> the norm without it.

        Nothing changes where the norm is not finite.
        """
        if self.scaled:
            norm = norm * self.unscale
        scale = gradient_scale(norm, self.clip, self.unscale)
        self.optimizer(gradients, self.learning_rate * 1.0, self.is_finite(norm), None, scale)
        return norm


class ParallelStepGraph(StepEnd):
    """Forward, backward, clip and AdamW of one device among many.

    Micro-batches stand in the graph one after the other, each waiting for the gradients of the one before, so that
    only one holds its activations; the sums over the devices are made for each.

    Args:
        model: a Decoder on which `shard` was called.
        config: optimizer, loss factors, degrees.
        mesh: the devices.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: Mesh):
        super().__init__(model, config)
        losses = [ParallelLoss(model, config, mesh, micro) for micro in range(config.train.gradient_accumulation_steps)]
        self.losses = nn.CellList(losses, auto_prefix=False)
        self.norm, self.after = SlicedNorm(self.parameters, mesh.degrees), ops.Depend()

    def construct(self, *batch) -> tuple:
        """The arguments of ParallelLoss -> (its figures of each micro-batch, the global norm of the gradients before
        the clip)."""
        all_figures, gradients = (), ()
        for loss in self.losses:
            if len(gradients) > 0:
                batch = (self.after(batch[0], gradients[0]), *batch[1:])
            all_figures = (*all_figures, loss(*batch))
            gradients = self.added(gradients, self.gradient(loss, self.parameters)(*batch))
        return (*all_figures, self.update(gradients, self.norm(gradients)))

    def added(self, gradients, more):
        """The sums of two tuples, of which the first may be empty."""
        if len(gradients) == 0:
            return more
        sums = ()
        for gradient, other in zip(gradients, more):
            sums = (*sums, gradient + other)
        return sums


def is_weighted(config: Config) -> bool:
    """Whether each micro-batch comes with a factor of its loss: the loss scale times its share of the tokens."""
    return config.model.compute_dtype == "float16" or config.micro_batches > 1


def parallel_step(config: Config, vocab_size: int, drawn: bool = True) -> AutoParallel:
    """The training step to compile and run on the devices that `parallel` asks for; communication must be started.

    Call it with a device's slices of what ParallelLoss reads: tokens, labels [A * B, S] int32, valid [A * B, S]
    float32, where the model reads noise also noise [A * N, J, D] float32, and where `is_weighted` `factors`. A
    device's slice holds its parts of the micro-batches one after the other. `network.learning_rate` is set by the
    caller, and with float16 `network.unscale`, the inverse of the loss scale. Weights that are not `drawn` have shapes
    and no numbers: the graph can be compiled, not run.

    Raises:
        UserError: what cannot be cut over devices.
    """
    check_offered(config, get_context("device_target"))
    model = create_model(config, vocab_size, drawn=drawn)
    mesh = Mesh(config, model.noise_slices > 0)
    model.shard(mesh)
    if config.parallel.recompute:
        for layer in model.layers:
            layer.recompute()
    inputs = input_slices(config, model.noise_slices)
    if config.parallel.pipeline_stage == 1:
        return over_devices(ParallelStepGraph(model, config, mesh).set_train(True), config, inputs)
    from switchyard.training.pipeline import PipelineStepGraph  # which is made of parts of this module

    graph = PipelineStepGraph(model, config, mesh, [cut[0] for cut in inputs])
    return over_devices(graph.set_train(True), config, inputs)


def input_slices(config: Config, noise_slices: int) -> tuple:
    """How the arguments of ParallelLoss are cut, by axis."""
    data = config.parallel.data_parallel
    noise, factor = ((data, 1, 1),) if noise_slices else (), ((1, 1),) if is_weighted(config) else ()
    return ((data, 1),) * 3 + noise + factor


def over_devices(network: nn.Cell, config: Config, inputs: tuple) -> AutoParallel:
    """A network whose parts know their layouts, to be compiled for the devices of `parallel`; `inputs` says how its
    arguments are cut."""
    cut = config.parallel
    step = AutoParallel(network, parallel_mode="semi_auto")
    step.dataset_strategy(inputs)
    if cut.pipeline_stage > 1:
        step.pipeline(stages=cut.pipeline_stage, scheduler="1f1b")
    if cut.optimizer_shard:
        step.hsdp(shard_size=-1, threshold=0, optimizer_level=f"level{cut.optimizer_shard}")
    if cut.comm_fusion:
        step.comm_fusion({"openstate": True} | {kind: fused(size) for kind, size in cut.comm_fusion.items()})
    return step


def fused(size: int | str) -> dict:
    """What `comm_fusion` wants for a kind of collective; size in MB, or "auto"."""
    return {"mode": "auto", "config": None} if size == "auto" else {"mode": "size", "config": size}


def speed_up_file(config: Config) -> str:
    """What a file for `transformer_opt` holds: parallel.transformer_opt as JSON."""
    return json.dumps(config.parallel.transformer_opt, indent=1, allow_nan=False)


def batch_slices(config: Config, vocab_size: int, noise_slices: int = 0, seed: int = 0) -> tuple[Tensor, ...]:
    """Random arguments of `parallel_step`, of the shapes that one device reads."""
    random, model, micro_batches = np.random.default_rng(seed), config.model, config.micro_batches
    batch = micro_batches * (config.data.batch_size // config.parallel.data_parallel)
    tokens = random.integers(0, vocab_size, (batch, model.seq_length + 1)).astype(np.int32)
    arrays = [tokens[:, :-1], tokens[:, 1:], np.ones((batch, model.seq_length), np.float32)]
    if noise_slices:
        arrays.append(random.random((batch * model.seq_length, noise_slices, model.hidden_size), np.float32))
    if is_weighted(config):
        arrays.append(factors(config, np.full(micro_batches, 1.0 / micro_batches)))
    return tuple(Tensor(np.ascontiguousarray(array)) for array in arrays)


def row_means(config: Config) -> np.ndarray:
    """1 at the columns of a layer's tally that are means over rows, see MoELayer.tally: [TALLY + 2 E] float32."""
    found = np.zeros(TALLY + 2 * config.moe.expert_num, np.float32)
    found[list(ROW_MEANS)] = 1.0
    return found


def unpack(figures: np.ndarray, config: Config) -> dict:
    """Figures of ParallelLoss -> those that `step.name_figures` names, as arrays."""
    layers, experts = len(config.moe_layers), config.moe.expert_num
    if layers == 0:
        return {"loss": figures[1], "balance_loss": 0.0, "z_loss": 0.0, "audit": {}}
    tally = figures[2:].reshape(layers, -1)
    load, importance = tally[:, TALLY : TALLY + experts], tally[:, TALLY + experts :]
    total = load.sum(1)
    audit = {
        "load": load,
        "importance": importance,
        "dropped": (total - tally[:, 4]) / np.maximum(total, 1.0),
        "entropy": tally[:, 3],
        "max_violation": load.max(1) / np.maximum(load.mean(1), 1e-9) - 1.0,
        "z": tally[:, 5],
    }
    balance, z = tally[:, 0].mean(), tally[:, 1].mean()
    return {"loss": figures[1], "balance_loss": balance, "z_loss": z, "audit": audit}
