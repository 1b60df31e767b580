"""Computes the learning rate of each step."""

import math

from switchyard.config import Config


def learning_rate(config: Config, step: int) -> float:
    """Returns the learning rate of update `step`, counted from 1.

    A line from 0 (at step 0) to the peak at `warmup_steps`; then the curve, which ends with `lr_end` at `total_steps`
    (train.steps where null) and stays there. `constant` keeps the peak learning rate.
    """
    schedule = config.schedule
    peak, end, warmup = schedule.learning_rate, schedule.lr_end, schedule.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if schedule.type == "constant":
        return peak
    total = schedule.total_steps or config.train.steps
    if step >= total:
        return end
    progress = (step - warmup) / (total - warmup)
    if schedule.type == "linear":
        return peak + (end - peak) * progress
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))
