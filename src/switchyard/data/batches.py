"""Makes batches of tokens: training batches by index, a pure function of (seed, index); validation batches in order.

Nothing is remembered between two batches, so a run resumes by asking for the next index.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from switchyard.errors import UserError

SHUFFLE_STREAM = 0x6461_7461  # sets these draws apart from other draws of the same seed
IGNORED = -1  # label of a token that is read and not learned


class Batch(NamedTuple):
    """Holds one micro-batch: predict `labels` from `tokens` where `valid` is 1."""

    tokens: np.ndarray  # [B, S] int32
    labels: np.ndarray  # [B, S] int32; IGNORED where nothing is to be predicted
    valid: np.ndarray  # [B, S] float32: 1 = a real prediction, 0 = padding


@dataclass(frozen=True)
class Course:
    """Computes which windows of which epoch each batch reads.

    Counting may begin anywhere: batch `index` takes the windows of `epoch` from number `window` on. So a run that goes
    on with another batch size reads what its epoch has left, no window twice and none left out but those that do not
    fill the epoch's last batch.

    Attributes:
        windows: of an epoch.
        together: windows of a batch, over all processes.
    """

    windows: int
    together: int
    index: int = 0
    epoch: int = 0
    window: int = 0

    def at(self, index: int) -> tuple[int, int]:
        """Returns (epoch, first window) of a batch (IndexError: one before the beginning)."""
        if index < self.index:
            raise IndexError(f"batch {index}: counted from {self.index}")
        number, left = index - self.index, (self.windows - self.window) // self.together
        if number < left:
            return self.epoch, self.window + number * self.together
        epochs, place = divmod(number - left, self.windows // self.together)
        return self.epoch + 1 + epochs, place * self.together

    def first_of(self, epoch: int) -> int:
        """Returns the first window of the batches of an epoch."""
        return self.window if epoch == self.epoch else 0

    def after(self, count: int) -> tuple[int, int]:
        """Returns (epoch, windows of that epoch) that the first `count` batches have read."""
        if count == self.index:
            return self.epoch, self.window
        epoch, window = self.at(count - 1)
        return epoch, window + self.together


class Source(Protocol):
    """Reads tokens as windows of S + 1, each of which makes one training sequence."""

    def __len__(self) -> int:
        """Returns the number of windows of an epoch."""

    slack: int
    """Largest offset by which an epoch may move all its windows."""

    def read(self, order: np.ndarray, start: int, stop: int, offset: int) -> np.ndarray:
        """Returns windows order[start:stop] as [stop - start, S + 1] int32; `order` is one epoch of this rank."""


class TextSource:
    """Reads windows of a stream of tokens in memory, side by side from the epoch's offset on."""

    def __init__(self, stream: np.ndarray, seq_length: int):
        width = seq_length + 1
        if len(stream) < width:
            fit = f"set model.seq_length to at most {len(stream) - 1} or " if len(stream) > 1 else ""
            raise UserError(
                f"model.seq_length: {seq_length}; the training text has only {len(stream)} tokens, a block needs "
                f"{width}; {fit}give more text in data.path"
            )
        self._stream, self._width = stream, width
        self._count = max(1, (len(stream) - seq_length) // width)
        self.slack = len(stream) - self._count * width  # S or more, so that every token has its turn as a label

    def __len__(self) -> int:
        return self._count

    def read(self, order: np.ndarray, start: int, stop: int, offset: int) -> np.ndarray:
        """Returns windows order[start:stop] of the stream, moved by `offset`: [stop - start, S + 1] int32."""
        first = offset + order[start:stop].astype(np.int64) * self._width  # [B]
        return self._stream[first[:, None] + np.arange(self._width)].astype(np.int32)  # [B, S+1]


class TrainBatches:
    """Returns training batches by index: `at(i)` for any i >= 0, in any order, on any process.

    An epoch moves the windows by an offset and permutes them, both drawn by (seed, epoch). Batch i of the world takes
    the next `batch_size * world` windows of the permutation and rank r the r-th shard of them: the ranks' batches,
    joined, are the batch of one process. The windows that do not fill a last batch wait for another epoch. `start_at`
    lets counting begin elsewhere, see Course.

    Args:
        tokens: stream [T] of any integer type, or a `Source`.
        batch_size: sequences B of one rank's batch.
        seq_length: tokens S of a sequence.
        seed: of the shuffle.
        rank, world: which shard of how many.

    Raises:
        UserError: fewer tokens than one block, or fewer windows than one batch.
    """

    def __init__(
        self, tokens: np.ndarray | Source, batch_size: int, seq_length: int, seed: int, rank: int = 0, world: int = 1
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self._source: Source = TextSource(tokens, seq_length) if isinstance(tokens, np.ndarray) else tokens
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        together = batch_size * world
        self.batches_per_epoch = len(self._source) // together
        if not self.batches_per_epoch:
            raise UserError(
                f"data.batch_size: {together}; the training text has only {len(self._source)} blocks of "
                f"{seq_length + 1} tokens; lower data.batch_size or model.seq_length, or give more text"
            )
        self.start_at(0, 0, 0)

    def start_at(self, index: int, epoch: int, window: int) -> None:
        """Moves batch `index` and the batches after it to the windows of `epoch` from number `window` on."""
        self.course = Course(len(self._source), self._batch_size * self._world, index, epoch, window)
        self._epoch = -1  # the permutation of one epoch is kept, for speed alone
        self._order = np.zeros(0, np.int64)
        self._offset = 0

    def at(self, index: int) -> Batch:
        """Returns micro-batch `index` of the training."""
        epoch, first = self.course.at(index)
        if epoch != self._epoch:
            rng = np.random.default_rng((SHUFFLE_STREAM, self._seed, epoch))
            self._offset, self._epoch = int(rng.integers(self._source.slack + 1)), epoch
            order = rng.permutation(len(self._source))[self.course.first_of(epoch) :]
            count = len(order) // self.course.together
            order = order[: count * self.course.together].reshape(count, self._world, self._batch_size)
            self._order = order[:, self._rank].reshape(-1)  # windows of this rank, in the order of its batches
        start = (first - self.course.first_of(epoch)) // self._world
        windows = self._source.read(self._order, start, start + self._batch_size, self._offset)  # [B, S+1]
        return self._batch(windows, epoch, self._order[start : start + self._batch_size])

    def _batch(self, windows: np.ndarray, epoch: int, numbers: np.ndarray) -> Batch:
        """Returns the batch of windows [B, S + 1], which have these numbers [B] in their epoch."""
        tokens, labels = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])  # [B, S] each
        return Batch(tokens, labels, np.ones(tokens.shape, np.float32))


class EvalBatches:
    """Reads the full validation stream once, as consecutive windows: every token but the first is predicted exactly
    once.

    Iterating starts anew each time; `at(i)` reads any batch, `len` counts them. The last window and the last batch are
    filled up with token 0 and `valid` 0, so that all batches have one shape.

    Args:
        stream: tokens [T], an array or anything that has its length and slices.
        batch_size, seq_length: of a batch.
        mask: [T] as `stream`, 1 = a token to predict; None predicts all.
    """

    def __init__(self, stream: np.ndarray, batch_size: int, seq_length: int, mask: np.ndarray | None = None):
        if len(stream) < 2:
            raise UserError(
                f"data.val_fraction: leaves {len(stream)} validation tokens, at least 2 are needed; "
                "increase it or give more text"
            )
        self._stream, self._batch_size, self._seq_length, self._mask = stream, batch_size, seq_length, mask

    def __len__(self) -> int:
        return -(-(len(self._stream) - 1) // (self._batch_size * self._seq_length))

    def __iter__(self) -> Iterator[Batch]:
        return (self.at(index) for index in range(len(self)))

    def at(self, index: int) -> Batch:
        """Returns batch `index`, 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        shape = (self._batch_size, self._seq_length)
        size = shape[0] * shape[1]
        piece = self._stream[index * size : (index + 1) * size + 1].astype(np.int32)  # [<= B*S + 1]
        real = len(piece) - 1
        tokens, labels, valid = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.float32)
        tokens[:real], labels[:real], valid[:real] = piece[:-1], piece[1:], 1.0
        if self._mask is not None:
            labels[:real][self._mask[index * size + 1 : index * size + 1 + real] == 0] = IGNORED
        return Batch(tokens.reshape(shape), labels.reshape(shape), valid.reshape(shape))  # [B*S] -> [B, S]
