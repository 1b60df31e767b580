"""Evaluates a model: losses with a confidence interval, and what the routers did."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from switchyard import config as configuration
from switchyard.checkpoint import store as checkpoint
from switchyard.config import Config
from switchyard.data import Batch, ImageBatch, load_scored
from switchyard.device import set_context
from switchyard.distributed.mesh import LOCAL, LocalMesh
from switchyard.distributed.processes import require_one_device
from switchyard.models import create_model
from switchyard.models.cascade import Cascade, EarlyExit, flops_to, probabilities
from switchyard.models.decoder import mask_documents
from switchyard.moe import metrics
from switchyard.moe.routing.replay import Recorder, Replayer
from switchyard.training.evaluate_keys import overridden
from switchyard.training.finite import check_evaluation
from switchyard.training.router_metrics import integers, layer_line
from switchyard.training.scores import eval_program
from switchyard.trust import check_trusted_section


@dataclass(frozen=True)
class Evaluation:
    """Holds the figures over a validation set.

    Attributes:
        loss: mean cross-entropy of a token, nats.
        loss_ci95: 95 % confidence interval of it: (low, high).
        bits_per_byte: loss in bits over the UTF-8 bytes that the tokens stand for.
        tokens: predictions that were scored.
        layers: metrics of the conditional layers, [] when dense: {layer (index from 0), load [E], importance [E],
            dropped, entropy, max_violation, z}. load and importance are sums over the set, max_violation is that of
            the summed load, dropped a share of all choices, entropy and z are means over the real rows: the same
            however the set is divided into batches and groups.
    """

    loss: float
    loss_ci95: tuple[float, float]
    bits_per_byte: float
    tokens: int
    layers: list[dict[str, Any]]
    unit = "tokens"

    @property
    def perplexity(self) -> float:
        """Returns exp(loss)."""
        return math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, Any]:
        """Returns what `eval.py --json` prints: loss, loss_ci95, perplexity, bits_per_byte, tokens, layers."""
        figures = {name: getattr(self, name) for name in ("perplexity", "bits_per_byte", "tokens", "layers")}
        return {"loss": self.loss, "loss_ci95": list(self.loss_ci95), **figures}

    @property
    def headline(self) -> str:
        """Returns the figures besides the loss that people look at."""
        return f"perplexity {self.perplexity:.3f}  {self.bits_per_byte:.4f} bits/byte"

    def to_text(self) -> str:
        """Returns the figures for people: a line, and one for each conditional layer."""
        low, high = self.loss_ci95
        line = f"loss {self.loss:.4f} ({low:.4f}..{high:.4f} at 95 %)  {self.headline}  {self.tokens:,} {self.unit}"
        return "\n".join([line, *map(layer_line, self.layers)])


@dataclass(frozen=True)
class ImageEvaluation(Evaluation):
    """Holds the figures over validation images, each asked every task; bits are those of an answer.

    Attributes:
        accuracy: share of right answers.
        cascade: of a cascade {mean_flops: of a sample, exits: share of the samples that left at each, threshold}.
    """

    accuracy: float
    cascade: dict[str, Any] | None = None
    unit = "answers"

    def to_dict(self) -> dict[str, Any]:
        """Returns what `eval.py --json` prints: loss, loss_ci95, accuracy, tokens (answers), layers, the cascade's."""
        kept = ("loss", "loss_ci95", "tokens", "layers")
        figures = {name: figure for name, figure in super().to_dict().items() if name in kept}
        return {**figures, "accuracy": self.accuracy, **(self.cascade or {})}

    @property
    def headline(self) -> str:
        """Returns the accuracy, and of a cascade what it cost."""
        if not self.cascade:
            return f"accuracy {100 * self.accuracy:.2f} %"
        shares = " ".join(f"{100 * share:.0f}" for share in self.cascade["exits"])
        return f"accuracy {100 * self.accuracy:.2f} %  {self.cascade['mean_flops']:,.0f} FLOPs/image  exits {shares} %"


class Evaluator:
    """Evaluates one model again and again with one compiled program.

    Args:
        model: see models.Decoder; it is switched to evaluation for the time of a call.
        config: of the model.
        tokens_per_byte: of the validation set, for bits per byte.
        recorder, replayer: take and give the choices of experts of each batch, by its number from 0.
        mesh: the devices; each is given its part of every batch, and gets the figures of all.

    Attributes:
        program: scores a batch.
        is_compiled: whether it was called.
    """

    def __init__(
        self,
        model: nn.Cell,
        config: Config,
        tokens_per_byte: float,
        recorder: Recorder | None = None,
        replayer: Replayer | None = None,
        mesh: LocalMesh = LOCAL,
    ):
        self._model, self._config, self._mesh = model, config, mesh
        self.program = eval_program(model, config, mesh)
        self._tokens_per_byte, self._recorder, self._replayer = tokens_per_byte, recorder, replayer
        self._classifies = getattr(model, "classifies", False)
        self.is_compiled = False

    def __call__(self, batches: Iterable[Batch], on_batch: Callable[[int], None] = lambda index: None) -> Evaluation:
        """Scores batches; `on_batch` is called after each with its number from 1, and may raise to stop."""
        self._model.set_train(False)
        scores, summed = [], 0.0
        for index, batch in enumerate(batches):
            found, stats, choices = self.program(*self._inputs(index, batch))
            if self._recorder:
                self._recorder.add(index, batch.tokens, self._recorded(choices))
            scores.append(found.asnumpy())  # [B, 3]
            if len(stats):
                summed = summed + stats.asnumpy().astype(np.float64)
            self.is_compiled = True
            on_batch(index + 1)
        return self._evaluation(np.concatenate(scores).astype(np.float64), summed)

    def _recorded(self, choices: Tensor) -> np.ndarray:
        """Returns choices [N, M * K] of a batch as [M, N, K]."""
        flat = choices.asnumpy().reshape(1, -1)
        return metrics.recorded(flat, len(self._config.moe_layers), self._config.moe.choices)[0]

    def _inputs(self, index: int, batch: Batch) -> list[Tensor]:
        """Returns this device's part of a batch, and the choices that are replayed in it."""
        part = self._mesh.processes.part
        inputs = [Tensor(np.ascontiguousarray(part(array, 0))) for array in batch]
        if self._replayer:
            inputs.append(Tensor(np.ascontiguousarray(part(self._replayer.at(index, batch.tokens)[0], 1))))
        return inputs

    def _evaluation(self, scores: np.ndarray, summed: np.ndarray | float) -> Evaluation:
        """Computes the figures of scores [sequences, 3] and statistics that were summed over the set."""
        sums, counts, right = scores.T
        loss, interval = mean_with_interval(sums, counts)
        tokens, layers = int(counts.sum()), self._layers(summed)
        bits = loss / math.log(2) * self._tokens_per_byte
        if self._classifies:
            return ImageEvaluation(loss, interval, bits, tokens, layers, float(right.sum()) / tokens)
        return Evaluation(loss, interval, bits, tokens, layers)

    def _layers(self, summed: np.ndarray | float) -> list[dict[str, Any]]:
        """Returns the metrics of each conditional layer."""
        if not self._config.moe_layers:
            return []
        found = metrics.metrics(summed, self._config.moe.expert_num)
        return [
            {
                "layer": layer,
                "load": integers(found["load"][place]),
                "importance": [float(mass) for mass in found["importance"][place]],
                **{name: float(found[name][place]) for name in metrics.MEANS},
            }
            for place, layer in enumerate(self._config.moe_layers)
        ]


class CascadeEvaluator:
    """Evaluates a cascade where stages work only on the samples that have not left: see models.cascade.EarlyExit."""

    def __init__(self, model: Cascade):
        self._model, self._runner = model, None
        self.is_compiled = False

    def __call__(self, batches: Iterable[ImageBatch], on_batch=lambda index: None) -> ImageEvaluation:
        """Scores batches; `on_batch` as in Evaluator."""
        self._model.set_train(False)
        self._runner = self._runner or EarlyExit(self._model)
        losses, right, left = [], [], []
        for index, batch in enumerate(batches):
            real = batch.valid[:, 0] > 0
            labels = batch.labels[real, 0]
            logits, exits = self._runner(batch.images[real])
            losses.append(-np.log(np.maximum(probabilities(logits)[np.arange(len(labels)), labels], 1e-30)))
            right.append(logits.argmax(1) == labels)
            left.append(exits)
            self.is_compiled = True
            on_batch(index + 1)
        losses, left = np.concatenate(losses).astype(np.float64), np.concatenate(left)
        loss, interval = mean_with_interval(losses, np.ones(len(losses)))
        flops = flops_to(self._model.stages)
        cascade = {
            "mean_flops": float(flops[left].mean()),
            "exits": (np.bincount(left, minlength=len(flops)) / len(left)).tolist(),
            "threshold": self._model.threshold,
        }
        accuracy = float(np.concatenate(right).mean())
        return ImageEvaluation(loss, interval, loss / math.log(2), len(losses), [], accuracy, cascade)


def create_evaluator(model: nn.Cell, config: Config, tokens_per_byte: float, **more) -> Evaluator | CascadeEvaluator:
    """Returns the evaluator of a model; arguments as of Evaluator."""
    if config.model.type == "cascade":
        return CascadeEvaluator(model)
    return Evaluator(model, config, tokens_per_byte, **more)


def mean_with_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Returns the mean loss of a token and its 95 % interval, of the losses and token counts of n sequences.

    The sequences' mean losses, weighted by their tokens, are taken as independent (ratio estimator, Cochran, Sampling
    Techniques, 1977, eq. 6.13). Consecutive sequences of one text are not quite, so the true interval is wider.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used]
    mean = sums.sum() / counts.sum()
    number = len(counts)
    if number < 2:
        return float(mean), (float(mean), float(mean))
    error = math.sqrt(number / (number - 1) * ((sums - mean * counts) ** 2).sum()) / counts.sum()
    return float(mean), (float(mean - 1.96 * error), float(mean + 1.96 * error))


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Returns `wanted` indices evenly over range(count), all where `wanted` is 0 or more than there are."""
    if not wanted or wanted >= count:
        return list(range(count))
    return [index * count // wanted for index in range(wanted)]


def evaluate(
    path: str | Path,
    overrides: list[str] | tuple[str, ...] = (),
    say: Callable[[str], None] = print,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    trust_code: bool = False,
) -> Evaluation:
    """Evaluates a checkpoint over its run's validation set, or over a text that the overrides name.

    Args:
        path: a run folder (its newest checkpoint) or one checkpoint.
        overrides: `section.key=value`, such as moe.eval_capacity_factor=1.25 or data.batch_size=8. Text of data.path
            or data.val_path is scored whole, with the checkpoint's tokenizer; see switchyard.data.given.
        say: receives lines about device, checkpoint and data.
        on_batch: called after each batch with (batches done, batches in all).
        trust_code: whether a router in a file of somebody's own, which the checkpoint names, may be imported.

    Raises:
        UserError: a damaged checkpoint, data that cannot be read, an override that would change the weights' shapes, a
            figure that is not finite, a router that is not trusted.

    Examples:
        >>> import switchyard as sw
        >>> found = sw.evaluate("runs/quickstart")  # doctest: +SKIP
        >>> len(found.layers[0]["load"])  # doctest: +SKIP
        8
    """
    loaded = checkpoint.read(path, with_optimizer=False)
    config = overridden(loaded.config, overrides)
    check_trusted_section(config.moe, trust_code, say, overrides)
    for line in configuration.notes_of_checkpoint(config, overrides):
        say(line)
    require_one_device(config)
    set_context(config.context, config.train.seed, config.model.compute_dtype, say)
    data = load_scored(config, loaded.tokenizer_json, overrides)
    say(f"checkpoint: {loaded.path}")
    say(f"data: {data.description}")
    model = create_model(config, data.tokenizer.vocab_size)
    mask_documents(model, getattr(data.tokenizer, "separator", None))
    checkpoint.load_weights(model, loaded.weights)
    batches, moe = data.validation(), config.moe
    recorder = Recorder(moe.record, config, "evaluation") if moe.record else None
    replayer = Replayer(moe.replay, config, "evaluation") if moe.replay else None
    tokens_per_byte = data.validation_tokens / data.validation_bytes
    evaluator = create_evaluator(model, config, tokens_per_byte, recorder=recorder, replayer=replayer)
    found = evaluator(batches, lambda done: on_batch(done, len(batches)))
    if recorder:
        recorder.save()
    check_evaluation(found.to_dict(), f"'{loaded.path}'", "evaluate an earlier checkpoint, or use float32")
    return found
