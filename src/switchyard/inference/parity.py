"""Do the exported files compute what the training graph computes? Asked on real text, of every expert.

Validation windows are run by the training graph (`Decoder` at evaluation). Of each window the exported `prefill` reads
the beginning, cut at a random place, and `decode` the next few tokens; logits are compared at the last place that
prefill reads and at each that decode reads. Windows are added until every expert of every layer was visited by a
compared place of either graph: an expert of the last layer changes no other logits than those of its own places.

Legend: B windows, S tokens of a window, V vocabulary, M conditional layers, E experts.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from switchyard.data import EvalBatches
from switchyard.errors import UserError
from switchyard.inference.manifest import DECODE, DECODE_ONE, PREFILL, Parity
from switchyard.inference.mindir import ExportedModel
from switchyard.models import Seq2Seq
from switchyard.moe import metrics

STEPS = 4  # decode steps of a window
LONG, SHORT = 2, 32  # windows of full length that are compared first, and the length of those after them
PASSES = 8  # over the text, each cutting the windows elsewhere, before an expert counts as out of reach
MOST_BATCHES = 100
ROWS_ALONE = 8  # of a batch that the graph of one row decodes
LARGEST = 2**26  # logits that the training graph makes at a time of short windows
# A logit of a few units may differ so: rounding of float32; of 11 and 8 significant bits where products are half width
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}


@dataclass(frozen=True)
class Windows:
    """Holds one batch of windows and the results of the training graph on it.

    Attributes:
        tokens: [B, S] int32; of an encoder-decoder, what its decoder reads.
        lengths: [B], the places that prefill reads; decode reads the next STEPS.
        logits: [B, 1 + steps, V] float32 at places lengths - 1, ..., lengths - 1 + steps.
        reached: graph -> choices [M, E] that the compared places made; those of an encoder are prefill's.
        inputs: [B, S] int32 that the encoder of an encoder-decoder reads.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    logits: np.ndarray
    reached: dict[str, np.ndarray]
    inputs: np.ndarray | None = None


@dataclass(frozen=True)
class Reference:
    """Holds what the exported files must compute: batches of windows, and (layer, expert, graph) that no window
    reached.
    """

    batches: tuple[Windows, ...]
    not_reached: tuple[tuple[int, int, str], ...]


def reference(decoder: nn.Cell, validation: EvalBatches, max_length: int, seed: int) -> Reference:
    """Runs the training graph over validation windows until every expert was reached or the text has no more to give.

    Batches that reach no further expert are forgotten, but for the first two.

    Args:
        decoder: at evaluation, without drops.
        validation: the run's validation text.
        max_length: of the export.
        seed: of the places where windows are cut.
    """
    rng = np.random.default_rng(seed)
    kept: list[Windows] = []
    missing = {PREFILL: np.ones(0, bool), DECODE: np.ones(0, bool)}  # [M, E]
    pieces = _windows(validation, max_length, decoder.vocab_size)
    if isinstance(decoder, Seq2Seq):
        pieces = _pairs(validation)
    for tokens, inputs in itertools.islice(pieces, MOST_BATCHES):
        windows = _run(decoder, tokens, inputs, rng)
        still = {graph: windows.reached[graph] == 0 for graph in missing}
        if kept:
            still = {graph: missing[graph] & still[graph] for graph in missing}
        if len(kept) < 2 or any((still[graph] != missing[graph]).any() for graph in missing):
            kept.append(windows)
        missing = still
        if len(kept) > 1 and not any(one.any() for one in missing.values()):
            break
    not_reached = tuple(
        (decoder.moe_layers[place], int(expert), graph)
        for graph in missing
        for place, expert in np.argwhere(missing[graph])
    )
    return Reference(tuple(kept), not_reached)


def compare(model: ExportedModel, expected: Reference, dtype: str) -> Parity:
    """Runs the reloaded files on the windows and measures.

    Raises:
        UserError: a logit differs by more than the bound of the compute dtype.
    """
    worst = dict.fromkeys((PREFILL, *model.decode_graphs), 0.0)
    places = dict.fromkeys(worst, 0)
    for windows in expected.batches:
        for graph, logits, wanted in _exported(model, windows):
            difference = float(np.abs(logits - wanted).max())
            worst[graph] = max(worst[graph], difference if np.isfinite(difference) else np.inf)
            places[graph] += len(logits)
    bound = BOUNDS[dtype]
    for graph, difference in worst.items():
        if difference > bound:
            raise UserError(
                f"export: a logit of {graph}.mindir differs from the training graph by {difference:.1e}, more than "
                f"{bound:.0e} ({dtype}): nothing was written; report it with the checkpoint"
            )
    return Parity(
        max_abs_difference=max(worst.values()),
        prefill_max_abs_difference=worst[PREFILL],
        decode_max_abs_difference=max(worst[graph] for graph in model.decode_graphs),
        bound=bound,
        prefill_positions=places[PREFILL],
        decode_positions=places[DECODE],
        not_reached=expected.not_reached,
    )


def _exported(model: ExportedModel, windows: Windows) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yields (graph, its logits [B, V], those of the training graph [B, V]) of each compared position."""
    rows = np.arange(len(windows.tokens))
    prompts = [row[:length] for row, length in zip(windows.tokens, windows.lengths)]
    read = (prompts,) if windows.inputs is None else (list(windows.inputs), prompts)
    logits, *state = model.prefill(*read)
    yield PREFILL, logits, windows.logits[:, 0]
    state = model.grow(*state, windows.tokens.shape[1])
    for step in range(1, windows.logits.shape[1]):
        places = windows.lengths + step - 1
        for graph in model.decode_graphs:  # the second writes into the caches what the first wrote
            logits = _decoded(model, windows.tokens[rows, places], places, state, graph)
            yield graph, logits, windows.logits[: len(logits), step]


def _decoded(model: ExportedModel, tokens: np.ndarray, places: np.ndarray, state: list, graph: str) -> np.ndarray:
    """Returns the logits [B, V] of a step of all rows; of `decode_one` those of the first rows, one after the other."""
    if graph != DECODE_ONE:
        return model.decode(tokens, places, *state, graph=graph)[0]
    found = []
    for row in range(min(ROWS_ALONE, len(tokens))):
        alone = [tuple(cache[row : row + 1].copy() for cache in caches) for caches in state]
        found.append(model.decode(tokens[row : row + 1], places[row : row + 1], *alone, graph=graph)[0])
    return np.concatenate(found)


def _pairs(validation: EvalBatches) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of (what a decoder reads [B, T], what its encoder reads [B, S]) of whole corrupted windows."""
    for batch in itertools.chain.from_iterable(validation for _ in range(PASSES)):
        whole, length = batch.valid.min(1) > 0, batch.tokens.shape[1] - batch.labels.shape[1]
        if whole.any():
            yield batch.tokens[whole, length:], batch.tokens[whole, :length]


def _windows(validation: EvalBatches, max_length: int, vocab_size: int) -> Iterator[tuple[np.ndarray, None]]:
    """Batches of windows [B, S] of real text: one of full length, then short ones, PASSES times."""
    first = validation.at(0)
    real = first.valid.sum(1)  # [B]
    yield first.tokens[real == real[0]][:LONG, : min(max_length, int(real[0]))], None
    for batch in itertools.chain.from_iterable(validation for _ in range(PASSES)):
        whole = batch.tokens[batch.valid.min(1) > 0]
        if not len(whole):
            whole = batch.tokens[:1, : int(batch.valid[0].sum())]
        size = min(SHORT, whole.shape[1], max_length)
        pieces = whole.shape[1] // size
        windows = whole[:, : pieces * size].reshape(-1, size)  # [B * pieces, S]
        yield windows[: max(1, LARGEST // (size * vocab_size))], None


def _run(decoder: nn.Cell, tokens: np.ndarray, inputs: np.ndarray | None, rng: np.random.Generator) -> Windows:
    """Runs the training graph on windows [B, S], each split at a random position; inputs: see Windows."""
    batch, size = tokens.shape
    steps = min(STEPS, size - 1)
    lengths = rng.integers(1, size - steps + 1, batch)
    lengths[0] = size - steps  # one reads all that it can
    loads, given = [], tokens if inputs is None else np.concatenate((inputs, tokens), 1)
    for end in (lengths - 1, lengths, lengths + steps):
        valid = (np.arange(size) < end[:, None]).astype(np.float32)  # [B, S]
        logits, stats, _ = decoder(Tensor(given), Tensor(valid), ops.zeros((1, 1, 1), mstype.float32))
        loads.append(loads_of(decoder, stats))
    places = (lengths - 1)[:, None] + np.arange(steps + 1)  # [B, 1 + steps]
    logits = logits.asnumpy().reshape(batch, size, -1)[np.arange(batch)[:, None], places]  # [B, 1 + steps, V]
    # causal and without drops: what later places choose does not touch earlier ones, so loads can be subtracted
    reached = {PREFILL: loads[1] - loads[0], DECODE: loads[2] - loads[1]}
    if inputs is not None:
        encoder = sum(layer < len(decoder.encoder.layers) for layer in decoder.moe_layers)
        reached[PREFILL][:encoder], reached[DECODE][:encoder] = loads[0][:encoder], 1.0
    return Windows(tokens, lengths, logits, reached, inputs)


def loads_of(decoder: nn.Cell, stats) -> np.ndarray:
    """Returns the load of each expert [M, E], of statistics [G, M * (6 + 2 E)]; [0, 1] of a dense decoder."""
    if not decoder.moe_layers:
        return np.ones((0, 1))
    experts = decoder.layers[decoder.moe_layers[0]].feed_forward.expert_num
    return metrics.metrics(stats.asnumpy().sum(0), experts)["load"]
