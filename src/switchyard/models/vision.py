"""An image classifier of convolutional layers, some of them conditional.

Legend: B batch, H and W height and width, C channels, D channels of the layers, T tasks, V classes of the task with the
most, U rows of an image, N = B * U rows, h, w, c height, width and channels of a row's map, M conditional layers, G
groups that route for themselves.
"""

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.config import Config
from switchyard.distributed.mesh import LOCAL, LocalMesh
from switchyard.models.decoder import DTYPES
from switchyard.moe.conv_experts import ConvolutionExperts
from switchyard.moe.dispatch.capacity import check_sort_keys
from switchyard.moe.granularity import ImageFold
from switchyard.moe.layer import MoELayer
from switchyard.moe.statistics import Beside
from switchyard.nn.initializers import InitialWeights
from switchyard.nn.masks import keep_where
from switchyard.nn.noise import NoiseSlices
from switchyard.nn.norm import create_norm

GRID = 4  # squares of a side that the heads see, where the side divides so
ABSENT = -1e9  # logit of a class that a task does not have


class Summary(nn.Cell):
    """Summarises a map as one vector: means over grid x grid squares, times a matrix: [M, h, w, c] -> [M, out].

    Args:
        shape: (h, w, c).
        grid: squares of a side; 1 where the sides do not divide.
        out: width of the result.
        random: draws the initial weights.
    """

    def __init__(self, shape: tuple[int, int, int], grid: int, out: int, random: InitialWeights):
        super().__init__()
        height, width, self.channels = shape
        self.grid = grid if height % grid == 0 and width % grid == 0 else 1
        self.high, self.wide = height // self.grid, width // self.grid
        self.size = self.grid**2 * self.channels
        self.weight = random.normal(self.size**-0.5, (self.size, out), "weight")
        self.product = ops.MatMul()

    def construct(self, maps: Tensor) -> Tensor:
        squares = maps.reshape(-1, self.grid, self.high, self.grid, self.wide, self.channels)
        return self.product(squares.mean((2, 4)).reshape(-1, self.size), self.weight)  # [M, out]


class ConvolutionLayer(nn.Cell):
    """Applies a layer at one depth: maps [B, H, W, C] -> [B, H, W, D], dense or conditional.

    Layer 0 stands at the input and makes D channels of the image's; the others are residual: x + layer(norm(x)).

    Args:
        config: the whole configuration.
        index: depth, from 0.
        side: H and W.
        random: draws the initial weights.
        slices: hands out slices of noise.
    """

    def __init__(
        self,
        config: Config,
        index: int,
        side: int,
        random: InitialWeights,
        slices: NoiseSlices,
        mesh: LocalMesh = LOCAL,
    ):
        super().__init__()
        model, dtype = config.model, DTYPES[config.model.compute_dtype]
        width = model.hidden_size
        channels = width if index else config.vision.channels
        scale = model.num_layers**-0.5 if index else 1.0
        self.conditional, self.side, self.channels = index in config.moe_layers, side, channels
        self.norm = create_norm(model.norm, width, model.norm_eps) if index else None
        self.fold = ImageFold(config)
        shape = self.fold.row_shape(side, side, channels) if self.conditional else (side, side, channels)
        self.shape = shape
        self.out = width * shape[2] // channels  # channels of a row's result
        out, activation = self.out, model.activation

        def make(experts: int, hidden: int) -> nn.Cell:
            return ConvolutionExperts(experts, shape, out, hidden, activation, random, dtype, scale)

        if self.conditional:
            self.view = Summary(shape, 2, width, random)
            std = (1.0, 1.0)  # of feed-forward experts, which there are none of
            tasks = len(config.vision.tasks) > 1
            self.feed_forward = MoELayer(
                config, std, random, dtype, slices, has_tasks=tasks, make_experts=make, mesh=mesh
            )
        else:
            self.feed_forward = make(1, config.dense_width)

    def construct(self, maps: Tensor, tasks: Tensor, valid: Tensor, noise: Tensor, groups: int):
        """maps [B, H, W, C], tasks [B] int32, valid [B], noise [.., N, D] -> (maps, statistics and choices of MoELayer,
        () where the layer is dense)."""
        x = maps
        if self.norm is not None:
            x = self.norm(maps.reshape(-1, self.channels)).reshape(maps.shape)
        stats, choices = (), ()
        if self.conditional:
            out, stats, choices = self.route(x, tasks, valid, noise, groups)
        else:
            out = self.feed_forward(x.reshape(1, maps.shape[0], -1))  # [1, B, H * W * D]
            out = out.reshape(-1, self.side, self.side, self.out)
        if self.norm is not None:
            out = maps + out
        return out, stats, choices

    def route(self, x: Tensor, tasks: Tensor, valid: Tensor, noise: Tensor, groups: int):
        """Applies the conditional layer to the rows of the maps -> (maps [B, H, W, D], statistics, choices)."""
        high, wide, _ = self.shape
        rows = self.fold(x)  # [N, h, w, c]
        view = self.view(rows)  # [N, D]
        view = view.reshape(groups, -1, view.shape[1])  # [G, N / G, D]
        flat = rows.reshape(groups, view.shape[1], -1)  # [G, N / G, h * w * c]
        tasks = self.fold.repeat_per_row(tasks).reshape(groups, -1)  # [G, N / G]
        valid = self.fold.repeat_per_row(valid).reshape(groups, -1)
        out, stats, choices = self.feed_forward(flat, valid, noise, None, tasks, None, view)
        return self.fold.back(out.reshape(-1, high, wide, self.out)), stats, choices


class Vision(nn.Cell):
    """Maps images [B, C, H, W] to (logits [B * T, V] float32, statistics, choices), the last two as models.Decoder.

    Each of the T tasks has a head; `valid` [B, T] says which one an image is asked, and so which task it belongs to.

    Args:
        config: the whole configuration; model.num_layers layers of model.hidden_size channels.
        drawn: False: weights have shapes and no numbers, see nn.initializers.
    """

    classifies, exits = True, 1

    def __init__(self, config: Config, mesh: LocalMesh = LOCAL, drawn: bool = True):
        super().__init__()
        check_sort_keys(config)
        model, vision = config.model, config.vision
        random, slices = InitialWeights(config.train.seed, drawn), NoiseSlices()
        self.side, self.pool, self.moe_layers = vision.image_size, vision.pool, config.moe_layers
        self.group_size = config.data.batch_size // config.groups  # images that are routed together
        inner = self.side // self.pool
        sides = [inner if index else self.side for index in range(model.num_layers)]
        self.layers = nn.CellList(
            [ConvolutionLayer(config, index, side, random, slices, mesh) for index, side in enumerate(sides)]
        )
        passes = 2 if config.moe.consistency_loss_factor and self.moe_layers else 1  # see training.loss.TrainLoss
        self.noise_slices = slices.count * passes
        self.norm = create_norm(model.norm, model.hidden_size, model.norm_eps)
        self.task_classes = vision.task_classes
        self.vocab_size, self.task_num = max(self.task_classes), len(self.task_classes)
        self.heads = Summary((inner, inner, model.hidden_size), GRID, self.task_num * self.vocab_size, random)
        self.offset = Tensor(class_offsets(self.task_classes))
        self.task_of = ops.Argmax(axis=-1, output_type=mstype.int32)
        self.turn = ops.Transpose()
        self.beside, self.beside_choices, self.records = Beside(), Beside(), config.moe.record is not None

    def construct(self, images: Tensor, valid: Tensor, noise: Tensor):
        """images [B, C, H, W] float32, valid [B, T] float32: 1 at the task of an image, all 0 for padding; noise
        [max(noise_slices, 1), N, D] of U(0, 1), read in training only."""
        groups = images.shape[0] // self.group_size if images.shape[0] > self.group_size else 1
        tasks, real = self.task_of(valid), valid.sum(1)  # [B] each
        x = self.turn(keep_where(images, real), (0, 2, 3, 1))  # [B, H, W, C]
        stats, choices = (), ()
        for index, layer in enumerate(self.layers):
            x, own, chosen = layer(x, tasks, real, noise, groups)
            if layer.conditional:
                stats, choices = (*stats, own), (*choices, chosen)
            if index == 0 and self.pool > 1:
                x = self.pooled(x)
        return self.logits(x), self.beside(stats), self.beside_choices(choices) if self.records else ()

    def pooled(self, x: Tensor) -> Tensor:
        """Takes means over pool x pool squares: [B, H, W, D] -> [B, H / pool, W / pool, D]."""
        side = self.side // self.pool
        return x.reshape(-1, side, self.pool, side, self.pool, x.shape[3]).mean((2, 4))

    def logits(self, x: Tensor) -> Tensor:
        """Projects maps [B, H, W, D] on the classes: [B * T, V]."""
        x = self.norm(x.reshape(-1, x.shape[3])).reshape(x.shape)
        return (self.heads(x) + self.offset).reshape(-1, self.vocab_size)  # [B, T * V] -> [B * T, V]


def class_offsets(task_classes: tuple[int, ...]) -> np.ndarray:
    """Returns the offsets that are added to the logits so that a task has only its own classes: [T * V] float32."""
    most = max(task_classes)
    offsets = [[0.0] * classes + [ABSENT] * (most - classes) for classes in task_classes]
    return np.array(offsets, np.float32).reshape(-1)
