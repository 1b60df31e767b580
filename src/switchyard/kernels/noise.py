"""Randomness is an input: the host draws it by (seed, step), so that a resumed run repeats it on any device."""


class NoiseSlices:
    """Hands out the slices of the noise tensor while a model is built; `count` is how many one training pass reads."""

    def __init__(self):
        self.count = 0

    def take(self, used: bool) -> int:
        """Index of a slice of one's own, or 0 for a reader that will not read."""
        if not used:
            return 0
        self.count += 1
        return self.count - 1
