"""The training step of one device among many, as MindSpore's semi-automatic parallelism compiles it.

Legend: B batch, S sequence, N = B * S tokens, D width, V vocabulary, M conditional layers, E experts, J noise slices.
Shapes are those of all devices together; what `local` operators see is one device's slice of them.
"""

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.parallel.auto_parallel import AutoParallel

from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.kernels.adam import AdamW
from switchyard.kernels.cross_entropy import TokenLosses
from switchyard.models import create_model
from switchyard.moe import TALLY
from switchyard.parallel.mesh import Mesh, first
from switchyard.parallel.placement import Degrees, optimizer_slices, placement


class ParallelLoss(nn.Cell):
    """What training makes small, as in LossCell, and all figures of the step in one sum over the devices.

    Args:
        model: a Decoder on which `shard` was called.
        config: the factors are read.
        mesh: the devices.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: Mesh):
        super().__init__(auto_prefix=False)
        self.model, self.token_losses = model, TokenLosses()
        self.balance_factor, self.z_factor = config.moe.aux_loss_factor, config.moe.z_loss_factor
        self.layers, self.slices = len(config.moe_layers), mesh.degrees.data_parallel
        self.columns = TALLY + 2 * config.moe.expert_num
        self.no_noise = Tensor(np.zeros((1, 1, 1), np.float32))
        self.noisy = model.noise_slices > 0
        self.shard(mesh)

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, noise: Tensor = None) -> Tensor:
        """tokens, labels [B, S] int32, valid [B, S] float32, noise [N, J, D] -> [2 + M * (TALLY + 2 E)].

        The first entry is the loss, the only one with a gradient; the second the cross-entropy; then come the sums over
        the data slices of every conditional layer's tally, see MoELayer.tally.
        """
        noise = self.turn(noise, (1, 0, 2)) if self.noisy else self.no_noise  # [J, N, D]
        logits, tallies = self.model.spread(tokens, valid, noise)
        count = self.count(valid, (0, 1))  # [1, 1]
        if self.layers == 0:
            return self.total(self.local(logits, labels, valid, count), 0)
        tally = tallies[0]
        for more in tallies[1:]:
            tally = self.append(tally, more)  # at last [data_parallel, M * (TALLY + 2 E)]
        return self.total(self.local(logits, labels, valid, count, tally), 0)

    def cross_entropy(self, logits, labels, valid, count):
        """Part of a data slice in the mean over all valid tokens: []."""
        losses = self.token_losses(logits, labels.reshape(-1))  # [N]
        return (losses * valid.reshape(-1)).sum() / ops.maximum(count.sum(), 1.0)

    def put_beside(self, left: Tensor, right: Tensor) -> Tensor:
        """[1, X], [1, Y] -> [1, X + Y]."""
        return ops.concat((left, right), 1)

    def dense_part(self, logits: Tensor, labels: Tensor, valid: Tensor, count: Tensor) -> Tensor:
        """What a data slice adds: [1, 2]."""
        loss = self.cross_entropy(logits, labels, valid, count)
        return ops.stack((loss, ops.stop_gradient(loss))).reshape(1, 2)

    def part(self, logits: Tensor, labels: Tensor, valid: Tensor, count: Tensor, tally: Tensor) -> Tensor:
        """What a data slice adds: [1, 2 + M * (TALLY + 2 E)]."""
        loss, layers = self.cross_entropy(logits, labels, valid, count), tally.reshape(self.layers, self.columns)
        balance = self.balance_factor * layers[:, 0] + self.z_factor * layers[:, 1] + layers[:, 2]  # [M]
        total = loss + balance.sum() / self.slices
        losses = ops.stack((total, ops.stop_gradient(loss))).reshape(1, 2)
        return ops.concat((losses, ops.stop_gradient(tally)), 1)

    def shard(self, mesh: Mesh) -> None:
        """Two sums over the devices: of the valid tokens, and of all figures."""
        data, rows = mesh.degrees.data_parallel, mesh.cut("data", None)
        width = 2 + self.layers * self.columns
        self.count = ops.ReduceSum(keep_dims=True).shard(((data, 1),))
        self.total = ops.ReduceSum().shard(((data, 1),))
        self.append = mesh.local(self.put_beside, (rows, rows), (rows,), beside, first)
        self.turn = ops.Transpose().shard(((data, 1, 1),))
        inputs = (rows, rows, rows, mesh.cut(None, None))

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
        self.shares = tuple(1.0 / copies_of(p.name, p.shape, degrees) for p in parameters)
        self.square, self.sum, self.sqrt, self.over_devices = ops.Square(), ops.ReduceSum(), ops.Sqrt(), ops.AllReduce()

    def construct(self, gradients: tuple) -> Tensor:
        total = 0.0
        for index, gradient in enumerate(gradients):
            total = total + self.sum(self.square(gradient)) * self.shares[index]
        return self.sqrt(self.over_devices(total))


def copies_of(name: str, shape: tuple[int, ...], degrees: Degrees) -> int:
    """Devices of a stage that hold the same slice of a parameter's gradient."""
    cut = placement(name, shape, degrees)
    return len(degrees.replicas(cut, 0)) // optimizer_slices(shape, cut, degrees, 0)


class ParallelStepGraph(nn.Cell):
    """Forward, backward, clip and AdamW of one device among many.

    Args:
        model: a Decoder on which `shard` was called.
        config: optimizer, loss factors, degrees.
        mesh: the devices.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: Mesh):
        super().__init__(auto_prefix=False)
        optimizer = config.optimizer
        self.loss, self.clip = ParallelLoss(model, config, mesh), optimizer.clip_grad
        self.parameters = ParameterTuple(model.trainable_params())
        self.optimizer = AdamW(self.parameters, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay)
        self.norm = SlicedNorm(self.parameters, mesh.degrees)
        self.gradient = ops.GradOperation(get_by_list=True)
        self.learning_rate = Parameter(Tensor(0.0, mstype.float32), "learning_rate", False)

    def construct(self, *batch) -> tuple:
        """The arguments of ParallelLoss -> (its figures, global norm of the gradients before the clip)."""
        figures = self.loss(*batch)
        gradients = self.gradient(self.loss, self.parameters)(*batch)
        norm = self.norm(gradients)
        self.optimizer(self.clipped(gradients, norm), self.learning_rate * 1.0, norm)
        return figures, norm

    def clipped(self, gradients, norm):
        """Gradients of global norm at most `clip`."""
        if self.clip is None:
            return gradients
        factor, shorter = ops.minimum(self.clip / (norm + 1e-6), 1.0), ()
        for gradient in gradients:
            shorter = (*shorter, gradient * factor)
        return shorter


def parallel_step(config: Config, vocab_size: int, drawn: bool = True) -> AutoParallel:
    """The training step to compile and run on the devices that `parallel` asks for; communication must be started.

    Call it with a device's slices of tokens, labels [B, S] int32, valid [B, S] float32 and, where the model reads
    noise, noise [N, J, D] float32. Its `network.learning_rate` is set by the caller. Weights that are not
    `drawn` have shapes and no numbers: the graph can be compiled, not run.

    Raises:
        UserError: what cannot be cut over devices.
    """
    if config.parallel.pipeline_stage > 1:
        stages = config.parallel.pipeline_stage
        raise UserError(f"parallel.pipeline_stage: {stages}; 1: the decoder is not cut into stages in this version")
    if config.train.gradient_accumulation_steps > 1:
        count = config.train.gradient_accumulation_steps
        raise UserError(f"train.gradient_accumulation_steps: {count}; 1 where parallel degrees cut the model")
    if config.model.compute_dtype == "float16":
        raise UserError("model.compute_dtype: float16; 'bfloat16' or 'float32' where parallel degrees cut the model")
    moe = config.moe
    for key, value in (
        ("router_warmup_steps", moe.router_warmup_steps or None),
        ("router_freeze_step", moe.router_freeze_step),
    ):
        if value is not None:
            raise UserError(f"moe.{key}: {value}; leave it at its default where parallel degrees cut the model")
    model, data = create_model(config, vocab_size, drawn=drawn), config.parallel.data_parallel
    mesh = Mesh(config, model.noise_slices > 0)
    model.shard(mesh)
    if config.parallel.recompute:
        for layer in model.layers:
            layer.recompute()
    step = AutoParallel(ParallelStepGraph(model, config, mesh).set_train(True), parallel_mode="semi_auto")
    noise = ((data, 1, 1),) if model.noise_slices else ()
    step.dataset_strategy(((data, 1),) * 3 + noise)
    if config.parallel.optimizer_shard:
        step.hsdp(shard_size=-1, threshold=0, optimizer_level=f"level{config.parallel.optimizer_shard}")
    return step


def batch_slices(config: Config, vocab_size: int, noise_slices: int = 0, seed: int = 0) -> tuple[Tensor, ...]:
    """Random arguments of `parallel_step`, of the shapes that one device reads."""
    random, model = np.random.default_rng(seed), config.model
    batch = config.data.batch_size // config.parallel.data_parallel
    tokens = random.integers(0, vocab_size, (batch, model.seq_length + 1)).astype(np.int32)
    arrays = [tokens[:, :-1], tokens[:, 1:], np.ones((batch, model.seq_length), np.float32)]
    if noise_slices:
        arrays.append(random.random((batch * model.seq_length, noise_slices, model.hidden_size), np.float32))
    return tuple(Tensor(np.ascontiguousarray(array)) for array in arrays)


def unpack(figures: np.ndarray, config: Config) -> dict:
    """Figures of ParallelLoss -> those that `step.name_figures` names, as arrays."""
    layers, slices, experts = len(config.moe_layers), config.parallel.data_parallel, config.moe.expert_num
    if layers == 0:
        return {"loss": figures[1], "balance_loss": 0.0, "z_loss": 0.0, "audit": {}}
    tally = figures[2:].reshape(layers, -1)
    load, importance = tally[:, TALLY : TALLY + experts], tally[:, TALLY + experts :]
    total = load.sum(1)
    audit = {
        "load": load,
        "importance": importance,
        "dropped": (total - tally[:, 4]) / np.maximum(total, 1.0),
        "entropy": tally[:, 3] / slices,
        "max_violation": load.max(1) / np.maximum(load.mean(1), 1e-9) - 1.0,
        "z": tally[:, 5] / slices,
    }
    balance, z = tally[:, 0].mean() / slices, tally[:, 1].mean() / slices
    return {"loss": figures[1], "balance_loss": balance, "z_loss": z, "audit": audit}
