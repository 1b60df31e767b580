"""The parts of a training step of the image networks: convolutional layers, some of them conditional, and a cascade.

Legend: B batch, H and W height and width, C channels of an image, D channels of a layer, T tasks, V classes, U rows of
an image, N = B * U rows, h, w, c height, width and channels of a row's map, G routing groups, X exits.
"""

from collections.abc import Iterator

import numpy as np
from mindspore import Tensor, nn

from switchyard.models.vision import ConvolutionLayer
from switchyard.profile.parts import (
    FLOAT,
    Function,
    Part,
    loss_part,
    moe_parts,
    network_part,
    norm_part,
    optimizer_parts,
    random_rows,
)
from switchyard.training.step import TrainStep


class Viewing(nn.Cell):
    """Cuts maps [B, H, W, C] into rows, and makes what a router sees of each: [N, D]."""

    def __init__(self, layer: ConvolutionLayer):
        super().__init__(auto_prefix=False)
        self.fold, self.view = layer.fold, layer.view

    def construct(self, maps: Tensor):
        return self.view(self.fold(maps))


def vision_parts(step: TrainStep, batch: tuple[np.ndarray, ...]) -> Iterator[Part]:
    """Yields the parts of a step, for a micro-batch of images [B, C, H, W], labels, valid [B, T], noise [J, N, D]."""
    model, size = step.model, len(batch[0])
    labels, valid, noise = map(Tensor, batch[1:])
    inner, width = model.side // model.pool, step.config.model.hidden_size
    if len(model.layers) > 1:
        rows = random_rows(size * inner**2, width)
        yield norm_part("norm", model.layers[1].norm, rows, len(model.layers) - 1)
    for index, layer in enumerate(model.layers):
        yield from layer_parts(f"layer {index} ", layer, valid, noise, model.group_size)
    if model.pool > 1:
        maps = random_rows(size, model.side, model.side, width)
        moved = float(FLOAT * (maps.size + maps.size // model.pool**2))
        yield Part("pooling", Function(None, model.pooled), (maps,), moved=(moved, moved))
    maps, weights = random_rows(size, inner, inner, width), (*model.norm.trainable_params(), model.heads.weight)
    losses, products = step.graph.loss.token_losses, ((1, size, *model.heads.weight.shape),)
    yield loss_part("head and loss", losses, model.logits, maps, labels.reshape(-1), weights, products)
    yield from optimizer_parts(step)


def layer_parts(prefix: str, layer: ConvolutionLayer, valid: Tensor, noise: Tensor, group: int) -> Iterator[Part]:
    """Yields the parts of a layer, for valid [B, T] and groups of so many images."""
    size = valid.shape[0]
    maps = random_rows(size, layer.side, layer.side, layer.channels)
    if not layer.conditional:
        yield network_part(f"{prefix}convolutions", layer.feed_forward, maps.reshape(size, -1))
        return
    groups = max(1, size // group)
    yield Part(f"{prefix}view", Viewing(layer), (maps,), moved=(float(FLOAT * maps.size),) * 2)
    rows = layer.fold(maps)  # [N, h, w, c]
    tasks, real = layer.fold.repeat_per_row(valid.argmax(1).int()), layer.fold.repeat_per_row(valid.sum(1))
    given = {
        "tokens": rows.reshape(rows.shape[0], -1),
        "valid": real.reshape(groups, -1),
        "noise": noise,
        "task_ids": tasks.reshape(groups, -1),
        "view": layer.view(rows).reshape(groups, -1, layer.view.weight.shape[1]),
    }
    yield from moe_parts(layer.feed_forward, given, prefix=prefix)


def cascade_parts(step: TrainStep, batch: tuple[np.ndarray, ...]) -> Iterator[Part]:
    """Yields the parts of a step, for a micro-batch of images [B, C, H, W] and labels [B, 1]."""
    model, size, labels = step.model, len(batch[0]), Tensor(batch[1]).reshape(-1)
    for index, stage in enumerate(model.stages):
        rows = random_rows(size, stage.side**2 * stage.before)
        yield network_part(f"stage {index} convolutions", stage.convolutions, rows)
        maps = random_rows(size, stage.side, stage.side, stage.channels)
        yield Part(f"exit {index}", stage.exit, (maps,), products=((1, size, *stage.exit.weight.shape),))
    logits = random_rows(model.exits * size, model.vocab_size)
    yield loss_part("loss", step.graph.loss.token_losses, Tensor.float, logits, labels.tile((model.exits,)))
    yield from optimizer_parts(step)
