"""The drop rate of uniform random routing in closed form.

Each of T rows chooses one of E experts uniformly, so an expert is chosen N ~ Binomial(T, 1 / E) times and drops
(N - C)^+ of them, C = ceil(T * factor / E). By linearity the expected share of dropped rows is E * E[(N - C)^+] / T.
"""

import math
from fractions import Fraction

import numpy as np
from scipy.stats import binom


def slots(choices: int, experts: int, factor: float) -> int:
    """ceil(choices * factor / experts), exact for a factor of a few decimals."""
    return math.ceil(choices * Fraction(str(factor)) / experts)


def drop_rate(rows: int, experts: int, factor: float) -> float:
    """Expected share of dropped rows, from 0 to 1."""
    capacity = slots(rows, experts, factor)
    counts = np.arange(capacity + 1, rows + 1)
    return float(experts * ((counts - capacity) * binom.pmf(counts, rows, 1 / experts)).sum() / rows)
