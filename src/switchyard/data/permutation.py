"""Permutes 0 .. n - 1 by a key in constant memory: a Feistel network (Luby and Rackoff, 1988) with cycle walking (Black
and Rogaway, 2002).

The place of each number is computed from the key, so an epoch of any size is shuffled without an array of its windows.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 8
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of SplitMix64 (Steele et al., 2014)
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


class Permutation:
    """Maps places 0 .. count - 1 one to one to numbers 0 .. count - 1.

    Args:
        count: of numbers, 1 or more.
        key: integers of 0 or more; equal keys give equal permutations.

    Examples:
        >>> permuted = Permutation(5, (1, 2))
        >>> sorted(permuted(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, count: int, key: Sequence[int]):
        if count < 1:
            raise ValueError(f"count {count}; at least 1")
        bits = max(2, (count - 1).bit_length())  # so that at most every second number is outside
        self.count, self._low = count, np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << bits - bits // 2) - 1)
        self._keys = np.random.SeedSequence(list(key)).generate_state(ROUNDS, np.uint64)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Returns the numbers [B] int64 at places [B]."""
        numbers = self._network(np.asarray(places).astype(np.uint64))
        while (outside := numbers >= np.uint64(self.count)).any():  # the cycle of a place inside leads back inside
            numbers[outside] = self._network(numbers[outside])
        return numbers.astype(np.int64)

    def _network(self, numbers: np.ndarray) -> np.ndarray:
        """Permutes all numbers of `bits` bits: each round changes one half by a function of the other half."""
        low, high = numbers & self._low_mask, numbers >> self._low
        for index, key in enumerate(self._keys):
            if index % 2:
                low = low ^ (_mixed(high, key) & self._low_mask)
            else:
                high = high ^ (_mixed(low, key) & self._high_mask)
        return (high << self._low) | low


def _mixed(numbers: np.ndarray, key: np.uint64) -> np.ndarray:
    """Returns 64 bits that depend on all bits of numbers [B] and of the key."""
    mixed = numbers + key  # modulo 2^64
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS):
        mixed = (mixed ^ (mixed >> shift)) * multiplier
    return mixed ^ (mixed >> SHIFTS[2])
