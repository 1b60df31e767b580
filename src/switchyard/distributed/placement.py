"""Computes what a rank holds: its coordinates, its groups, the shard of every parameter. No MindSpore in here.

Ranks are numbered stage by stage; within a stage outer data shards, expert shards, then model shards, the fastest:

    rank = ((stage * outer + o) * expert_parallel + e) * model_parallel + t,   data_parallel = outer * expert_parallel

so with model_parallel 1 the ranks that exchange rows with each other are neighbours.
"""

from bisect import bisect_right
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from switchyard.config import ParallelConfig
from switchyard.errors import UserError

EXPERT, MODEL = "expert", "model"
Placement = tuple[str | None, ...]  # for each axis of a parameter: what shards it, or None
# The layout of each parameter, by the end of its name. What is not listed is full on every rank of its stage. Matrices
# of attention and feed-forward are sharded along heads and hidden width, the first along its columns and the second
# along its rows, so that one sum joins them (Megatron-LM, arXiv 1909.08053, section 3).
MATRICES: dict[str, Placement] = {
    "qkv.weight": (None, MODEL),
    "qkv.bias": (MODEL,),
    "q.weight": (None, MODEL),
    "kv.weight": (None, MODEL),
    "attention.out.weight": (MODEL, None),
    "cross_attention.out.weight": (MODEL, None),
    "relative_bias": (None, MODEL),
}
STACKED: dict[str, Placement] = {"w_in": (None, MODEL), "w_gate": (None, MODEL), "w_out": (MODEL, None)}  # of [E, ., .]


class Coordinates(NamedTuple):
    """Locates a rank: its stage, outer data shard, expert shard and model shard, each from 0."""

    stage: int
    outer: int
    expert: int
    model: int


@dataclass(frozen=True)
class ParallelDims:
    """Holds into how many shards each axis is divided; the words are those of the section `parallel`."""

    data_parallel: int = 1
    expert_parallel: int = 1
    model_parallel: int = 1
    pipeline_stage: int = 1
    optimizer_shard: int = 0

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "ParallelDims":
        """Returns the degrees of a configuration."""
        return cls(**{name: getattr(parallel, name) for name in cls.__dataclass_fields__})

    @property
    def outer(self) -> int:
        """Returns the number of data shards that hold the same experts."""
        return self.data_parallel // self.expert_parallel

    @property
    def stage_devices(self) -> int:
        """Returns the number of devices of one pipeline stage."""
        return self.data_parallel * self.model_parallel

    @property
    def devices(self) -> int:
        """Returns the number of all devices."""
        return self.pipeline_stage * self.stage_devices

    def coordinates(self, rank: int) -> Coordinates:
        """Returns where a rank stands (UserError: there is no such rank)."""
        if not 0 <= rank < self.devices:
            raise UserError(f"rank: {rank}; these degrees have ranks 0 to {self.devices - 1}")
        rest, model = divmod(rank, self.model_parallel)
        rest, expert = divmod(rest, self.expert_parallel)
        stage, outer = divmod(rest, self.outer)
        return Coordinates(stage, outer, expert, model)

    def data_shard(self, rank: int) -> int:
        """Returns which part of the batch a rank reads, from 0 below data_parallel."""
        place = self.coordinates(rank)
        return place.outer * self.expert_parallel + place.expert

    def along(self, rank: int, *axes: str) -> tuple[int, ...]:
        """Returns the ranks that differ from this one in the named coordinates only, in order.

        Gradients of experts are summed along "outer", all others along "outer" and "expert"; rows go on from one stage
        to the next along "stage".
        """
        places, sizes = [self.coordinates(rank)], {"outer": self.outer, "expert": self.expert_parallel}
        sizes |= {"model": self.model_parallel, "stage": self.pipeline_stage}
        for axis in axes:
            places = [place._replace(**{axis: index}) for place in places for index in range(sizes[axis])]
        ranks = []
        for place in places:
            data = (place.stage * self.outer + place.outer) * self.expert_parallel + place.expert
            ranks.append(data * self.model_parallel + place.model)
        return tuple(sorted(ranks))

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks that hold the shards of one set of experts: rows go to and fro among them (AlltoAll)."""
        return self.along(rank, "expert")

    def model_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks that hold the shards of one network (tensor parallel)."""
        return self.along(rank, "model")

    def replicas(self, axes: Placement, rank: int) -> tuple[int, ...]:
        """Returns the ranks that hold the same shard of a parameter placed so."""
        other = ["outer"] + ([] if EXPERT in axes else ["expert"]) + ([] if MODEL in axes else ["model"])
        return self.along(rank, *other)

    def replica(self, axes: Placement, rank: int) -> tuple[int, int]:
        """Returns (which of `replicas` a rank is, from 0; how many there are), without listing them."""
        place = self.coordinates(rank)
        index, count = place.outer, self.outer
        if EXPERT not in axes:
            index, count = index * self.expert_parallel + place.expert, count * self.expert_parallel
        if MODEL not in axes:
            index, count = index * self.model_parallel + place.model, count * self.model_parallel
        return index, count


def axes_of(name: str, dimensions: int) -> Placement:
    """Returns what shards each axis of a parameter, by its name (also of its moments: `moment1.NAME`).

    This is the only place that knows. Every Cell asks it in `shard(mesh)`; checkpoint and planner ask `placement`.
    """
    parts = name.split(".")
    if len(parts) > 1 and parts[-2].startswith("lora"):  # adapters, which are thin: of experts, by experts
        return (EXPERT if "experts" in parts and dimensions == 3 else None, *(None,) * (dimensions - 1))
    if parts[-1] in STACKED and dimensions == 3:
        return (EXPERT if "experts" in parts else None, *STACKED[parts[-1]])
    found = (axes for end, axes in MATRICES.items() if f".{name}".endswith(f".{end}"))
    return next(found, (None,) * dimensions)


def placement(name: str, shape: tuple[int, ...], degrees: ParallelDims) -> Placement:
    """Returns `axes_of` a parameter of that shape.

    Raises:
        UserError: an axis that is to be sharded does not divide by its degree.
    """
    axes = axes_of(name, len(shape))
    for size, axis in zip(shape, axes):
        if axis is not None and size % degree_of(axis, degrees):
            raise UserError(f"{name}: {tuple(shape)}; {axis}_parallel ({degree_of(axis, degrees)}) must divide {size}")
    return axes


def degree_of(axis: str | None, degrees: ParallelDims) -> int:
    """Returns into how many shards an axis of a placement is divided."""
    return {EXPERT: degrees.expert_parallel, MODEL: degrees.model_parallel, None: 1}[axis]


def shard_slices(shape: tuple[int, ...], axes: Placement, degrees: ParallelDims, rank: int) -> tuple[slice, ...]:
    """Returns the part of an array of that shape that a rank holds, before any shard of the optimizer."""
    place = degrees.coordinates(rank)
    where = {EXPERT: place.expert, MODEL: place.model, None: 0}
    parts = []
    for size, axis in zip(shape, axes):
        length = size // degree_of(axis, degrees)
        parts.append(slice(where[axis] * length, (where[axis] + 1) * length))
    return tuple(parts)


def optimizer_cut(shape: tuple[int, ...], axes: Placement, degrees: ParallelDims) -> tuple[int, int]:
    """Returns (along which axis, into how many parts) ZeRO divides a rank's shard among its replicas.

    The axis is 0, where the compiler cuts. Of stacked matrices [E, ., .] it is 1 where axis 0 does not divide, as with
    one expert on a device and of a dense feed-forward [1, D, F]: there `nn.cast.MatrixCast` gathers the parts. One part
    means that the shard does not divide.
    """
    if degrees.optimizer_shard == 0 or not shape:
        return 0, 1
    _, count = degrees.replica(axes, 0)
    for axis in (0, 1) if len(shape) == 3 and MODEL in axes else (0,):
        if (shape[axis] // degree_of(axes[axis], degrees)) % count == 0:
            return axis, count
    return 0, 1


def optimizer_shards(shape: tuple[int, ...], axes: Placement, degrees: ParallelDims) -> int:
    """Returns into how many parts ZeRO divides a rank's shard: its replicas, or 1 where they cannot."""
    return optimizer_cut(shape, axes, degrees)[1]


def kept_slices(shape: tuple[int, ...], axes: Placement, degrees: ParallelDims, rank: int) -> tuple[slice, ...]:
    """Returns the part of an array of that shape that a rank keeps between steps: of `shard_slices` ZeRO's part."""
    parts = list(shard_slices(shape, axes, degrees, rank))
    axis, count = optimizer_cut(shape, axes, degrees)
    if count > 1:
        index, _ = degrees.replica(axes, rank)
        length = (parts[axis].stop - parts[axis].start) // count
        start = parts[axis].start + index * length
        parts[axis] = slice(start, start + length)
    return tuple(parts)


def layers_of_stages(layers: int, stages: int) -> list[int]:
    """Returns the number of layers of each stage: equal, or one more on some.

    The last stage, which has the head and the loss, never has one more; the first, which has the embedding and keeps
    the activations of most micro-batches, has one more only where all others but the last have.
    """
    each, more = divmod(layers, stages)
    longer = [*range(1, stages - 1), 0][:more]
    return [each + (stage in longer) for stage in range(stages)]


@cache
def first_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Returns the first layer of each stage."""
    counts = layers_of_stages(layers, stages)
    return tuple(sum(counts[:stage]) for stage in range(stages))


def stages_of(name: str, layers: int, degrees: ParallelDims) -> tuple[int, ...]:
    """Returns the stages that hold a parameter: runs of layers, see `layers_of_stages`, embedding first, final norm and
    head last.

    The table of a tied head is on the first stage and on the last; whether a table is tied is not seen in its name, so
    both are said for every `embedding.table`.
    """
    stages, parts = degrees.pipeline_stage, name.split(".")
    if stages == 1:
        return (0,)
    if "layers" in parts:
        index = int(parts[parts.index("layers") + 1])
        return (bisect_right(first_layers(layers, stages), index) - 1,)
    if "position" in parts:
        return (0,)
    if "embedding" in parts:
        return (0,) if stages == 1 else (0, stages - 1)
    return (stages - 1,)


def is_updater(name: str, degrees: ParallelDims, rank: int, layers: int) -> bool:
    """Returns whether a rank's stage updates a tensor of the model or the optimizer; counters are of all stages."""
    return "." not in name or degrees.coordinates(rank).stage == stages_of(name, layers, degrees)[0]


def full_shape(name: str, shape: tuple[int, ...], degrees: ParallelDims) -> tuple[int, ...]:
    """Returns the shape of the full tensor of which a rank holds a shard of `shape`, without ZeRO's."""
    return tuple(size * degree_of(axis, degrees) for size, axis in zip(shape, placement(name, shape, ParallelDims())))
