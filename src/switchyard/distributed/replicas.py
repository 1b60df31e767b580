"""Checks replicas: what several devices hold alike must be bit-equal on all of them.

Data-parallel training is right only while every replica makes the same update; a lost or doubled sum goes on without a
word. So now and then each rank takes two numbers of every tensor that it holds, all ranks see those of all, and a run
whose replicas differ stops.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from switchyard.distributed.placement import ParallelDims, optimizer_shards, placement
from switchyard.distributed.processes import Processes
from switchyard.errors import UserError


def checksum(array: np.ndarray) -> tuple[int, int]:
    """Returns (sum of the bytes' 32-bit words modulo 2^64, their exclusive or), which differs where one bit differs."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if raw.size % 4:
        raw = np.concatenate((raw, np.zeros(-raw.size % 4, np.uint8)))
    words = raw.view(np.uint32)
    return int(words.sum(dtype=np.uint64)), int(np.bitwise_xor.reduce(words)) if words.size else 0


def replica_groups(name: str, shape: tuple[int, ...], degrees: ParallelDims) -> Iterable[tuple[int, ...]]:
    """Yields each group of ranks that hold the same shard of a tensor; groups of one rank are left out.

    Args:
        name: of a parameter or of an optimizer's tensor.
        shape: of the full tensor.
    """
    axes, seen = placement(name, shape, degrees), set()
    for rank in range(degrees.devices):
        if rank in seen or optimizer_shards(shape, axes, degrees) > 1:
            continue
        group = degrees.replicas(axes, rank)
        seen.update(group)
        if len(group) > 1:
            yield group


def check_replicas(
    arrays: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    processes: Processes,
    step: int,
    kept: Callable[[], str],
) -> None:
    """Compares what the ranks hold; all of them call it at the same step and come to the same end.

    Args:
        arrays: name -> this rank's shard; every rank of a stage has the same names.
        shapes: name -> shape of the full tensor.
        processes: this one and the others.
        step: optimizer steps taken.
        kept: returns the newest good checkpoint in words, for the message.

    Raises:
        UserError: two ranks differ; names the tensor, the ranks and the step.
    """
    names = sorted(arrays)
    sums = np.array([checksum(arrays[name]) for name in names], np.uint64)  # [names, 2]
    gathered = processes.gather(sums)  # [ranks, names, 2]
    for index, name in enumerate(names):
        for group in replica_groups(name, shapes[name], processes.degrees):
            apart = odd_ones(group, gathered[list(group), index])
            if apart:
                raise UserError(
                    f"train.replica_check_every: '{name}' differs between ranks {listed(apart)} and ranks "
                    f"{listed([rank for rank in group if rank not in apart])} after step {step}, although "
                    f"replicas must be equal; {kept()}"
                )


def odd_ones(group: tuple[int, ...], sums: np.ndarray) -> list[int]:
    """Returns the ranks whose sums [ranks of the group, 2] differ from those of the majority, the first one among equal
    ones.
    """
    values, party, sizes = np.unique(sums, axis=0, return_inverse=True, return_counts=True)
    if len(values) == 1:
        return []
    party = party.reshape(-1)
    usual = next(one for one in party if sizes[one] == sizes.max())
    return [rank for rank, one in zip(group, party) if one != usual]


def listed(ranks: list[int]) -> str:
    """Renders ranks in a few words."""
    text = ", ".join(map(str, ranks[:8]))
    return f"{text}, ..." if len(ranks) > 8 else text
