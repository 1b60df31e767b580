"""How much room experts have, and how many choices find none. No MindSpore in here: the planner asks it too.

Legend: G groups, N rows of a group, E experts, K choices of a row, C slots of an expert in a group.
"""

import math

import numpy as np

from switchyard.config import Config
from switchyard.errors import UserError

EXACT_FLOAT = 2**24  # float32 holds every integer up to here
LARGEST_KEY = 2**31  # int32 sort keys must stay below


def capacity(rows: int, experts: int, choices: int, factor: float | None, least: int = 1) -> int:
    """Returns the slots of one expert in one group: ceil(N * K * factor / E) (GShard, arXiv 2006.16668).

    Never below `least`, and never above N, since a row goes to an expert once. Without a factor N: room for all.
    """
    if factor is None:
        return rows
    share = round(rows * choices * factor / experts, 6)  # 100 * 1.1 / 10 is 11, not 11.000000000000002
    return min(rows, max(least, math.ceil(share)))


def slot_shape(config: Config) -> tuple[int, int, int, int]:
    """Returns the slots of training on all devices together: (G, E, C, D)."""
    moe, rows = config.moe, config.rows // config.groups
    slots = capacity(rows, moe.expert_num, moe.choices, moe.capacity_factor, moe.min_capacity)
    return config.groups, moe.expert_num, slots, config.model.hidden_size


def check_sort_keys(config: Config) -> None:
    """Refuses batches whose sort keys int32 cannot hold (UserError)."""
    rows = config.rows // config.groups
    key = (config.moe.expert_num + 1) * rows * config.moe.choices
    if config.moe_layers and key >= LARGEST_KEY:
        raise UserError(
            f"data.batch_size: {config.data.batch_size}; (experts + 1) * rows of a group * choices is {key}, "
            f"must be below {LARGEST_KEY}: lower it and raise train.gradient_accumulation_steps, or raise moe.groups"
        )


def buffer_slots(config: Config) -> int:
    """Slots from one device to another where `moe.dispatch` is dropless_static: every row that may go, since a row goes
    to an expert once, and one zero row for each expert."""
    parallel, moe = config.parallel, config.moe
    own = moe.expert_num // parallel.expert_parallel
    return config.rows // parallel.data_parallel * min(moe.choices, own) + own


def zero_rows(config: Config, static: bool) -> int:
    """Rows of zeros that a device sends besides its choices, so that no expert goes without: one for each expert; where
    they stand among the choices, in whole rows of K choices."""
    moe = config.moe
    if static and config.parallel.expert_parallel > 1:
        return moe.expert_num
    return math.ceil(moe.expert_num / moe.choices) * moe.choices


def check_sorted_rows(config: Config, static: bool) -> None:
    """Refuses dropless batches of which a device would sort more rows than float32 counts exactly (UserError).

    `static`: by buffers.
    """
    parallel, moe = config.parallel, config.moe
    rows = config.rows // parallel.data_parallel * moe.choices + zero_rows(config, static)
    if static:
        rows = max(rows, parallel.expert_parallel * buffer_slots(config))
    if rows >= EXACT_FLOAT:
        raise UserError(
            f"data.batch_size: {config.data.batch_size}; {rows} rows of a device are sorted at once, must be below "
            f"{EXACT_FLOAT}: lower it and raise train.gradient_accumulation_steps"
        )


def check_dropless(config: Config) -> None:
    """Refuses batches that training, or evaluation, which drops nothing where moe.eval_capacity_factor is null, cannot
    sort (UserError)."""
    moe = config.moe
    if config.moe_layers and (moe.dispatch != "capacity" or moe.eval_capacity_factor is None):
        check_sorted_rows(config, moe.dispatch != "dropless")


def dropped_share(config: Config, shares: np.ndarray | None = None) -> float:
    """Returns the expected share of the choices that get no slot in training, by the capacity law: 0 to 1.

    A row chooses expert e with probability K * shares[e], whatever other rows do, so an expert is chosen
    X ~ Binomial(N, K * share) times in a group and drops (X - C)^+ of them; by linearity the share is
    sum over e of E[(X - C)^+] / (N * K). A router that has learned its data is less even than this within a group.

    Args:
        config: capacities, groups, experts.
        shares: [M, E] or [E], what part of all choices an expert gets; None: 1 / E, a balanced router.
    """
    if not config.moe_layers:
        return 0.0
    _, experts, slots, _ = slot_shape(config)
    rows, choices = config.rows // config.groups, config.moe.choices
    if shares is None:
        return float(experts * overflow(rows, np.array([choices / experts]), slots)[0] / (rows * choices))
    lost = overflow(rows, np.minimum(1.0, choices * shares.reshape(-1)), slots).sum()
    return float(lost / (shares.size // experts) / (rows * choices))


def overflow(rows: int, probabilities: np.ndarray, slots: int) -> np.ndarray:
    """Returns E[(X - slots)^+] of X ~ Binomial(rows, p) for each p [P]: [P]."""
    if slots >= rows:
        return np.zeros(len(probabilities))
    counts = np.arange(slots + 1, rows + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, rows + 1)))])  # log n! of each n
    ways = logs[rows] - logs[counts] - logs[rows - counts]
    found = []
    for p in probabilities:
        if p <= 0.0 or p >= 1.0:
            found.append(max(0.0, rows * p - slots))
            continue
        mass = np.exp(ways + counts * math.log(p) + (rows - counts) * math.log1p(-p))
        found.append(((counts - slots) * mass).sum())
    return np.array(found)


def dropped_of_record(config: Config, experts: np.ndarray) -> float:
    """Share of recorded choices [.., N of all groups, K] that these capacities and groups would have dropped.

    Choices below 0 (unset) and E (a padded row) count nowhere.
    """
    groups, count, slots, _ = slot_shape(config)
    choices = experts.reshape(-1, experts.shape[-2] // groups * experts.shape[-1]).astype(np.int64)  # [passes * G, N K]
    real = (choices >= 0) & (choices < count)
    place = np.arange(len(choices))[:, None] * count + choices
    load = np.bincount(place[real], minlength=len(choices) * count)
    return float(np.maximum(load - slots, 0).sum() / max(1, load.sum()))
