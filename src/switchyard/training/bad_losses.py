"""Decides what a run does after a bad loss: one that is not finite, or a spike above the losses before it.

A spike is a loss above train.spike_factor times the median of the last train.spike_window good losses; until so many
are known no finite loss is bad. The losses and the number of bad ones are part of a checkpoint's state, so a resumed
run decides as the uninterrupted one.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.training.finite import fault_of

LOSSES, COUNT = "losses", "bad_losses"  # in a state


class BadLosses:
    """Knows the last good losses of a run and how many were bad.

    Args:
        config: `train.on_bad_loss`, `train.spike_factor`, `train.spike_window` and `train.max_bad_losses` are read.
        state: of the checkpoint that the run goes on from; {} for a new run.

    Attributes:
        count: bad losses that the run has gone on after.

    Examples:
        >>> from switchyard.config import build
        >>> bad = BadLosses(build({"train": {"spike_factor": 2.0, "spike_window": 3}}))
        >>> for loss in (3.0, 2.0, 2.5):
        ...     bad.note(loss)
        >>> bad.limit
        5.0
        >>> bad.fault({"loss": 5.5, "gradient_norm": 1.0, "loss_scale": 1.0})
        'loss is 5.5000, more than 2 times the median 2.5000 of the last 3 losses'
    """

    def __init__(self, config: Config, state: Mapping[str, Any] | None = None):
        train, state = config.train, state or {}
        self.rule, self._factor, self._most = train.on_bad_loss, train.spike_factor, train.max_bad_losses
        self._losses: deque[float] = deque(_numbers(state.get(LOSSES, ())), maxlen=train.spike_window)
        count = state.get(COUNT, 0)
        self.count = count if isinstance(count, int) else 0

    @property
    def limit(self) -> float:
        """Returns the largest loss that is good, a float32 number; infinity where every finite loss is."""
        if self._factor is None or len(self._losses) < self._losses.maxlen:
            return math.inf
        return float(np.float32(self._factor * statistics.median(self._losses)))

    def note(self, loss: float) -> None:
        """Takes a good loss."""
        if self._factor is not None:
            self._losses.append(loss)

    def fault(self, figures: Mapping[str, Any]) -> str | None:
        """Returns what is bad in the figures of a step, None where nothing is; see `finite.fault_of`."""
        found, loss, limit = fault_of(figures), figures["loss"], self.limit
        if found or not loss > limit:
            return found
        median, number = statistics.median(self._losses), len(self._losses)
        what = f"more than {self._factor:g} times the median {median:.4f} of the last {number} losses"
        return f"loss is {loss:.4f}, {what}"

    def permit(self, step: int, fault: str, kept: str) -> None:
        """Counts a bad loss that the run is to go on after.

        Raises:
            UserError: train.max_bad_losses were counted before it.
        """
        if self.count >= self._most:
            raise UserError(
                f"train.max_bad_losses: {self._most}; the {fault} at step {step}, after as many bad losses before it; "
                f"{kept}; reduce schedule.learning_rate, or raise train.max_bad_losses and continue with --resume"
            )
        self.count += 1

    def restart(self, state: Mapping[str, Any]) -> None:
        """Forgets the losses after a checkpoint to which the run has gone back; the count stays."""
        self._losses.clear()
        self._losses.extend(_numbers(state.get(LOSSES, ())))

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds of it; {} in a run that has no such rules."""
        found: dict[str, Any] = {}
        if self._factor is not None:
            found[LOSSES] = list(self._losses)
        if self.rule != "stop":
            found[COUNT] = self.count
        return found


def _numbers(values: Any) -> list[float]:
    """Returns the finite numbers of a list that a file holds; [] where it holds something else."""
    if not isinstance(values, (list, tuple)):
        return []
    return [float(one) for one in values if isinstance(one, (int, float)) and math.isfinite(one)]
