"""Makes named metrics of router statistics, on the host. No MindSpore in here.

Everything in the tensor adds up: over routing groups, devices and batches. So one sum over the devices is enough, and a
mean over tokens is the same however the tokens are divided.

Legend: G routing groups, N tokens of a group, E experts, K choices of a token, M conditional layers.
"""

import numpy as np

# The first columns of the statistics; load [E] and importance [E] follow. The first three carry gradients. All but
# num_kept and tokens are sums over the real tokens of a group of what the metric is a mean of.
SCALARS = ("balance", "z", "auxiliary", "entropy", "num_kept", "tokens")
BALANCE, Z, AUXILIARY, ENTROPY, NUM_KEPT, TOKENS = range(len(SCALARS))
SUMS, MEANS = ("load", "importance"), ("dropped", "entropy", "max_violation", "z")  # names of metrics


def width(experts: int) -> int:
    """Returns the number of columns of the statistics of a layer with E experts."""
    return len(SCALARS) + 2 * experts


def by_layer(stats: np.ndarray, experts: int) -> np.ndarray:
    """Returns summed statistics [M * (6 + 2 E)] as float64 [M, 6 + 2 E]."""
    return np.asarray(stats, np.float64).reshape(-1, width(experts))


def loads(stats: np.ndarray, experts: int) -> np.ndarray:
    """Returns the choices per expert in summed statistics [M * (6 + 2 E)]: [M, E]."""
    first = len(SCALARS)
    return by_layer(stats, experts)[:, first : first + experts]


def recorded(choices: np.ndarray, layers: int, each: int) -> np.ndarray:
    """Returns recorded choices as a step hands them out, [A, N * M * K] of A micro-batches, as int32 [A, M, N, K]."""
    return choices.reshape(len(choices), -1, layers, each).transpose(0, 2, 1, 3).astype(np.int32)


def max_violation(loads: np.ndarray) -> np.ndarray:
    """Returns MaxVio, the largest load / the mean load - 1 (arXiv 2408.15664, eq. 4): [M, E] -> [M]."""
    return loads.max(-1) / np.maximum(loads.mean(-1), 1e-9) - 1.0


def metrics(stats: np.ndarray, experts: int) -> dict[str, np.ndarray]:
    """Returns the metrics of M layers by name, of statistics that were summed over groups, devices and batches.

    Args:
        stats: [M * (6 + 2 E)].
        experts: E.

    Returns:
        load [M, E]: choices per expert before dropping. importance [M, E]: gate mass per expert. dropped [M]: share of
        the choices that got no slot. entropy [M]: of the router, nats. max_violation [M]. z [M]: mean squared
        log-partition.
    """
    rows = by_layer(stats, experts)
    if not len(rows):
        return {}
    loads, mass = rows[:, len(SCALARS) :].reshape(len(rows), 2, -1).transpose(1, 0, 2)  # [M, E] each
    choices, tokens = loads.sum(1), np.maximum(rows[:, TOKENS], 1.0)
    return {
        "load": loads,
        "importance": mass,
        "dropped": (choices - rows[:, NUM_KEPT]) / np.maximum(choices, 1.0),
        "entropy": rows[:, ENTROPY] / tokens,
        "max_violation": max_violation(loads),
        "z": rows[:, Z] / tokens,
    }


def loss_metrics(stats: np.ndarray, experts: int) -> tuple[float, float]:
    """Returns (balance loss, z-loss), unweighted means over the M layers; 0 where there is none."""
    rows = by_layer(stats, experts)
    if not len(rows):
        return 0.0, 0.0
    means = rows[:, : Z + 1] / np.maximum(rows[:, TOKENS : TOKENS + 1], 1.0)  # [M, 2]
    return float(means[:, BALANCE].mean()), float(means[:, Z].mean())


def bias_step(load: np.ndarray, rate: float) -> np.ndarray:
    """Returns what a balancing bias moves by after a step (arXiv 2408.15664, algorithm 1): load [E] -> [E] float32."""
    load = np.asarray(load, np.float32)
    return np.float32(rate) * np.sign(load.mean() - load)
