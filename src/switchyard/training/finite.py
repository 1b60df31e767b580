"""Checks that figures are finite: what is not is never applied and never called a result."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from switchyard.checkpoint.finite import REMEDY
from switchyard.errors import UserError


def check_step(step: int, loss: float, figures: Mapping[str, Any], kept: Callable[[], str]) -> None:
    """Ends the run after a step whose loss or gradient norm is not finite, unless the loss scale can still fall.

    Args:
        step: number of the step, from 1.
        loss: its loss.
        figures: what TrainStep returned.
        kept: says which checkpoint is good.

    Raises:
        UserError: names the step, the figure and the checkpoint.
    """
    what = fault_of({**figures, "loss": loss})
    if what is None:
        return
    refused = "" if math.isfinite(figures["gradient_norm"]) else ", which was not applied"
    raise UserError(f"train: the {what} at step {step}{refused}; {kept()}; {REMEDY}")


def fault_of(figures: Mapping[str, Any]) -> str | None:
    """Returns which of a step's loss and gradient norm is not finite; None where both are, or the loss scale can fall.

    Args:
        figures: what TrainStep returned.
    """
    loss, norm = figures["loss"], figures["gradient_norm"]
    if not math.isfinite(norm) and figures["loss_scale"] > 1.0:
        return None  # refused, and tried again with half the scale
    if not math.isfinite(loss):
        return f"loss is {loss}"
    return None if math.isfinite(norm) else f"gradient norm is {norm}"


def check_evaluation(figures: Mapping[str, Any], what: str, remedy: str) -> None:
    """Refuses an evaluation with a figure that is not finite (UserError names it).

    Args:
        figures: of `Evaluation.to_dict`.
        what: was evaluated.
        remedy: the end of the message.
    """
    for name, value in _numbers("", figures):
        if not math.isfinite(value):
            raise UserError(f"evaluation: {name} is {value} for {what}; {remedy}")


def _numbers(name: str, value: Any) -> Iterable[tuple[str, float]]:
    """Yields every float in nested dicts and lists, with its place."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(f"{name}.{key}" if name else str(key), part)
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _numbers(f"{name}[{index}]", part)
    elif isinstance(value, float):
        yield name, value
