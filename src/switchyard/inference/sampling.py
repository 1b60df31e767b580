"""From logits to the next token: temperature, top-k, top-p. Plain numpy, a pure function of logits and draws.

Legend: B batch, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np

from switchyard.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Describes how the next token is drawn.

    Attributes:
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: only the k most probable tokens; 0 = all.
        top_p: only the most probable tokens whose mass reaches p (arXiv 1904.09751, section 3.1); 1 = all.
        seed: of the draws. Row r of a batch draws from (seed, r), so a row's text does not depend on its neighbours.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self):
        for name, value, holds, allowed in (
            ("temperature", self.temperature, 0 <= self.temperature < np.inf, "a number >= 0; 0 = greedy"),
            ("top-k", self.top_k, self.top_k >= 0, "an integer >= 0; 0 = all tokens"),
            ("top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1; 1 = all tokens"),
            ("seed", self.seed, self.seed >= 0, "an integer >= 0"),
        ):
            if not holds:
                raise UserError(f"--{name}: {value}; {allowed}")


def probabilities(logits: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Returns the distribution to draw from: logits [B, V] -> [B, V] float64, rows sum to 1.

    First the temperature (> 0), then top-k, then top-p on what is left. Of equal logits the lower id goes first.
    """
    scaled = logits.astype(np.float64)
    scaled = (scaled - scaled.max(-1, keepdims=True)) / temperature
    if top_p >= 1 and not 0 < top_k < scaled.shape[-1]:  # nothing is cut off, nothing needs an order
        mass = np.exp(scaled)
        return mass / mass.sum(-1, keepdims=True)
    order = np.argsort(-scaled, -1, kind="stable")  # [B, V], best first
    ranked = np.take_along_axis(scaled, order, -1)
    if 0 < top_k < scaled.shape[-1]:
        ranked[:, top_k:] = -np.inf
    ranked = np.exp(ranked)
    ranked /= ranked.sum(-1, keepdims=True)
    if top_p < 1:
        before = np.cumsum(ranked, -1) - ranked  # mass of the better ones
        ranked[before >= top_p] = 0.0
        ranked /= ranked.sum(-1, keepdims=True)
    found = np.zeros_like(ranked)
    np.put_along_axis(found, order, ranked, -1)
    return found


def choose(logits: np.ndarray, sampling: Sampling, draws: np.ndarray) -> np.ndarray:
    """Chooses the next tokens: logits [B, V], draws [B] of U(0, 1) -> [B] int32. Greedy ignores the draws."""
    if sampling.temperature == 0 or sampling.top_k == 1:
        return logits.argmax(-1).astype(np.int32)
    mass = np.cumsum(probabilities(logits, sampling.temperature, sampling.top_k, sampling.top_p), -1)  # [B, V]
    whole = mass[:, -1]  # [B], 1 but for rounding
    passed = mass <= np.minimum(draws * whole, np.nextafter(whole, 0))[:, None]  # [B, V]
    return passed.sum(-1).astype(np.int32)


class Sampler:
    """Draws token after token for B rows, each from its own stream."""

    def __init__(self, sampling: Sampling, batch: int):
        self._sampling = sampling
        self._random = [np.random.default_rng((sampling.seed, row)) for row in range(batch)]

    def __call__(self, logits: np.ndarray) -> np.ndarray:
        """Logits [B, V] -> [B] int32."""
        return choose(logits, self._sampling, np.array([rng.random() for rng in self._random]))
