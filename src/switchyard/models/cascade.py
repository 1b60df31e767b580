"""A cascade: stages of growing cost, each with an exit; a sample leaves at the first that is sure of it.

BranchyNet (arXiv 1709.01686) trains all exits together and lets easy samples leave early; Bolukbasi et al. (arXiv
1702.07811) learn when to. Here a sample is sure where its most probable class has at least `cascade.threshold`.

Legend: B batch, H and W height and width, C channels of an image, c channels of a stage, V classes, X exits.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import LOCAL, LocalMesh
from switchyard.models.decoder import DTYPES
from switchyard.models.vision import Summary
from switchyard.moe.conv_experts import ConvolutionExperts
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.masks import keep_where

GRID = 4  # squares of a side that an exit sees, where the side divides so
WIDER = 2  # channels between a stage's two convolutions / its channels


class Stage(nn.Cell):
    """Convolutions and an exit: maps [B, H, W, c before] -> (maps [B, H, W, c], logits [B, V] float32)."""

    def __init__(
        self, side: int, before: int, channels: int, classes: int, activation: str, random: InitialWeights, dtype
    ):
        super().__init__()
        self.side, self.before, self.channels, self.classes = side, before, channels, classes
        shape = (side, side, before)
        self.convolutions = ConvolutionExperts(1, shape, channels, WIDER * channels, activation, random, dtype)
        self.relu = nn.ReLU()
        self.exit = Summary((side, side, channels), GRID, classes, random)
        self.matrices = 2 if activation == "swiglu" else 1

    def construct(self, maps: Tensor):
        rows = maps.reshape(1, -1, self.side * self.side * self.before)  # [1, B, H * W * c]
        maps = self.relu(self.convolutions(rows)).reshape(-1, self.side, self.side, self.channels)
        return maps, self.exit(maps)

    @property
    def flops(self) -> int:
        """Returns the FLOPs of one sample: two for a multiply-add; convolutions and exit."""
        hidden = WIDER * self.channels
        place = self.matrices * 9 * self.before * hidden + hidden * self.channels
        return 2 * (self.side**2 * place + self.exit.size * self.classes)


class Cascade(nn.Cell):
    """Maps images [B, C, H, W] to (logits, (), ()): those of all exits in training, [X * B, V], exit by exit.

    At evaluation [B, V], each sample's at its exit; but every stage works, as a compiled graph of fixed shape has it.
    `EarlyExit` is the evaluation that saves the work.

    Args:
        config: cascade.stages, cascade.threshold, the section `vision`.
        drawn: False: weights have shapes and no numbers, see nn.initializers.
    """

    classifies, noise_slices = True, 0

    def __init__(self, config: Config, mesh: LocalMesh = LOCAL, drawn: bool = True):
        super().__init__()
        vision, random = config.vision, InitialWeights(config.train.seed, drawn)
        channels, dtype = (vision.channels, *config.cascade.stages), DTYPES[config.model.compute_dtype]
        self.stages = nn.CellList(
            [
                Stage(vision.image_size, before, now, vision.task_classes[0], config.model.activation, random, dtype)
                for before, now in pairwise(channels)
            ]
        )
        self.exits, self.threshold = len(self.stages), config.cascade.threshold
        self.vocab_size, self.moe_layers = vision.task_classes[0], ()
        self.turn, self.softmax, self.largest = ops.Transpose(), ops.Softmax(-1), ops.ReduceMax(True)

    def construct(self, images: Tensor, valid: Tensor, noise: Tensor):
        """images [B, C, H, W] float32, valid [B, 1]: 0 for padding; noise is not read."""
        logits = self.all_exits(keep_where(images, valid.sum(1)))
        if self.training:
            return ops.concat(logits, 0), (), ()  # [X * B, V]
        chosen = logits[-1]
        for found in logits[-2::-1]:
            chosen = ops.where(self.largest(self.softmax(found), -1) >= self.threshold, found, chosen)  # [B, V]
        return chosen, (), ()

    def all_exits(self, images: Tensor) -> tuple:
        """Returns the logits of every exit, X x [B, V]."""
        maps, found = self.turn(images, (0, 2, 3, 1)), ()  # [B, H, W, C]
        for stage in self.stages:
            maps, logits = stage(maps)
            found = (*found, logits)
        return found


class EarlyExit:
    """Evaluates a cascade where each stage computes only the samples that have not left yet.

    Each stage is a graph of its own that takes any number of samples; the host looks at its exit and sends on the
    rest. A stage that nobody reaches does not run.

    Args:
        model: a Cascade; it is switched to evaluation.
        threshold: in place of the model's own.
    """

    def __init__(self, model: Cascade, threshold: float | None = None):
        model.set_train(False)
        self.stages = list(model.stages)
        self.threshold = model.threshold if threshold is None else threshold
        for stage in self.stages:
            stage.set_inputs(Tensor(shape=[None, stage.side, stage.side, stage.before], dtype=mstype.float32))

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps images [B, C, H, W] -> (logits [B, V] of the exit of each sample, its exit [B] from 0)."""
        maps = np.ascontiguousarray(images.transpose(0, 2, 3, 1))  # [B, H, W, C]
        count, last = len(images), len(self.stages) - 1
        there, exits = np.arange(count), np.full(count, last)
        logits = np.zeros((count, self.stages[0].classes), np.float32)
        for index, stage in enumerate(self.stages):
            maps, found = stage(Tensor(maps))
            found = found.asnumpy()  # [left, V]
            leaves = probabilities(found).max(1) >= self.threshold if index < last else np.ones(len(found), bool)
            logits[there[leaves]], exits[there[leaves]] = found[leaves], index
            there = there[~leaves]
            if not len(there):
                break
            maps = maps.asnumpy()[~leaves]
        return logits, exits


@dataclass(frozen=True)
class Point:
    """Holds the results of a cascade at one threshold.

    accuracy: share of right answers. mean_flops: of a sample. exits: share of the samples that leaves at each.
    """

    threshold: float
    accuracy: float
    mean_flops: float
    exits: tuple[float, ...]


def flops_to(stages) -> np.ndarray:
    """FLOPs of a sample that leaves at each exit: [X]."""
    return np.cumsum([stage.flops for stage in stages])


def curve(logits: np.ndarray, labels: np.ndarray, flops: np.ndarray, thresholds) -> list[Point]:
    """Computes accuracy against mean FLOPs by threshold.

    Args:
        logits: of all exits on a set of samples, [X, B, V].
        labels: [B].
        flops: of a sample that leaves at each exit, [X], see `flops_to`.
        thresholds: the probabilities that make a sample leave.
    """
    sure = probabilities(logits).max(-1)  # [X, B]
    right = logits.argmax(-1) == labels  # [X, B]
    points = []
    for threshold in thresholds:
        leaves = sure >= threshold
        leaves[-1] = True
        at = leaves.argmax(0)  # [B], the first
        shares = np.bincount(at, minlength=len(flops)) / len(at)
        accuracy = float(right[at, np.arange(len(at))].mean())
        points.append(Point(float(threshold), accuracy, float(flops[at].mean()), tuple(shares.tolist())))
    return points


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the softmax over the last axis."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
