"""The training step of one device among many behind the calls of TrainStep: what the loop needs on Ascend and GPU.

MindSpore's compiler cuts the step there (training.parallel_step); on CPU, and for what it cannot cut, processes
exchange by hand (distributed.collectives).

Legend: A micro-batches, B batch, S sequence, N = B * S tokens, J noise slices, all of one device; D width.
"""

import math
from pathlib import Path

import numpy as np
from mindspore import Parameter, Tensor

from switchyard.checkpoint.layout import updates
from switchyard.checkpoint.store import set_parameters, write_whole
from switchyard.config import Config
from switchyard.distributed.compiled_graph import Graph, compiled_model, read_graph
from switchyard.distributed.limits import of_evaluation, refuse
from switchyard.distributed.processes import Processes
from switchyard.distributed.stages import factors
from switchyard.training.evaluate import Evaluator
from switchyard.training.parallel_eval import ParallelEvalStep
from switchyard.training.parallel_step import SPEED_UP, batch_slices, is_weighted, parallel_step, speed_up_file, unpack
from switchyard.training.step import AUDIT_SUMS, GROWTH_INTERVAL, MAX_LOSS_SCALE

SCALE_STATE = ("loss_scale", "good_steps")


class LossScale:
    """Dynamic loss scale kept on the host, by the rule of StepGraph.adjust_scale; 1 without float16."""

    def __init__(self, config: Config):
        self.used = config.model.compute_dtype == "float16"
        self.value, self.good_steps = config.train.init_loss_scale, 0

    @property
    def factor(self) -> float:
        """What the loss is multiplied by."""
        return self.value if self.used else 1.0

    def adjust(self, alive: bool) -> None:
        """Halves the scale after a step that is not finite, doubles it after GROWTH_INTERVAL good ones."""
        if not self.used:
            return
        self.good_steps = self.good_steps + 1 if alive else 0
        if not alive:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps >= GROWTH_INTERVAL:
            self.value, self.good_steps = min(self.value * 2, MAX_LOSS_SCALE), 0

    def state(self) -> dict[str, Tensor]:
        """As TrainStep.optimizer_state names it."""
        return {
            "loss_scale": Tensor(np.array(self.value, np.float32)),
            "good_steps": Tensor(np.array(self.good_steps, np.int32)),
        }

    def load(self, arrays: dict[str, np.ndarray]) -> None:
        """The inverse of `state`."""
        self.value, self.good_steps = float(arrays["loss_scale"]), int(arrays["good_steps"])


class ClusterStep:
    """One optimizer step on all devices together; each process calls it with its own slices.

    Args:
        config: the whole configuration, degrees included.
        vocab_size: entries of the tokenizer.
        processes: this one and the others; communication has been started.

    Attributes:
        model: its parameters are whole until the step is compiled, and this device's slices from then on.
        shapes: name of each parameter -> shape of the whole.
        size: parameters that are trained, on all devices together.

    Raises:
        UserError: what cannot be cut over devices.
    """

    def __init__(self, config: Config, vocab_size: int, processes: Processes):
        self.config, self.vocab_size, self.processes = config, vocab_size, processes
        refuse(of_evaluation(config))
        self.step = parallel_step(config, vocab_size)
        self.graph = self.step.network
        self.model, self.scale = self.graph.model, LossScale(config)
        self.shapes = {parameter.name: tuple(parameter.shape) for parameter in self.model.get_parameters()}
        self.size = sum(math.prod(self.shapes[parameter.name]) for parameter in self.model.trainable_params())

    def speed_up(self, run: Path) -> None:
        """Hands parallel.transformer_opt to the compiler, in a file of the run folder that the first process writes."""
        if not self.config.parallel.transformer_opt:
            return
        path = run / SPEED_UP
        if self.processes.is_first:
            write_whole(path, speed_up_file(self.config))
        self.processes.barrier()
        self.step.transformer_opt(str(path))

    def compiled(self) -> Graph:
        """What the compiler has made of this device's step, which has been called."""
        return read_graph(compiled_model(self.step))

    def load(self, weights: dict[str, np.ndarray], optimizer: dict[str, np.ndarray]) -> None:
        """Compiles the step, which cuts the parameters, and sets them and the optimizer's state to slices that were
        saved (UserError: other names or shapes)."""
        self.step.compile(*batch_slices(self.config, self.vocab_size, self.model.noise_slices))
        held = {parameter.name: parameter for parameter in self.model.get_parameters()}
        set_parameters(self.updated(held), self.updated(weights), "weight")
        kept = {name: array for name, array in optimizer.items() if name not in SCALE_STATE}
        set_parameters(self.updated(self.graph.optimizer.state()), self.updated(kept), "optimizer state")
        self.scale.load(optimizer)

    def updated(self, tensors: dict) -> dict:
        """Those of named tensors that this device's stage of the pipeline updates."""
        degrees, layers = self.processes.degrees, self.config.model.num_layers
        return {name: one for name, one in tensors.items() if updates(name, degrees, self.processes.rank, layers)}

    def create_evaluator(self, tokens_per_byte: float) -> Evaluator | None:
        """Scores the weights where they lie; None of a pipeline, whose checkpoints eval.py scores."""
        if self.config.parallel.pipeline_stage > 1:
            return None
        scores = ParallelEvalStep(self.config, self.vocab_size, self.model, self.processes)
        return Evaluator(scores, self.config.moe_layers, tokens_per_byte)

    def optimizer_state(self) -> dict[str, Parameter | Tensor]:
        """Everything besides the weights that the next step reads: name -> this device's slice."""
        return {**self.graph.optimizer.state(), **self.scale.state()}

    def __call__(self, tokens, labels, valid, noise, learning_rate: float, replay=None, routers_learn=True) -> dict:
        """tokens, labels [A, B, S] int32, valid [A, B, S] float32, noise [A, max(J, 1), N, D]: NumPy arrays, this
        device's slices. Returns what TrainStep returns, of all devices together."""
        shares = self.shares(valid)
        batch = [array.reshape(-1, array.shape[-1]) for array in (tokens, labels, valid)]  # [A * B, S]
        if self.model.noise_slices:
            noise = noise.transpose(0, 2, 1, 3)  # [A, N, J, D]
            batch.append(np.ascontiguousarray(noise).reshape(-1, *noise.shape[2:]))
        if is_weighted(self.config):
            batch.append(factors(self.config, self.scale.factor * shares))
        self.graph.learning_rate.set_data(Tensor(np.float32(learning_rate)))
        if self.scale.used:
            self.graph.unscale.set_data(Tensor(np.float32(1.0 / self.scale.factor)))
        *figures, norm = self.step(*(Tensor(array) for array in batch))
        norm, scale = float(norm.asnumpy()), self.scale.factor
        alive = bool(np.isfinite(norm))
        self.scale.adjust(alive)
        rows = np.concatenate([part.asnumpy() for part in figures]).reshape(len(shares), -1)  # a pipeline has one part
        found = joined([unpack(row, self.config) for row in rows], shares)
        found |= {"gradient_norm": norm, "loss_scale": scale, "skipped": float(not alive)}
        tensors = {name: as_tensor(figure) for name, figure in found.items() if name != "audit"}
        return tensors | {"audit": {name: as_tensor(figure) for name, figure in found["audit"].items()}}

    def shares(self, valid: np.ndarray) -> np.ndarray:
        """The share of each micro-batch in the valid tokens of the step, on all devices: valid [A, B, S] -> [A]."""
        if len(valid) == 1:
            return np.ones(1)
        counts = self.processes.gather(valid.sum((1, 2), dtype=np.float64)).sum(0)  # [A]
        return counts / max(counts.sum(), 1.0)


def as_tensor(figure) -> Tensor:
    """A figure as what TrainStep hands out."""
    return Tensor(np.asarray(figure, np.float32))


def joined(figures: list[dict], shares: np.ndarray) -> dict:
    """Figures of micro-batches, see `unpack` -> those of the step; means count by their share of the tokens."""
    if len(figures) == 1:
        return figures[0]
    found = {name: sum(s * f[name] for s, f in zip(shares, figures)) for name in ("loss", "balance_loss", "z_loss")}
    audits = [part["audit"] for part in figures]
    found["audit"] = {
        name: sum((1.0 if name in AUDIT_SUMS else share) * audit[name] for share, audit in zip(shares, audits))
        for name in audits[0]
    }
    return found
