"""Micro-batches of random numbers, of the shapes and through the batches that training reads.

Legend: B batch, S sequence, C channels, H and W height and width, T tasks, J noise slices, N rows, D width.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np

from switchyard.config import Config
from switchyard.config.seq2seq import SPECIALS
from switchyard.data.batches import TrainBatches
from switchyard.data.corruption import CorruptedBatches
from switchyard.data.images import ImageBatches
from switchyard.training.randomness import draw_noise
from switchyard.training.step import TrainStep

BATCHES = 64  # of data that is no two batches alike
IMAGE_BATCHES = 8


def inputs_of(config: Config, vocabulary: int) -> tuple[Callable, Callable]:
    """Returns two functions of a step: its micro-batch, and a new one.

    A micro-batch is (tokens, labels, valid, noise [J, N, D]) as the network reads them, without the axis of
    micro-batches.
    """
    size, width = config.data.batch_size, config.model.hidden_size
    batches, count = batches_of(config, vocabulary), iter(range(10**9))

    def draw(step: TrainStep) -> tuple[np.ndarray, ...]:
        index, slices = next(count), step.model.noise_slices
        noise = draw_noise(config.train.seed, index, 1, slices, range(size), config.rows // size, width)
        return (*batches.at(index), noise[0])

    drawn = []

    def first(step: TrainStep) -> tuple[np.ndarray, ...]:
        if not drawn:
            drawn.append(draw(step))
        return drawn[0]

    return first, draw


def batches_of(config: Config, vocabulary: int) -> TrainBatches | ImageBatches:
    """Returns batches of random ids or pixels."""
    random, size, seed = np.random.default_rng(0), config.data.batch_size, config.train.seed
    if not config.reads_text:
        vision, count = config.vision, IMAGE_BATCHES * size
        images = random.random((count, vision.channels, vision.image_size, vision.image_size), np.float32)
        answers = random.integers(0, vision.task_classes, (count, len(vision.task_classes))).astype(np.int32)
        return ImageBatches(images, answers, size, seed)
    own = config.seq2seq.sentinels + SPECIALS if config.model.type == "seq2seq" else 0
    tokens = random.integers(0, max(1, vocabulary - own), BATCHES * size * config.window).astype(np.int32)
    if own:
        return CorruptedBatches(tokens, config, SimpleNamespace(first=vocabulary - 1, moved=SPECIALS))
    return TrainBatches(tokens, size, config.model.seq_length, seed)
