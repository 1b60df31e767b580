"""Computes which rank holds and which rank writes each shard of every tensor of a checkpoint.

`switchyard.distributed.placement` says which axes are sharded, and ZeRO's further shards over the replicas of
a shard; here the one rank of those that hold the same shard that writes it is added.
"""

from switchyard.checkpoint.tensors import Box
from switchyard.config import Config
from switchyard.distributed.placement import (
    ParallelDims,
    full_shape,
    kept_slices,
    optimizer_shards,
    placement,
    stages_of,
)
from switchyard.errors import UserError

Shape = tuple[int, ...]


def shard_of(name: str, shape: Shape, degrees: ParallelDims, rank: int, layers: int) -> Box | None:
    """Returns the part of a tensor that a rank holds.

    Args:
        name: of a parameter or of an optimizer's tensor.
        shape: of the full tensor.
        layers: model.num_layers.

    Returns:
        Start and stop for each axis; None where the rank's pipeline stage has no part in it.

    Raises:
        UserError: an axis that does not divide by its degree.
    """
    if degrees.coordinates(rank).stage not in _stages(name, layers, degrees):
        return None
    return kept_slices(shape, placement(name, shape, degrees), degrees, rank)


def is_writer(name: str, shape: Shape, degrees: ParallelDims, rank: int, layers: int) -> bool:
    """Returns whether a rank is the first of the ranks that hold its shard; arguments as in `shard_of`."""
    if degrees.coordinates(rank).stage != _stages(name, layers, degrees)[0]:
        return False
    axes = placement(name, shape, degrees)
    return optimizer_shards(shape, axes, degrees) > 1 or degrees.replica(axes, rank)[0] == 0


def full_shape_of(name: str, shape: Shape, degrees: ParallelDims) -> Shape:
    """Returns the full shape of a tensor of which a rank holds a shard of `shape`.

    Raises:
        UserError: with ZeRO, where it cannot be told from the shard.
    """
    if degrees.optimizer_shard and shape:
        raise UserError(
            f"parallel.optimizer_shard: {degrees.optimizer_shard}; the full shape of '{name}' is needed: ZeRO shards "
            "an axis only where the degree divides it"
        )
    return full_shape(name, shape, degrees)


def keep_groups(old: Config, new: Config) -> Config:
    """Returns `new` with the routing groups of `old`, if `new` gives no number and its degrees allow it.

    Each group has a capacity of its own, so with other groups other tokens are dropped. Where a micro-batch has become
    smaller, or larger, by the number of groups, they are the same groups in other micro-batches of the step.
    """
    named = new.moe.groups is not None or not new.moe_layers
    same = old.data.batch_size * new.groups == new.data.batch_size * old.groups
    if named or same or old.groups % new.parallel.data_parallel:
        return new
    return new.model_copy(update={"moe": new.moe.model_copy(update={"groups": old.groups})})


def _stages(name: str, layers: int, degrees: ParallelDims) -> tuple[int, ...]:
    """Stages that hold a tensor; counters of the optimizer, which belong to no parameter, are on all."""
    if "." not in name:
        return tuple(range(degrees.pipeline_stage))
    return stages_of(name, layers, degrees)
