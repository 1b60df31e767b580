"""Makes training batches of token shards, of one corpus or a mixture of corpora, without a pass over the data.

Window `j` of the whole training is a pure function of (seed, j):

    corpus        a fixed pattern of PATTERN places has each corpus as often as its weight says; j chooses the place
    visit n       how often the places before j chose that corpus
    epoch, place  n divided by the windows of the corpus, and the rest
    window        a keyed permutation of (seed, corpus, epoch) at that place, moved by an offset of the same key

So batches resume anywhere, on any number of processes, and each process reads its own windows only. Memory does not
depend on the number of windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from switchyard.data.batches import IGNORED, Batch, Course
from switchyard.data.permutation import Permutation
from switchyard.data.shards import ShardStream
from switchyard.errors import UserError

PATTERN = 4096  # places
ENDLESS = 1 << 60  # windows of the one course that a training takes
TOKEN_STREAM, OFFSET_STREAM, PATTERN_STREAM = 0x746F_6B73, 0x6F66_6673, 0x7061_7474  # set draws of one seed apart


@dataclass(frozen=True)
class TokenCorpus:
    """Holds one corpus of a mixture.

    Attributes:
        name: for logs and messages.
        stream: tokens [T].
        mask: [T], of instruction data 1 = a token to learn; None = all are learned.
        weight: share of the windows, in any unit; None stands for the windows of `epochs`, or of one.
        epochs: how often training may read the corpus; None = any number.
    """

    name: str
    stream: ShardStream
    mask: ShardStream | None = None
    weight: float | None = None
    epochs: float | None = None


class TokenBatches:
    """Returns training batches by index: `at(i)` for any i >= 0, in any order, on any process; see TrainBatches.

    Args:
        corpora: one or more.
        batch_size: sequences B of one rank's batch.
        seq_length: tokens S of a sequence.
        seed: of the shuffle.
        rank, world: which shard of how many.
        collate: makes a batch of (windows, seed, epoch, numbers, rows), see corruption.Corruption; None predicts the
            next token.

    Raises:
        UserError: fewer tokens than one window; a weight that no place of the pattern stands for.
    """

    def __init__(
        self,
        corpora: Sequence[TokenCorpus],
        batch_size: int,
        seq_length: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        collate: Callable[..., Batch] | None = None,
    ):
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        self._corpora, self._batch_size, self._width, self._seed = corpora, batch_size, seq_length + 1, seed
        self._rank, self._world, self._collate = rank, world, collate
        self.windows = [self._count(corpus) for corpus in corpora]  # of an epoch of each corpus
        self._pattern = pattern_of(self._weights(), seed)  # [P] numbers of corpora
        chosen = self._pattern == np.arange(len(corpora))[:, None]  # [C, P]
        self._before = np.concatenate((np.zeros((len(corpora), 1), np.int64), chosen.cumsum(1)), 1)  # [C, P + 1]
        self._epochs: dict[tuple[int, int, int], tuple[Permutation, int]] = {}
        self.start_at(0, 0, 0)

    def _count(self, corpus: TokenCorpus) -> int:
        tokens = len(corpus.stream)
        if tokens < self._width:
            raise UserError(
                f"model.seq_length: {self._width - 1}; the training text '{corpus.name}' has only {tokens:,} tokens, "
                f"a window needs {self._width:,}; lower model.seq_length or give more text"
            )
        return max(1, (tokens - self._width + 1) // self._width)

    def _weights(self) -> list[float]:
        pairs = zip(self._corpora, self.windows)
        return [corpus.weight or windows * (corpus.epochs or 1.0) for corpus, windows in pairs]

    @property
    def shares(self) -> dict[str, float]:
        """Returns the share of each corpus in the windows."""
        counts = self._before[:, -1] / len(self._pattern)
        return {corpus.name: float(count) for corpus, count in zip(self._corpora, counts)}

    def start_at(self, index: int, epoch: int, window: int) -> None:
        """Moves batch `index` and the batches after it to window `window` of the course `epoch`, which draws anew."""
        self.course = Course(ENDLESS, self._batch_size * self._world, index, epoch, window)

    def require_epochs(self, windows: int) -> None:
        """Refuses a training of so many windows that a corpus would be read more often than it may (UserError)."""
        for number, corpus in enumerate(self._corpora):
            epochs = self._visits(number, windows) / self.windows[number]
            if corpus.epochs is not None and epochs > corpus.epochs:
                raise UserError(
                    f"data.mixture[{number}].epochs: {corpus.epochs:g}; train.steps reads '{corpus.name}' {epochs:.2f} "
                    "times; lower its weight or train.steps, or allow more epochs"
                )

    def counts(self, index: int) -> dict[str, int]:
        """Returns how many windows of each corpus the batches before `index` have read, in the present course."""
        _, window = self.course.after(index)
        return {corpus.name: self._visits(number, window) for number, corpus in enumerate(self._corpora)}

    def _visits(self, number: int, place: int) -> int:
        """Returns how many of the windows before `place` are of a corpus."""
        rounds, rest = divmod(place, len(self._pattern))
        return rounds * int(self._before[number, -1]) + int(self._before[number, rest])

    def at(self, index: int) -> Batch:
        """Returns micro-batch `index` of the training."""
        course, first = self.course.at(index)
        first += self._rank * self._batch_size
        places = range(first, first + self._batch_size)
        read = [self._window(*found) for found in self._places(course, places)]
        windows = np.stack([ids for ids, _ in read])  # [B, S+1]
        if self._collate is not None:
            return self._collate(list(windows), self._seed, course, list(places), len(windows))
        tokens, labels = np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])  # [B, S] each
        for row, (_, mask) in enumerate(read):
            if mask is not None:
                labels[row, mask[1:] == 0] = IGNORED
        return Batch(tokens, labels, np.ones(tokens.shape, np.float32))

    def _places(self, course: int, places: range) -> list[tuple[TokenCorpus, int]]:
        """Returns of each window its corpus and the token that it starts at; an epoch's are permuted in one call."""
        numbers = [int(self._pattern[place % len(self._pattern)]) for place in places]
        visits = [divmod(self._visits(number, place), self.windows[number]) for number, place in zip(numbers, places)]
        epochs = [(number, epoch) for number, (epoch, _) in zip(numbers, visits)]
        starts = np.zeros(len(places), np.int64)
        for key in dict.fromkeys(epochs):
            rows = [row for row, one in enumerate(epochs) if one == key]
            order, offset = self._epoch(course, *key)
            starts[rows] = offset + order(np.array([visits[row][1] for row in rows])) * self._width
        return [(self._corpora[number], int(start)) for number, start in zip(numbers, starts)]

    def _window(self, corpus: TokenCorpus, start: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns one window [S + 1] int32, and its mask [S + 1] where its corpus has one."""
        ids = corpus.stream.read(start, self._width).astype(np.int32)
        return ids, None if corpus.mask is None else corpus.mask.read(start, self._width)

    def _epoch(self, course: int, number: int, epoch: int) -> tuple[Permutation, int]:
        """Returns the permutation and the offset of an epoch of a corpus; keeps those used last, for speed alone."""
        key = (course, number, epoch)
        if key not in self._epochs:
            if len(self._epochs) > 2 * len(self._corpora):
                self._epochs.clear()
            count = self.windows[number]
            slack = len(self._corpora[number].stream) - count * self._width
            rng = np.random.default_rng((OFFSET_STREAM, self._seed, *key))
            order = Permutation(count, (TOKEN_STREAM, self._seed, *key))
            self._epochs[key] = order, int(rng.integers(slack + 1))
        return self._epochs[key]


def pattern_of(weights: Sequence[float], seed: int) -> np.ndarray:
    """Returns which corpus each of P places reads: [P], each corpus as often as its weight says to 1 / PATTERN.

    Raises:
        UserError: a weight is so small that no place is left for it.
    """
    if len(weights) == 1:
        return np.zeros(1, np.int64)
    exact = np.asarray(weights, np.float64) / np.sum(weights) * PATTERN
    counts = np.floor(exact).astype(np.int64)
    rest = PATTERN - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1  # the largest remainders
    for number in np.flatnonzero(counts == 0)[:1]:
        raise UserError(
            f"data.mixture[{number}].weight: its share is {exact[number] / PATTERN:.2g}, at least 1/{PATTERN:,} is "
            "needed; raise it or leave the corpus out"
        )
    rng = np.random.default_rng((PATTERN_STREAM, seed))
    return rng.permutation(np.repeat(np.arange(len(weights)), counts))
