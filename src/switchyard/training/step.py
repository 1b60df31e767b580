"""One optimizer step: a compiled program of a micro-batch, called for each, and what the host does around it.

Legend: A micro-batches, B batch, S sequence, N = B * S tokens, D width, V vocabulary, M conditional layers, J noise
slices, W figures of a micro-batch (see training.loss).
"""

import gc
import math
from collections.abc import Callable, Iterator

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.checkpoint.store import set_parameters
from switchyard.config import Config
from switchyard.distributed.mesh import LOCAL, LocalMesh, first
from switchyard.moe import metrics
from switchyard.nn.adamw import AdamW, gradient_scale
from switchyard.nn.cross_entropy import TokenLosses
from switchyard.nn.masks import keep_where
from switchyard.training.loss import STATISTICS, TrainLoss, name_figures
from switchyard.training.loss_scale import LossScale

NOISE_RULE = "float32 U(0,1) of numpy SFC64 seeded by (train.seed, step, micro-batch)"
SCALE_STATE = ("loss_scale", "good_steps")
CONTROLS = ("learning_rate", "unscale", "routers_learn", "begins", "ends")


def random_state(seed: int, step: int) -> np.ndarray:
    """The number that all randomness of a step follows from, see `draw_noise`: [] uint64."""
    return np.array(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0])


def draw_noise(seed: int, step: int, micro_batches: int, slices: int, rows: int, width: int) -> np.ndarray:
    """The randomness of one step: [A, J, N, D] float32 of U(0, 1), or zeros [A, 1, 1, 1] where a model needs none.

    A pure function of its arguments, so a resumed run repeats it (NOISE_RULE).
    """
    if not slices:
        return np.zeros((micro_batches, 1, 1, 1), np.float32)
    noise = np.empty((micro_batches, slices, rows, width), np.float32)
    for micro in range(micro_batches):
        generator = np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, step, micro))))
        generator.random(dtype=np.float32, out=noise[micro])
    return noise


class OptimizerStep(nn.Cell):
    """Clip and AdamW, of gradients that are summed over the devices.

    What changes from step to step is a parameter that the host sets, see `set`: learning_rate; with float16 `unscale`,
    the inverse of the loss scale; `routers_learn`, 0 once moe.router_freeze_step has come; with several calls a step
    `begins` and `ends`, 1 in the first and in the last of them.

    Args:
        parameters: those that are trained.
        config: the optimizer.
        mesh: the devices.
        calls: of the program a step.
    """

    def __init__(self, parameters, config: Config, mesh: LocalMesh, calls: int = 1):
        super().__init__(auto_prefix=False)
        optimizer, self.clip = config.optimizer, config.optimizer.clip_grad
        decay = (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay)
        self.of_router = tuple(".router." in parameter.name for parameter in parameters)
        self.adamw = AdamW(parameters, *decay, apart=self.of_router)
        self.sum, self.norm, self.is_finite = (
            mesh.gradient_sum(parameters),
            mesh.gradient_norm(parameters),
            ops.IsFinite(),
        )
        self.scaled, self.several = config.model.compute_dtype == "float16", calls > 1
        self.freezes = config.moe.router_freeze_step is not None and bool(config.moe_layers)
        self.learning_rate = control("learning_rate")
        self.unscale = control("unscale") if self.scaled else None
        self.routers_learn = control("routers_learn") if self.freezes else None
        self.begins, self.ends = (control("begins"), control("ends")) if self.several else (None, None)
        self.accumulated = self.adamw.parameters.clone("accumulated", init="zeros") if self.several else None
        self.assign = ops.Assign()

    def construct(self, gradients: tuple) -> Tensor:
        """Gradients of a device, times the loss scale -> their global norm without it: [].

        Nothing changes where the norm is not finite, nor in a call that is not the last of its step.
        """
        if self.several:
            gradients = self.accumulate(gradients)
        if self.sum is not None:
            gradients = self.sum(gradients)
        if self.freezes:
            gradients = self.of_learners(gradients)
        return self.update(gradients, self.norm(gradients))

    def update(self, gradients: tuple, norm: Tensor) -> Tensor:
        """The step by gradients and their global norm, both times the loss scale -> the norm without it."""
        if self.scaled:
            norm = norm * self.unscale
        alive = self.is_finite(norm)
        if self.several:
            alive = ops.logical_and(alive, self.ends > 0)
        live = self.routers_learn * 1.0 if self.freezes else None
        self.adamw(gradients, self.learning_rate * 1.0, alive, live, gradient_scale(norm, self.clip, self.unscale))
        return norm

    def accumulate(self, gradients: tuple) -> tuple:
        """Adds gradients to those of the calls before, of the same step."""
        sums = ()
        for total, gradient in zip(self.accumulated, gradients):
            gradient = ops.select(self.begins > 0, gradient, gradient + total)
            sums = (*sums, ops.depend(gradient, self.assign(total, gradient)))
        return sums

    def of_learners(self, gradients: tuple) -> tuple:
        """Sets gradients of frozen routers to 0, so that the norm does not count them."""
        kept = ()
        for of_router, gradient in zip(self.of_router, gradients):
            kept = (*kept, keep_where(gradient, self.routers_learn) if of_router else gradient)
        return kept

    def set(self, **controls: float) -> None:
        """Sets those of the named controls that this step reads."""
        for name, value in controls.items():
            parameter = getattr(self, name)
            if parameter is not None:
                parameter.set_data(Tensor(np.float32(value)))

    def state(self) -> dict[str, Parameter]:
        """Returns every parameter of the optimizer by name."""
        return self.adamw.state()


def control(name: str) -> Parameter:
    """Returns a scalar that the host sets."""
    return Parameter(Tensor(1.0, mstype.float32), name, False)


class StepGraph(nn.Cell):
    """Forward, backward, clip and AdamW of one micro-batch.

    Args:
        model: see training.loss.TrainLoss; its trainable parameters are float32.
        config: optimizer, loss factors.
        mesh: the devices.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: LocalMesh = LOCAL):
        super().__init__(auto_prefix=False)
        self.loss = TrainLoss(model, config, mesh)
        self.optimizer = OptimizerStep(model.trainable_params(), config, mesh, calls_of(config))
        self.gradient = ops.value_and_grad(self.loss, None, self.optimizer.adamw.parameters, has_aux=True)

    def construct(self, *batch) -> tuple:
        """The arguments of TrainLoss -> (figures [W], the global norm of the gradients before the clip [], choices)."""
        (figures, choices), gradients = self.gradient(*batch)
        return figures, self.optimizer(gradients), choices

    def inputs(self, arrays: list[np.ndarray], weights: np.ndarray) -> tuple[Tensor, ...]:
        """Returns the inputs of one call: `arrays` [1, ..] as of TrainStep, weight [1] of the loss."""
        parts = [Tensor(np.ascontiguousarray(array[0])) for array in arrays]
        return (*parts[:4], Tensor(np.asarray(weights, np.float32).reshape(1, 1)), *parts[4:])


def calls_of(config: Config) -> int:
    """Returns how often a step calls its program; a pipeline works on several micro-batches in each call."""
    return config.train.gradient_accumulation_steps


class TrainStep:
    """One optimizer step on all devices together; each process calls it with its own shards.

    With more than one micro-batch the program adds up gradients, each weighted by its share of the valid tokens: the
    cross-entropy's gradient is that of the joined batch. Auxiliary losses are those of each micro-batch, weighted
    likewise. The last call of a step updates the weights.

    A step whose gradient norm is not finite is skipped: weights, moments and the routers' state stay. With float16 the
    loss is scaled, see LossScale.

    Args:
        model: see training.loss.TrainLoss.
        config: optimizer, accumulation, loss factors, compute_dtype.
        mesh: the devices; it has placed the model.

    Attributes:
        model: its parameters are full until the step is compiled, and this device's shards from then on.
        shapes: name of each parameter -> shape of the full one.
        size: parameters that are trained, on all devices together.
    """

    def __init__(self, model: nn.Cell, config: Config, mesh: LocalMesh = LOCAL):
        gc.collect()  # a Cell that is collected later empties MindSpore's key cache: this graph would compile twice
        self.model, self.config, self.mesh, self.scale = model, config, mesh, LossScale(config)
        self.shapes = mesh.full_shapes(model)
        self.size = sum(math.prod(self.shapes[parameter.name]) for parameter in model.trainable_params())
        self.graph = create_graph(model, config, mesh)
        self.graph.set_train(True)
        self.program = mesh.program(self.graph, input_shards(config, model.noise_slices))
        self.routers = balancing_routers(model)

    def __call__(self, tokens, labels, valid, noise, learning_rate: float, replay=None, routers_learn=True) -> dict:
        """tokens, labels [A, B, S] int32, valid [A, B, S] float32, noise [A, max(J, 1), N, D]: NumPy arrays, this
        device's shards; replay, if any, [A, M, N, K] int32. routers_learn: read where moe.router_freeze_step is set;
        false leaves the routers' own parameters, and what they keep besides, as they are.

        Returns metrics of the whole step: those of `loss.name_figures`; gradient_norm before the clip; loss_scale and
        skipped (1 where the update was refused); with moe.record `choices` [A, M, N, K].
        """
        self.graph.set_train(True)  # evaluation switches the same model over
        shares, scale = self.shares(valid), self.scale.factor
        control = self.graph.optimizer
        control.set(learning_rate=learning_rate, unscale=1.0 / scale, routers_learn=float(routers_learn))
        arrays = [tokens, labels, valid, noise] if replay is None else [tokens, labels, valid, noise, replay]
        figures, choices, norm = [], [], None
        calls = calls_of(self.config)
        for call, inputs in enumerate(self.graph_inputs(arrays, scale * shares)):
            control.set(begins=float(call == 0), ends=float(call == calls - 1))
            found, norm, chosen = self.program(*inputs)
            figures.append(found)
            choices += [chosen] if len(chosen) else []
        return self.finish(figures, float(norm.asnumpy()), choices, shares, routers_learn)

    def graph_inputs(self, arrays: list[np.ndarray], weights: np.ndarray) -> Iterator[tuple[Tensor, ...]]:
        """Yields the inputs of each call of the program: `arrays` [A, ..], weights [A] of the losses."""
        each = len(weights) // calls_of(self.config)
        for start in range(0, len(weights), each):
            yield self.graph.inputs([array[start : start + each] for array in arrays], weights[start : start + each])

    def shares(self, valid: np.ndarray) -> np.ndarray:
        """Returns the share of each micro-batch in the valid tokens of the step, on all devices: [A, B, S] -> [A]."""
        if len(valid) == 1:
            return np.ones(1)
        counts = self.mesh.processes.gather(valid.sum((1, 2), dtype=np.float64)).sum(0)  # [A]
        return counts / max(counts.sum(), 1.0)

    def finish(self, figures, norm: float, choices, shares: np.ndarray, routers_learn: bool) -> dict:
        """Does what follows a step on the host: metrics, the loss scale, the routers' bias."""
        scale, alive = self.scale.factor, math.isfinite(norm)
        rows = np.concatenate([part.asnumpy().reshape(-1) for part in figures]).reshape(len(shares), -1)  # [A, W]
        self.scale.adjust(alive)
        if self.routers and alive and routers_learn:
            self.update_routers(rows)
        found = name_figures(rows, self.config, shares)
        found |= {"gradient_norm": norm, "loss_scale": scale, "skipped": float(not alive)}
        if choices:
            found["choices"] = np.stack([chosen.asnumpy() for chosen in choices]).transpose(0, 2, 1, 3)  # [A, M, N, K]
        return found

    def update_routers(self, rows: np.ndarray) -> None:
        """Moves the bias of routers that balance by one, by the load of the whole step; rows [A, W]."""
        stats = metrics.by_layer(rows[:, STATISTICS:].sum(0), self.config.moe.expert_num)
        loads = stats[:, len(metrics.SCALARS) :][:, : self.config.moe.expert_num]  # [M, E]
        for router, load in zip(self.routers, loads):
            router.update(load)

    def optimizer_state(self) -> dict[str, Parameter | Tensor]:
        """Returns everything besides the weights that the next step reads, by name: this device's shards."""
        scale = {name: Tensor(value) for name, value in self.scale.state().items()}
        return {**self.graph.optimizer.state(), **scale}

    def load(self, weights: dict[str, np.ndarray], optimizer: dict[str, np.ndarray]) -> None:
        """Sets the model's parameters and the optimizer's state, strictly by name and shape (UserError)."""
        self.mesh.compile(self.program, lambda: sample_inputs(self.config, self.model, self.graph))
        held = {parameter.name: parameter for parameter in self.model.get_parameters()}
        updated = self.mesh.updated
        set_parameters(updated(held), updated(weights), "weight")
        kept = {name: array for name, array in optimizer.items() if name not in SCALE_STATE}
        set_parameters(updated(self.graph.optimizer.state()), updated(kept), "optimizer state")
        self.scale.load(optimizer)


def sample_inputs(config: Config, model: nn.Cell, graph: nn.Cell, seed: int = 0) -> tuple[Tensor, ...]:
    """Returns random inputs of a step's program, of the shapes that one device reads."""
    random, size = np.random.default_rng(seed), config.model
    micro, batch = config.micro_batches // calls_of(config), config.data.batch_size // config.parallel.data_parallel
    tokens = random.integers(0, model.vocab_size, (micro, batch, size.seq_length + 1)).astype(np.int32)
    noise, length = np.zeros((micro, 1, 1, 1), np.float32), batch * size.seq_length
    if model.noise_slices:
        noise = random.random((micro, model.noise_slices, length, size.hidden_size), np.float32)
    arrays = [tokens[..., :-1], tokens[..., 1:], np.ones((micro, batch, size.seq_length), np.float32), noise]
    if forces_choices(config):
        arrays.append(np.full((micro, len(config.moe_layers), length, config.moe.choices), -1, np.int32))
    return graph.inputs(arrays, np.full(micro, 1.0 / config.micro_batches))


def create_graph(model: nn.Cell, config: Config, mesh: LocalMesh) -> nn.Cell:
    """Returns the graph of a step."""
    if config.parallel.pipeline_stage == 1:
        return StepGraph(model, config, mesh)
    from switchyard.training.pipeline import PipelineStepGraph  # which is made of parts of this module

    return PipelineStepGraph(model, config, mesh)


def balancing_routers(model: nn.Cell) -> list[nn.Cell]:
    """Returns the routers of the conditional layers where they balance by a bias, else none."""
    routers = [cell.router for _, cell in model.cells_and_names() if hasattr(cell, "train_dispatcher")]
    return routers if any(router.state() for router in routers) else []


def input_shards(config: Config, noise_slices: int) -> tuple:
    """Returns how the arguments of a step's program are sharded, by axis."""
    data, forced = config.parallel.data_parallel, forces_choices(config)
    noise, replay = (1, data if noise_slices else 1, 1), ((1, data, 1),) if forced else ()
    if config.parallel.pipeline_stage > 1:
        noise, replay = (noise[1], 1, 1), ((data, 1, 1),) if forced else ()
    return ((data, 1), (data, 1), (data, 1), noise, (1, 1), *replay)


def forces_choices(config: Config) -> bool:
    """Returns whether steps are handed choices of experts: from a record, or while routers warm up."""
    return bool(config.moe_layers) and (config.moe.replay is not None or config.moe.router_warmup_steps > 0)


class EvalStep(nn.Cell):
    """Scores one batch, without dropout, jitter or the capacity of training.

    Args:
        model: see training.loss.TrainLoss.
        mesh: the devices.
    """

    def __init__(self, model: nn.Cell, mesh: LocalMesh = LOCAL):
        super().__init__(auto_prefix=False)
        self.model, self.token_losses = model, TokenLosses()
        self.classifies = getattr(model, "classifies", False)
        self.argmax = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.no_noise = Tensor(np.zeros((1, 1, 1), np.float32))
        self.total, self.local_scores = mesh.total(), self.scores
        self.everywhere, self.choices_everywhere = mesh.everywhere(2), mesh.everywhere(3)
        self.local_groups = self.sum_groups
        self.shard(mesh)

    def construct(self, tokens: Tensor, labels: Tensor, valid: Tensor, replay: Tensor = None):
        """tokens, labels [B, S] int32, valid [B, S] float32, replay [M, N, K] int32: see models.Decoder -> (scores
        [B, 3] of all devices: sum of losses, valid tokens, right answers; statistics [M * (6 + 2 E)]; choices)."""
        if replay is None:
            logits, stats, choices = self.model(tokens, valid, self.no_noise)  # [N, V]
        else:
            logits, stats, choices = self.model(tokens, valid, self.no_noise, replay)
        scores = self.everywhere(self.local_scores(logits, labels, valid))
        if len(stats) == 0:
            return scores, (), ()
        if len(choices) > 0:
            choices = self.choices_everywhere(choices)
        return scores, self.total(self.local_groups(stats)), choices

    def scores(self, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Of a device: [B, 3]."""
        losses = self.token_losses(logits, labels.reshape(-1)).reshape(valid.shape)  # [N] -> [B, S]
        right = ops.zeros_like(valid)
        if self.classifies:
            right = (self.argmax(logits) == labels.reshape(-1)).astype(mstype.float32).reshape(valid.shape)
        return ops.stack((keep_where(losses, valid).sum(1), valid.sum(1), (right * valid).sum(1)), 1)

    def sum_groups(self, stats: Tensor) -> Tensor:
        """[G, X] -> [1, X]."""
        return stats.sum(0, keepdims=True)

    def shard(self, mesh: LocalMesh) -> None:
        """Sequences are sharded by data shards; scores are gathered, statistics summed."""
        pair, data = mesh.cut("data", None), mesh.degrees.data_parallel

        def scored(logits, labels, valid):
            return [labels[0], 3]

        def summed(stats):
            return [data, stats[1]]

        self.local_scores = mesh.local(self.scores, (pair, pair, pair), (pair,), scored, first)
        self.local_groups = mesh.local(self.sum_groups, (pair,), (pair,), summed, first)


def eval_program(model: nn.Cell, config: Config, mesh: LocalMesh) -> Callable:
    """Returns the program that scores batches with the weights where they lie."""
    data, forced = (
        config.parallel.data_parallel,
        ((1, config.parallel.data_parallel, 1),) * (config.moe.replay is not None),
    )
    graph = EvalStep(model, mesh)
    graph.set_train(False)
    return mesh.program(graph, (((data, 1),) * 3) + forced)
