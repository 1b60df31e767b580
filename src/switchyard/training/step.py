"""Makes an optimizer step: a compiled program of a micro-batch, called for each, and what the host does around it.

Legend: A micro-batches, B batch, S sequence, N = B * S tokens, D width, V vocabulary, M conditional layers, J noise
slices, W figures of a micro-batch (see training.loss).
"""

import gc
import math
from contextlib import nullcontext

import numpy as np
from mindspore import Parameter, Tensor, nn, set_recursion_limit

from switchyard.checkpoint.adapters import is_adapter
from switchyard.checkpoint.layout import shard_of
from switchyard.checkpoint.store import set_parameters
from switchyard.config import Config
from switchyard.distributed.mesh import LOCAL, LocalMesh
from switchyard.models import create_model
from switchyard.moe import metrics
from switchyard.nn.initializers import set_initial, shapes_only
from switchyard.training.frozen import freeze, is_trained
from switchyard.training.loss import CROSS_ENTROPY, STATISTICS, TrainLoss, figures_num, name_figures
from switchyard.training.loss_scale import LossScale
from switchyard.training.micro_batches import call_inputs, calls_of, forces_choices, input_shards, inputs_of_calls
from switchyard.training.optimizer import OptimizerStep
from switchyard.training.pipeline import PipelineStepGraph
from switchyard.training.teacher import read_teacher

CALL_DEPTH = 1000  # of functions that MindSpore's compiler follows, by default
DEPTH_OF_LAYER = 60  # a decoder of 32 conditional layers exceeds the default
LARGEST_LOSS = float(np.finfo(np.float32).max)  # a loss that is infinite is above it


class StepGraph(nn.Cell):
    """Does forward, backward, clip and AdamW of one micro-batch.

    Args:
        model: see training.loss.TrainLoss; its trainable parameters are float32.
        config: optimizer, loss factors.
        mesh: the devices.
        teacher: see training.loss.TrainLoss.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: LocalMesh = LOCAL, teacher: nn.Cell | None = None):
        super().__init__(auto_prefix=False)
        self.loss = TrainLoss(model, config, mesh, teacher)
        self.optimizer = OptimizerStep(model.trainable_params(), config, mesh, calls_of(config))
        self.differentiate = mesh.differentiate(self.loss, self.optimizer.adamw.parameters)

    @property
    def compile_phase(self) -> str:
        """Returns the phase of the last call, which MindSpore sets in every cell below, at every call."""
        return self._compile_phase

    @compile_phase.setter
    def compile_phase(self, value: str) -> None:
        if value != self._compile_phase:  # else the cells below have it: hundreds of them take milliseconds
            nn.Cell.compile_phase.fset(self, value)

    def construct(self, *batch) -> tuple:
        """Takes the arguments of TrainLoss, returns (its figures, global norm of the gradients before the clip [])."""
        figures, gradients = self.differentiate(*batch)
        if self.optimizer.limits:
            loss = (
                figures.reshape(-1)[CROSS_ENTROPY] * batch[4].reshape(-1)[0]
            )  # [], times its share and the loss scale
            return figures, self.optimizer(gradients, loss)
        return figures, self.optimizer(gradients)


class TrainStep:
    """Makes one optimizer step on all devices together; each process calls it with its own shards.

    With more than one micro-batch the program adds up gradients, each weighted by its share of the valid tokens: the
    cross-entropy's gradient is that of the joined batch. Auxiliary losses are those of each micro-batch, weighted
    likewise. The last call of a step updates the weights.

    A step whose gradient norm is not finite is skipped: weights, moments and the routers' state stay; so is, with
    train.on_bad_loss 'skip', one whose loss is above `loss_limit` or NaN. With float16 the loss is scaled, see
    LossScale.

    Args:
        model: see training.loss.TrainLoss.
        config: optimizer, accumulation, loss factors, compute_dtype.
        mesh: the devices; it has placed the model.
        teacher: see training.loss.TrainLoss; on one device.

    Attributes:
        model: its parameters are full until the step is compiled, and this device's shards from then on.
        shapes: name of each parameter -> shape of the full one.
        size: parameters that are trained, on all devices together.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: LocalMesh = LOCAL, teacher: nn.Cell | None = None):
        gc.collect()  # a Cell that is collected later empties MindSpore's key cache: this graph would compile twice
        self.model, self.config, self.mesh, self.scale = model, config, mesh, LossScale(config)
        self.shapes = mesh.full_shapes(model)
        self.size = sum(math.prod(self.shapes[parameter.name]) for parameter in model.trainable_params())
        if config.parallel.pipeline_stage == 1:
            self.graph = StepGraph(model, config, mesh, teacher)
        else:
            self.graph = PipelineStepGraph(model, config, mesh)
        self.graph.set_train(True)
        self.program = mesh.program(self.graph, input_shards(config))
        routers = [cell.router for _, cell in model.cells_and_names() if hasattr(cell, "train_dispatcher")]
        self.routers = routers if any(router.state() for router in routers) else []  # those that balance by a bias

    def __call__(
        self, tokens, labels, valid, noise, learning_rate: float, replay=None, routers_learn=True, loss_limit=math.inf
    ) -> dict:
        """Makes the step, and waits for it.

        Args:
            tokens, labels: [A, B, S] int32, NumPy arrays, as are the others: this device's shards.
            valid: [A, B, S] float32.
            noise: [A, max(J, 1), N, D] float32.
            learning_rate: of this step.
            replay: choices to force [A, M, N, K] int32, see models.Decoder; None in a run that forces none.
            routers_learn: read where moe.router_freeze_step is set; false leaves the routers' parameters and bias.
            loss_limit: read where train.on_bad_loss is 'skip' and no compiler shards the step: no larger loss is
                applied.

        Returns:
            Metrics of the whole step: those of `loss.name_figures`; gradient_norm before the clip; loss_scale and
            skipped (1 where the update was refused); with moe.record `choices` [A, M, N, K].
        """
        if not self.model.training:  # evaluation switches the same model over; hundreds of cells take milliseconds
            self.graph.set_train(True)
        shares, scale = self.shares(valid * (labels >= 0) if self.config.ignores_labels else valid), self.scale.factor
        control = self.graph.optimizer
        control.set(learning_rate=learning_rate, unscale=1.0 / scale, routers_learn=float(routers_learn))
        control.set(loss_limit=min(loss_limit, LARGEST_LOSS))
        arrays = [tokens, labels, valid, noise] if replay is None else [tokens, labels, valid, noise, replay]
        figures, norm = [], None
        calls = calls_of(self.config)
        for call, inputs in enumerate(inputs_of_calls(self.config, arrays, scale * shares)):
            control.set(begins=float(call == 0), ends=float(call == calls - 1))
            found, norm = self.program(*map(Tensor.from_numpy, inputs))  # no copy: noise is gigabytes
            figures.append(found)
        return self.finish(figures, float(norm.asnumpy()), shares, routers_learn, loss_limit)

    def shares(self, valid: np.ndarray) -> np.ndarray:
        """Returns the share of each micro-batch in the valid tokens of the step, on all devices: [A, B, S] -> [A]."""
        if len(valid) == 1:
            return np.ones(1)
        counts = self.mesh.processes.gather(valid.sum((1, 2), dtype=np.float64)).sum(0)  # [A]
        return counts / max(counts.sum(), 1.0)

    def finish(self, figures, norm: float, shares: np.ndarray, routers_learn: bool, loss_limit=math.inf) -> dict:
        """Does what follows a step on the host: metrics, the loss scale, the routers' bias."""
        scale, alive = self.scale.factor, math.isfinite(norm)
        rows = np.concatenate([part.asnumpy().reshape(-1) for part in figures]).reshape(len(shares), -1)
        rows, choices = np.split(rows, [figures_num(self.config)], 1)  # [A, W], [A, N * M * K]
        self.scale.adjust(alive)
        found = name_figures(rows, self.config, shares)
        if self.graph.optimizer.limits:
            alive = alive and found["loss"] <= loss_limit
        if self.routers and alive and routers_learn:
            self.update_routers(rows)
        found |= {"gradient_norm": norm, "loss_scale": scale, "skipped": float(not alive)}
        if choices.size:
            found["choices"] = metrics.recorded(choices, len(self.config.moe_layers), self.config.moe.choices)
        return found

    def update_routers(self, rows: np.ndarray) -> None:
        """Moves the bias of routers that balance by one, by the load of the whole step; rows [A, W].

        A router sees its full state. Of a state that ZeRO shards, the entries that other devices hold are zeros.
        """
        loads = metrics.loads(rows[:, STATISTICS:].sum(0), self.config.moe.expert_num)  # [M, E]
        for router, load in zip(self.routers, loads):
            if not all(is_trained(parameter.name, self.config) for parameter in router.state()):
                continue
            state = [(parameter, tuple(self.shapes[parameter.name])) for parameter in router.state()]
            sharded = [(own, self.box(own.name, shape)) for own, shape in state if tuple(own.shape) != shape]
            for parameter, box in sharded:
                full = np.zeros(self.shapes[parameter.name], np.float32)
                full[box] = parameter.asnumpy()
                parameter.set_data(Tensor(full), slice_shape=True)
            router.update(load)
            for parameter, box in sharded:
                parameter.set_data(Tensor(np.ascontiguousarray(parameter.asnumpy()[box])), slice_shape=True)

    def box(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Returns the part of a full tensor that this device holds, see checkpoint.layout."""
        return shard_of(name, shape, self.mesh.degrees, self.mesh.processes.rank, self.config.model.num_layers)

    def optimizer_state(self) -> dict[str, Parameter | Tensor]:
        """Returns everything besides the weights that the next step reads, by name: this device's shards."""
        scale = {name: Tensor(value) for name, value in self.scale.state().items()}
        return {**self.graph.optimizer.state(), **scale}

    def compile(self) -> None:
        """Compiles the program where that leaves the parameters only this device's shards."""
        self.mesh.compile(self.program, lambda: sample_inputs(self.config, self.model))

    def initialise(self) -> None:
        """Gives a new model its initial weights where a device draws its shards alone, and compiles it before."""
        if not self.mesh.draws_late:
            return
        self.compile()
        set_initial(self.graph.get_parameters(), self.box)

    def load_weights(self, weights: dict[str, np.ndarray]) -> None:
        """Sets the model's parameters, strictly by name and shape (UserError); adapters and optimizer begin anew."""
        self.compile()
        updated, own = (
            self.mesh.updated,
            {one.name: one for one in self.model.get_parameters() if not is_adapter(one.name)},
        )
        set_parameters(updated(own), updated(weights), "weight")
        if self.mesh.draws_late:
            set_initial((one for one in self.graph.get_parameters() if one.name not in own), self.box)

    def load(self, weights: dict[str, np.ndarray], optimizer: dict[str, np.ndarray]) -> None:
        """Sets the model's parameters and the optimizer's state, strictly by name and shape (UserError)."""
        self.compile()
        own = {parameter.name: parameter for parameter in self.model.get_parameters()}
        updated, of_scale = self.mesh.updated, self.scale.state().keys()
        set_parameters(updated(own), updated(weights), "weight")
        kept = {name: array for name, array in optimizer.items() if name not in of_scale}
        set_parameters(updated(self.graph.optimizer.state()), updated(kept), "optimizer state")
        self.scale.load({name: array for name, array in optimizer.items() if name in of_scale})


def create_step(config: Config, vocab_size: int, mesh: LocalMesh = LOCAL) -> TrainStep:
    """Returns the step of a new model, placed on the devices; it starts with `initialise` or `load`.

    Args:
        config: the whole configuration.
        vocab_size: entries of the tokenizer.
        mesh: the devices.

    Raises:
        UserError: what cannot be sharded.
    """
    own = mesh.config(config)
    set_recursion_limit(max(CALL_DEPTH, DEPTH_OF_LAYER * config.all_layers))
    with shapes_only() if mesh.draws_late else nullcontext():
        model = create_model(own, vocab_size, drawn=mesh.draws_full, mesh=mesh)
        freeze(model, own)
        mesh.place(model)
        return TrainStep(model, own, mesh, read_teacher(own, vocab_size))


def sample_inputs(config: Config, model: nn.Cell) -> tuple[Tensor, ...]:
    """Returns inputs to compile a step's program by, of the shapes that one device reads: zeros, which take no memory
    before somebody writes them."""
    size = config.model
    micro, batch = config.micro_batches // calls_of(config), config.data.batch_size // config.parallel.data_parallel
    tokens, labels = (np.zeros((micro, batch, one), np.int32) for one in (config.token_length, config.target_length))
    length = batch * config.token_length
    noise = np.zeros((micro, 1, 1, 1), np.float32)
    if model.noise_slices:
        noise = np.zeros((micro, model.noise_slices, length, size.hidden_size), np.float32)
    arrays = [tokens, labels, labels.astype(np.float32), noise]
    if forces_choices(config):
        arrays.append(np.zeros((micro, len(config.moe_layers), length, config.moe.choices), np.int32))
    inputs = call_inputs(config, arrays, np.full(micro, 1.0 / config.micro_batches))
    return tuple(map(Tensor.from_numpy, inputs))
