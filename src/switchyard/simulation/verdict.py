"""Decides whether an emulated cluster and one device agree, and why a parameter may still differ.

AdamW divides a gradient by its own size, so a gradient near zero, whose sign is rounding, moves a parameter by up to
twice the learning rate. Therefore parameters alone do not decide. Every step begins from the state of one device, in
shards, and is judged by itself:

    loss        differs by at most TOLERANCE, relative to its size (at least 1)
    norm        of the gradients: by at most GRADIENTS, relative to its size
    gradients   read off both moments: by at most GRADIENTS, relative to the largest entry of the tensor, or to NOISE of
                the largest entry of all: an error of 3e-7 of that is float32's own
    parameters  are what AdamW makes of the own moments, and differ by at most TOLERANCE, or else are `explained`:
                their gradients are equal by the rule above, and AdamW alone has set them apart
    the rest    (bias corrections) by at most TOLERANCE

Whatever breaks one of these makes the verdict DIFFERENT. A sum that is missing, a factor or a wrong shard changes
gradients by their own size, a thousand times more than what is allowed.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from switchyard.config import OptimizerConfig

Arrays = dict[str, np.ndarray]
TOLERANCE = 1e-5  # of losses, relative; of parameters, absolute
GRADIENTS = 3e-4  # of gradients and their norm, relative
NOISE = 1e-3  # of the largest gradient: smaller tensors are compared as if they were of this size
ROUNDING = 4 * 6e-8  # of what is kept in float32
FIRST, SECOND = "moment1.", "moment2."


@dataclass(frozen=True)
class Comparison:
    """Holds the differences between a cluster and one device.

    Attributes:
        losses: of each step, (one device, first rank).
        differences: parameter or moment -> (largest absolute difference over all ranks, how far it moved).
        met: (kind, ranks) -> collectives of a step.
        norms: of each step's gradients, (one device, the rank that is farthest).
        gradients: parameter -> largest difference of its gradient, relative to its size.
        explained: parameter -> entries that moved otherwise for gradients near zero.
        wrong: parameter -> how far it is from what AdamW makes of its own moments, where that is too far.
        strayed: choices of experts that fell otherwise, in all steps.
        smooth: GELU was compared in the place of ReLU, see `emulate`.
    """

    losses: list[tuple[float, float]]
    differences: dict[str, tuple[float, float]]
    met: Counter
    norms: list[tuple[float, float]] = field(default_factory=list)
    gradients: dict[str, float] = field(default_factory=dict)
    explained: dict[str, int] = field(default_factory=dict)
    wrong: dict[str, float] = field(default_factory=dict)
    strayed: int = 0
    smooth: bool = False

    @property
    def largest(self) -> float:
        """Returns the largest difference of losses and of parameters that is not explained; moments have other
        units."""
        apart = [abs(one - cluster) for one, cluster in self.losses]
        return worst(apart + [far for name, (far, _) in self.differences.items() if self._counts(name)])

    def _counts(self, name: str) -> bool:
        return not name.startswith((FIRST, SECOND)) and name not in self.explained

    @property
    def losses_agree(self) -> bool:
        """Returns whether the loss of every step agrees."""
        return not self._of_losses()

    def _of_losses(self) -> list[str]:
        return [
            f"loss of step {step}: {cluster:.8f}, one device {one:.8f}"
            for step, (one, cluster) in enumerate(self.losses, 1)
            if not abs(one - cluster) <= TOLERANCE * max(1.0, abs(one))
        ]

    @property
    def reasons(self) -> list[str]:
        """Returns one line for each difference; empty where all is equal."""
        lines = self._of_losses()
        lines += [
            f"norm of the gradients of step {step}: {cluster:.6g}, one device {one:.6g}"
            for step, (one, cluster) in enumerate(self.norms, 1)
            if not abs(one - cluster) <= GRADIENTS * abs(one)
        ]
        for name, apart in self.gradients.items():
            if not apart <= GRADIENTS:
                lines.append(f"gradient of {name}: {apart:.2e} of its size apart, allowed {GRADIENTS:g}")
        lines += [f"{name}: {far:.2e} from what AdamW makes of its moments" for name, far in self.wrong.items()]
        for name, (far, _) in self.differences.items():
            if self._counts(name) and name not in self.wrong and not far <= TOLERANCE:
                lines.append(f"{name}: {far:.2e} apart, allowed {TOLERANCE:g}")
        return lines

    @property
    def equal(self) -> bool:
        """Returns whether the two agree by the rule."""
        return not self.reasons


def worst(values: Iterable[float]) -> float:
    """Returns the largest value, NaN above all; 0 of none."""
    return max(values, key=lambda value: np.inf if np.isnan(value) else value, default=0.0)


class Judge:
    """Judges steps one after the other.

    Args:
        optimizer: betas, eps, decay.
        shard: (name, full array, local shape, rank) -> the shard that the rank should hold.
    """

    def __init__(self, optimizer: OptimizerConfig, shard: Callable):
        self.optimizer, self.shard = optimizer, shard
        self.differences: dict[str, float] = {}
        self.gradients: dict[str, float] = {}
        self.explained: Counter = Counter()
        self.wrong: dict[str, float] = {}

    def judge(self, ranks: list[Arrays], before: Arrays, after: Arrays, rate: float) -> None:
        """Judges one step: the parameters of the ranks after it, and the full state of one device before and after
        it."""
        sizes, beta1 = {}, self.optimizer.beta1  # of gradients: the largest entry, or that of the moment it updates
        for moment in (name for name in after if name.startswith(FIRST)):
            gradient = (after[moment] - beta1 * before[moment]) / (1 - beta1)
            sizes[moment.removeprefix(FIRST)] = float(max(np.abs(gradient).max(), np.abs(after[moment]).max()))
        floor = NOISE * max(sizes.values(), default=0.0)
        for rank, own in enumerate(ranks):
            for name in sorted(own):
                end = self.shard(name, after[name], own[name].shape, rank)
                self._note(self.differences, name, float(np.abs(own[name] - end).max(initial=0.0)))
            for name, size in sizes.items():
                if name in own:
                    self._judge_parameter(name, own, (before, after), rank, max(size, floor), rate)

    def _judge_parameter(self, name: str, own: Arrays, states: tuple, rank: int, size: float, rate: float) -> None:
        """Judges the gradient by the moments, and the parameter by AdamW of these moments."""
        optimizer, (before, after) = self.optimizer, states
        mean, square = FIRST + name, SECOND + name
        if mean not in own or square not in own:
            return
        first, second = (
            _beyond_rounding(own[moment], self.shard(moment, after[moment], own[moment].shape, rank)) / (1 - beta)
            for moment, beta in ((mean, optimizer.beta1), (square, optimizer.beta2))  # of g and of g^2
        )
        self._note(self.gradients, name, worst((_relative(first, size), _relative(second, 2 * size**2))))
        start = self.shard(name, before[name], own[name].shape, rank)
        end = self.shard(name, after[name], own[name].shape, rank)
        decay = optimizer.weight_decay if start.ndim >= 2 else 0.0
        first_moment = own[mean].astype(np.float64) / float(after["correction1"])
        root = np.sqrt(own[square].astype(np.float64) / float(after["correction2"]))
        made = start * (1 - rate * decay) - rate * first_moment / (
            root + optimizer.eps
        )  # AdamW as nn.adamw, in float64
        far = np.abs(own[name] - made)
        if not (far <= 1e-3 * rate + 1e-6 * np.abs(start) + 1e-9).all():
            self._note(self.wrong, name, float(far.max()))
        odd = int((~(np.abs(own[name] - end) <= TOLERANCE)).sum())
        if odd:
            self.explained[name] = max(self.explained[name], odd)

    @staticmethod
    def _note(where: dict, name: str, value: float) -> None:
        where[name] = worst((where.get(name, 0.0), value))

    def found(self, losses, norms, moved: dict[str, float], met: Counter, strayed: int) -> Comparison:
        """Returns the comparison; a parameter is not explained if its gradient differs, or if AdamW did not make it."""
        explained = {
            name: count
            for name, count in self.explained.items()
            if self.gradients[name] <= GRADIENTS and name not in self.wrong
        }
        differences = {name: (far, moved[name]) for name, far in sorted(self.differences.items())}
        return Comparison(losses, differences, met, norms, self.gradients, explained, self.wrong, strayed)


def _relative(difference: float, size: float) -> float:
    """Returns a difference divided by a size; where the size is 0, no difference is allowed."""
    return difference / size if size else np.inf if difference else 0.0


def _beyond_rounding(own: np.ndarray, end: np.ndarray) -> float:
    """Returns the largest difference that float32 does not account for."""
    return float(np.maximum(np.abs(own - end) - ROUNDING * np.abs(end), 0.0).max(initial=0.0))  # NaN stays NaN
