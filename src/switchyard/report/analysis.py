"""Computes what experts do from the choices of routers, with NumPy alone.

Legend: N tokens, M conditional layers, E experts, K choices of a token, V vocabulary. A choice of -1 is no expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NONE = -1


@dataclass(frozen=True)
class TokenUse:
    """Holds one token of the vocabulary at one expert.

    Attributes:
        token: its id.
        count: how often the expert gets it.
        total: how often it occurs, whatever its experts.
        pmi: pointwise mutual information of token and expert, bits.
    """

    token: int
    count: int
    total: int
    pmi: float


def count_choices(tokens: np.ndarray, choices: np.ndarray, vocabulary: int, experts: int) -> np.ndarray:
    """Counts how often each expert gets each token: tokens [N], choices [N, K] -> [V, E]."""
    counts = np.zeros((vocabulary, experts), np.int64)
    for chosen in choices.T:  # one of the K choices
        real = chosen >= 0
        np.add.at(counts, (tokens[real], chosen[real]), 1)
    return counts


def mutual_information(counts: np.ndarray) -> np.ndarray:
    """Returns the pointwise mutual information of each token and expert in bits: counts [V, E] -> [V, E].

    log2(p(token, expert) / (p(token) p(expert))), Church and Hanks, Computational Linguistics 16 (1990), eq. 1; -inf
    where an expert never gets a token.
    """
    total = max(counts.sum(), 1)
    expected = counts.sum(1, keepdims=True) * (counts.sum(0, keepdims=True) / total)
    ratio = counts / np.maximum(expected, 1e-300)  # never 0 / 0: a count of 0 is the only one without an expectation
    with np.errstate(divide="ignore"):
        return np.log2(ratio)


def frequent_tokens(counts: np.ndarray, occurrences: np.ndarray, expert: int, most: int) -> list[TokenUse]:
    """Returns the tokens that an expert gets most often, the most frequent first: counts [V, E], occurrences [V]."""
    order = [token for token in np.argsort(-counts[:, expert], kind="stable")[:most] if counts[token, expert]]
    return _uses(counts, occurrences, mutual_information(counts), expert, order)


def exclusive_tokens(counts: np.ndarray, occurrences: np.ndarray, expert: int, most: int, least: int) -> list[TokenUse]:
    """Returns the tokens that go to an expert rather than to others, by pointwise mutual information.

    Args:
        counts: [V, E].
        occurrences: [V], how often each token occurs.
        expert: its index.
        most: length of the list.
        least: smallest count of a token at the expert: rare tokens have a large mutual information by chance.
    """
    information = mutual_information(counts)
    fit = np.flatnonzero((counts[:, expert] >= least) & (information[:, expert] > 0))
    order = sorted(fit, key=lambda token: (-information[token, expert], -counts[token, expert], token))
    return _uses(counts, occurrences, information, expert, order[:most])


def _uses(counts, occurrences, information, expert: int, tokens: Sequence[int]) -> list[TokenUse]:
    return [
        TokenUse(int(token), int(counts[token, expert]), int(occurrences[token]), float(information[token, expert]))
        for token in tokens
    ]


def coactivation(choices: np.ndarray, experts: int) -> np.ndarray:
    """Counts the tokens that choose both of two experts: choices [N, K] -> [E, E], symmetric; the diagonal counts the
    tokens of each expert."""
    chosen = np.zeros((len(choices), experts), np.float32)
    for one in choices.T:
        real = one >= 0
        chosen[np.flatnonzero(real), one[real]] = 1.0
    return np.rint(chosen.T.astype(np.float64) @ chosen).astype(np.int64)


def pair_lift(pairs: np.ndarray) -> np.ndarray:
    """Returns how much more often two experts are chosen together than their loads explain: pairs [E, E] of
    `coactivation` -> [E, E]; 1 is the mean over all pairs, the diagonal is 0.

    The explanation of a pair is proportional to the product of the two loads, scaled so that all pairs together have as
    many tokens as were counted: a token's choices are different experts, so plain independence would expect too many.
    """
    load = np.diag(pairs).astype(float)
    product = np.outer(load, load)
    np.fill_diagonal(product, 0.0)
    apart = pairs - np.diag(np.diag(pairs))
    scale = apart.sum() / max(product.sum(), 1e-300)
    return apart / np.maximum(product * scale, 1e-300)


def flow(before: np.ndarray, after: np.ndarray, experts: int) -> np.ndarray:
    """Counts the tokens that go from an expert of one layer to an expert of the next: first choices [N] each -> [E, E];
    tokens without an expert in one of the two are left out."""
    real = (before >= 0) & (after >= 0)
    pairs = before[real].astype(np.int64) * experts + after[real]
    return np.bincount(pairs, minlength=experts * experts).reshape(experts, experts)


@dataclass(frozen=True)
class Path:
    """A way through all conditional layers.

    Attributes:
        experts: the first choice of each layer.
        count: tokens that take it.
        expected: tokens that would take it if layers chose independently of each other.
        first: index of a token that takes it.
    """

    experts: tuple[int, ...]
    count: int
    expected: float
    first: int


def frequent_paths(first_choices: np.ndarray, most: int) -> list[Path]:
    """Returns the most frequent paths: first choices [M, N]; tokens that skip a layer are left out."""
    index = np.flatnonzero((first_choices >= 0).all(0))
    ways = first_choices[:, index]  # [M, N']
    if not ways.size:
        return []
    unique, first, counts = np.unique(ways, axis=1, return_index=True, return_counts=True)
    shares = [np.bincount(layer) / len(index) for layer in ways]
    order = np.argsort(-counts, kind="stable")[:most]
    return [
        Path(
            tuple(int(expert) for expert in unique[:, place]),
            int(counts[place]),
            float(len(index) * np.prod([share[expert] for share, expert in zip(shares, unique[:, place])])),
            int(index[first[place]]),
        )
        for place in order
    ]


def binned(values: np.ndarray, losses: np.ndarray, bins: int = 10) -> list[tuple[float, float, float]]:
    """Returns (mean value, mean loss, standard error of the loss) of `bins` parts of equal size, by growing value."""
    order = np.argsort(values, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return [
        (
            float(values[part].mean()),
            float(losses[part].mean()),
            float(losses[part].std(ddof=1) / np.sqrt(len(part))) if len(part) > 1 else 0.0,
        )
        for part in parts
    ]


def dead_experts(load: np.ndarray) -> list[int]:
    """Returns the experts that nothing chose: load [E]; none where nothing was routed."""
    return np.flatnonzero(load <= 0).tolist() if load.sum() else []


def starved_experts(load: np.ndarray, share: float) -> list[int]:
    """Returns the experts that are not dead and whose load is below `share` of the mean: load [E]."""
    return np.flatnonzero((load > 0) & (load < share * load.mean())).tolist() if load.sum() else []
