"""Corrupts spans of text (T5, arXiv 1910.10683, section 3.1.4): an encoder reads the rest, a decoder finds the spans.

    text      the cat sat on the mat
    encoder   the <extra_id_0> on the <extra_id_1> END
    decoder   <extra_id_0> cat sat <extra_id_1> mat END

What is replaced follows from (seed, epoch, number of the window), so that nothing is remembered between two batches.

Legend: B batch, L tokens of a window, S of an encoder's input, T of a decoder's target, P windows.
"""

from collections.abc import Iterator

import numpy as np

from switchyard.config import Config
from switchyard.config.seq2seq import END, PAD, Seq2SeqConfig
from switchyard.data.batches import Batch, EvalBatches, Source, TrainBatches
from switchyard.data.sentinels import SentinelTokenizer
from switchyard.errors import UserError

CORRUPTION_STREAM = 0x7370_616E  # sets these draws apart from other draws of the same seed
VALIDATION = 0  # seed and epoch of the draws of validation, which are the same in all runs


def segments(rng: np.random.Generator, total: int, count: int) -> np.ndarray:
    """Draws `count` lengths of at least 1 that add up to `total`, all such rows as probable: [count]."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], cuts, [total])))


def noise_mask(rng: np.random.Generator, length: int, own: Seq2SeqConfig) -> np.ndarray:
    """Draws which tokens of a text are replaced: [length] bool; it begins with tokens that stay."""
    noise, spans = own.spans(length)
    stays, goes = segments(rng, length - noise, spans), segments(rng, noise, spans)
    return np.repeat(np.arange(2 * spans) % 2 == 1, np.stack((stays, goes), 1).reshape(-1))


def replace_runs(tokens: np.ndarray, mask: np.ndarray, first: int) -> np.ndarray:
    """Replaces each run of the mask [L] in tokens [L] by one sentinel, `first`, `first` - 1, ..., and adds the end."""
    starts = mask & ~np.concatenate(([False], mask[:-1]))
    replaced = np.where(starts, first + 1 - np.cumsum(starts), tokens)
    return np.append(replaced[starts | ~mask], END)


def corrupt(tokens: np.ndarray, rng: np.random.Generator, own: Seq2SeqConfig, first: int) -> tuple:
    """Returns (input, target) of a text [L], at least 2 tokens: ids of any length.

    Args:
        tokens: ids of the vocabulary with sentinels.
        rng: draws the spans.
        own: share and mean length of the spans.
        first: id of <extra_id_0>; the next sentinel has the id before it.
    """
    mask = noise_mask(rng, len(tokens), own)
    return replace_runs(tokens, mask, first), replace_runs(tokens, ~mask, first)


class Corruption:
    """Makes batches of windows of text, the ids of which are those of a tokenizer without sentinels.

    Args:
        config: seq2seq, lengths.
        tokenizer: has the sentinels.
    """

    def __init__(self, config: Config, tokenizer: SentinelTokenizer):
        self.own, self.first, self.moved = config.seq2seq, tokenizer.first, tokenizer.moved
        self.length, self.targets = config.model.seq_length, config.target_length

    def __call__(self, windows: list[np.ndarray], seed: int, epoch: int, numbers: list[int], rows: int) -> Batch:
        """Returns a batch of `rows` sequences, of which those behind the windows are padding.

        Args:
            windows: ids [<= L] of each, at least 2.
            seed, epoch, numbers: what the draws of a window follow from.
        """
        inputs = np.full((rows, self.length), PAD, np.int32)
        labels, valid = np.full((rows, self.targets), PAD, np.int32), np.zeros((rows, self.targets), np.float32)
        for row, (window, number) in enumerate(zip(windows, numbers, strict=True)):
            rng = np.random.default_rng((CORRUPTION_STREAM, seed, epoch, int(number)))
            text, target = corrupt(window.astype(np.int32) + self.moved, rng, self.own, self.first)
            inputs[row, : len(text)], labels[row, : len(target)] = text, target
            valid[row, : len(target)] = 1.0
        begun = np.concatenate((np.full((rows, 1), PAD, np.int32), labels[:, :-1]), 1)  # what the decoder reads
        return Batch(np.concatenate((inputs, begun), 1), labels, valid)  # [B, S + T], [B, T], [B, T]


class CorruptedBatches(TrainBatches):
    """Returns training batches of corrupted windows by index, see TrainBatches."""

    def __init__(self, tokens: np.ndarray | Source, config: Config, tokenizer: SentinelTokenizer, rank=0, world=1):
        batch_size = config.data.batch_size // world
        super().__init__(tokens, batch_size, config.window - 1, config.train.seed, rank, world)
        self._corruption = Corruption(config, tokenizer)

    def _batch(self, windows: np.ndarray, epoch: int, numbers: np.ndarray) -> Batch:
        return self._corruption(list(windows), self._seed, epoch, numbers, len(windows))


class CorruptedEvalBatches(EvalBatches):
    """Reads the full validation stream once, as consecutive windows whose corruption is always the same.

    A last piece of one token, which cannot be corrupted, is left out.
    """

    def __init__(self, stream: np.ndarray, config: Config, tokenizer: SentinelTokenizer):
        super().__init__(stream, config.data.batch_size, config.window)
        self._windows = len(stream) // config.window + (len(stream) % config.window > 1)
        self._corruption = Corruption(config, tokenizer)

    @property
    def lengths(self) -> str:
        """Returns the lengths of an input and a target, in words."""
        return f"inputs of {self._corruption.length} and targets of {self._corruption.targets}"

    def __len__(self) -> int:
        return -(-self._windows // self._batch_size)

    def at(self, index: int) -> Batch:
        """Returns batch `index`, 0 <= index < len."""
        if not 0 <= index < len(self):
            raise IndexError(f"validation batch {index} of {len(self)}")
        numbers = range(index * self._batch_size, min((index + 1) * self._batch_size, self._windows))
        length = self._seq_length
        windows = [self._stream[number * length : (number + 1) * length] for number in numbers]
        return self._corruption(windows, VALIDATION, VALIDATION, list(numbers), self._batch_size)


def targets_of(batches: EvalBatches) -> Iterator[np.ndarray]:
    """Yields the real labels of each batch."""
    for batch in batches:
        yield batch.labels[batch.valid > 0]


def require_window(config: Config, tokens: int, key: str) -> None:
    """Refuses a text of fewer tokens than one window (UserError)."""
    if tokens < config.window:
        raise UserError(
            f"model.seq_length: {config.model.seq_length}; an input of it is made of {config.window} tokens, {key} has "
            f"{tokens}: lower model.seq_length or give more text"
        )
