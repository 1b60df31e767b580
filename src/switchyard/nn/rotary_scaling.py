"""Rotary frequencies, and how `model.rotary_scaling` changes them. NumPy alone.

Legend: r columns of a head that rotate, theta base of the frequencies.
"""

import math

import numpy as np

from switchyard.config.rotary_scaling import LinearScaling, Llama3Scaling, YarnScaling

Scaling = LinearScaling | Llama3Scaling | YarnScaling | None


def frequencies(size: int, theta: float, scaling: Scaling = None) -> np.ndarray:
    """Returns the angle of one position for each pair of columns (RoFormer, arXiv 2104.09864, eq. 15): [r / 2].

    Args:
        size: r.
        theta: the base; without scaling the pair i turns by theta^(-2 i / r).
        scaling: sub-section of the configuration; None: the frequencies stay.
    """
    half = size // 2
    plain = theta ** (-np.arange(half) / half)
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return _llama3(plain, scaling)
    return _yarn(plain, size, theta, scaling) if isinstance(scaling, YarnScaling) else plain


def attention_factor(scaling: Scaling) -> float:
    """Returns what cosines and sines are multiplied by, 1 but for YaRN (arXiv 2309.00071, eq. 22).

    Scores, products of two rotated vectors, are multiplied by its square, which is 1 / t of the paper.
    """
    if not isinstance(scaling, YarnScaling):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return _magnitude(scaling.factor, 1.0)


def _magnitude(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0


def _llama3(plain: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Returns frequencies of which the slow ones are divided (Llama 3.1, arXiv 2407.21783): [r / 2]."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)  # full turns in the original length
    stays = np.clip((turns - low) / (high - low), 0, 1)
    return stays * plain + (1 - stays) * plain / scaling.factor


def _yarn(plain: np.ndarray, size: int, theta: float, scaling: YarnScaling) -> np.ndarray:
    """Returns frequencies that a ramp over the columns divides (YaRN, arXiv 2309.00071, section 3.2): [r / 2]."""

    def column(turns: float) -> float:
        """Returns the pair that turns so often in the original length, a fraction."""
        original = scaling.original_max_position_embeddings
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = max(math.floor(column(scaling.beta_fast)), 0), min(math.ceil(column(scaling.beta_slow)), size - 1)
    width = last - first or 0.001  # two equal ends are a step
    divided = np.clip((np.arange(size // 2) - first) / width, 0, 1)
    return divided * plain / scaling.factor + (1 - divided) * plain
