"""Computes the costs of a layout per device: memory, bytes sent, and FLOPs. Nothing here imports MindSpore.

Parameters, optimizer state and exchanges are those of the graph that the compiler makes of `training.step`, to
the byte (tests/planner/test_costs.py); activations are an estimate.

Legend: N tokens and G groups of all devices together; n = N / data_parallel rows and g groups of a data shard; D width,
F hidden width, E experts, C slots, V vocabulary, X columns of the projection to queries, keys and values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from switchyard.config import Config
from switchyard.distributed.placement import EXPERT, MODEL, ParallelDims, placement
from switchyard.distributed.stages import stage_config, stage_exchanges
from switchyard.moe.dispatch.capacity import buffer_slots, check_dropless, check_sort_keys, slot_shape
from switchyard.moe.metrics import width
from switchyard.planner.held import IN_PRODUCT_TYPE, activation_bytes, gathered_bytes, micro_batches_of_call
from switchyard.planner.sizes import (
    FLOAT,
    is_cut_inside,
    mixed,
    parameters,
    product_bytes,
    projection,
    reads_again,
    router_state,
    seen_tokens,
    shard_sizes,
    worked_rows,
)
from switchyard.training.limits import refusals, refuse

SCALARS = 3  # of the optimizer: two bias corrections and the learning rate
SENT = ("Send", "Receive")


@dataclass(frozen=True)
class Exchange:
    """Describes collectives that are alike.

    Attributes:
        kind: AllReduce, AlltoAll, AlltoAllV, AllGather, ReduceScatter, Send, Receive.
        group: expert, replicas (of an expert shard), data, model or stage, see `ParallelDims`; of a pipeline also all
            devices, and pipeline, the devices at the same place in each stage.
        ranks: size of the group.
        bytes: of one of them, as `graph.Collective` counts: what goes in, of AllGather what comes out. Of AlltoAllV
            what a balanced router sends: the graph does not know.
        number: of them in a step.
    """

    kind: str
    group: str
    ranks: int
    bytes: int
    number: int = 1

    @property
    def sent(self) -> float:
        """Returns the bytes that leave a device in all: ring algorithms, in which AllReduce passes its data twice."""
        if self.kind in SENT:
            return float(self.number * self.bytes * (self.kind == "Send"))
        passes = 2 if self.kind == "AllReduce" else 1
        return self.number * self.bytes * passes * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Costs:
    """Holds the costs of one device and one step, in bytes, and in FLOPs of the matrix products.

    `gathered`: weights that ZeRO puts together, at their peak. `activations`: an estimate, see `activation_bytes`.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    exchanges: tuple[Exchange, ...]
    flops: float

    @property
    def memory(self) -> int:
        """Returns the total bytes held at once."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations

    @property
    def sent(self) -> float:
        """Returns the bytes that leave the device."""
        return sum(one.sent for one in self.exchanges)

    def exchanged(self, kind: str) -> int:
        """Returns the bytes of the collectives of a kind; AlltoAllV counts as AlltoAll."""
        return sum(one.bytes * one.number for one in self.exchanges if one.kind.removesuffix("V") == kind)


def costs(config: Config, vocab: int) -> Costs:
    """Returns the costs of a layout, of a pipeline those of the stage that holds most; vocab: entries V.

    Raises:
        UserError: the training step cannot be sharded so, or is not counted here.
    """
    return heaviest(stage_costs(config, vocab))


def heaviest(stages: list[Costs]) -> Costs:
    """Returns the costs of the stage with the most memory."""
    return max(stages, key=lambda cost: cost.memory)


def stage_costs(config: Config, vocab: int) -> list[Costs]:
    """Returns the costs of a device of each stage (UserError as in `costs`)."""
    refuse(refusals(config))
    for stack in config.stacks:
        check_sort_keys(stack)
        if config.devices > 1:
            check_dropless(stack)
    return [_costs(config, vocab, stage) for stage in range(config.parallel.pipeline_stage)]


def _costs(config, vocab, stage):
    degrees, shapes = ParallelDims.of(config.parallel), parameters(config, vocab, stage)
    sizes = {name: shard_sizes(name, shape, degrees) for name, shape in shapes.items()}  # (slice, of it with ZeRO)
    weights = FLOAT * sum(kept for _, kept in sizes.values())
    at_once = FLOAT * sum(  # gradients that a pipeline adds up over its micro-batches
        sizes[name][is_cut_inside(name, shape, degrees)] for name, shape in shapes.items()
    )
    several = config.train.gradient_accumulation_steps > 1
    half, freezes = config.model.compute_dtype == "float16", config.moe.router_freeze_step is not None
    # numbers of the optimizer that are no moments, see training.optimizer.OptimizerStep
    scalars = SCALARS + half + (freezes and bool(config.moe_layers)) + 2 * several
    summed = weights * several  # gradients of the calls before
    state = sum(shard_sizes(name, shape, degrees)[1] for name, shape in router_state(config, shapes).items())
    return Costs(
        weights=weights + FLOAT * state,
        gradients=summed + (weights if degrees.pipeline_stage == 1 else at_once),
        optimizer=2 * weights + scalars * FLOAT,
        gathered=gathered_bytes(config, sizes),
        activations=activation_bytes(config, vocab, shapes, stage),
        exchanges=tuple(exchanges(config, vocab, stage)),
        flops=flops(config, vocab, stage),
    )


def exchanges(config: Config, vocab: int, stage: int = 0) -> Iterator[Exchange]:
    """Yields the collectives of a step, forward, backward, clip and AdamW; for a pipeline, those of one stage."""
    calls = config.train.gradient_accumulation_steps
    if config.devices > 1:
        for one in _of_call(config, vocab, stage):
            yield replace(one, number=one.number * calls)


def _of_call(config, vocab, stage):
    """Yields the collectives of one call of the step's program."""
    degrees = ParallelDims.of(config.parallel)
    stages, micro = degrees.pipeline_stage, micro_batches_of_call(config)
    for name, shape in parameters(config, vocab, stage).items():
        many = micro if is_cut_inside(name, shape, degrees) else 1
        for one in _of_gradient(name, shape, config, degrees):
            yield replace(one, number=one.number * many)
    for one in _of_micro_batch(config, stage):
        yield replace(one, number=one.number * micro)
    if stages == 1:
        yield Exchange("AllReduce", "stage", degrees.devices, FLOAT)  # norm of the gradients
    else:  # and all figures
        yield Exchange("AllReduce", "all", degrees.devices, FLOAT * (1 + micro * _figures(config)))


def _figures(config):
    """Returns the number of figures of a micro-batch: the loss, the cross-entropy, and those of the layers."""
    return 2 + len(config.moe_layers) * width(config.moe.expert_num)


def _of_micro_batch(config, stage):
    """Yields the collectives of every micro-batch."""
    degrees, own, stages = ParallelDims.of(config.parallel), config, config.parallel.pipeline_stage
    if stages > 1:
        own = stage_config(config, stage)
    last, repeated = stage == stages - 1, int(config.parallel.recompute and stages > 1)
    for stack in own.stacks:
        if degrees.expert_parallel > 1 and stack.moe_layers:
            yield from _of_experts(stack, degrees, repeated)
        if degrees.model_parallel > 1:
            yield from _of_model_slices(stack, degrees, repeated, last)
    if config.model.type == "seq2seq" and degrees.model_parallel > 1:
        yield from _of_cross_attention(config, degrees)
    if degrees.data_parallel > 1 and last:
        counted = len(config.moe_layers) if config.model.type == "seq2seq" else 1  # layers with tokens of their own
        real = FLOAT * (1 + max(counted, 1))
        yield Exchange("AllReduce", "data", degrees.data_parallel, real)  # valid and real tokens
        # of a pipeline there are places for all, and one backward too
        many, passes = (micro_batches_of_call(config), 2) if stages > 1 else (1, 1)
        yield Exchange("AllReduce", "data", degrees.data_parallel, FLOAT * many * _figures(config), passes)
    groups = config.groups // degrees.data_parallel
    rows = config.rows // degrees.data_parallel * config.model.hidden_size
    rows //= degrees.model_parallel if config.parallel.sequence_parallel else 1
    for layers in stage_exchanges(config, stage):
        size = FLOAT * (rows if layers < 0 else groups * layers * width(config.moe.expert_num))
        for kind in SENT:  # forward one of them, backward the other
            yield Exchange(kind, "pipeline", stages, size)


def _of_gradient(name, shape, config, degrees):
    """Yields the sum of a gradient over the ranks with the same shard; with ZeRO also the gather of the shard before
    its use.
    """
    axes = placement(name, shape, degrees)
    ranks, (size, kept) = degrees.replica(axes, 0)[1], shard_sizes(name, shape, degrees)
    group = "replicas" if EXPERT in axes else "data" if MODEL in axes else "stage"
    if ranks == 1:
        return
    if kept == size:
        yield Exchange("AllReduce", group, ranks, FLOAT * size)
        return
    again = degrees.optimizer_shard == 3 and reads_again(config, name)
    if is_cut_inside(name, shape, degrees):
        again = config.parallel.recompute or degrees.optimizer_shard == 3
    wide = product_bytes(config) if name.endswith(IN_PRODUCT_TYPE) else FLOAT  # cast before they are gathered
    yield Exchange("AllGather", group, ranks, wide * size, 2 if again else 1)
    yield Exchange("ReduceScatter", group, ranks, FLOAT * size)


def _of_experts(config, degrees, repeated):
    """Yields the exchanges of rows with their experts, forward and backward."""
    moe, ranks, again, layers = config.moe, degrees.expert_parallel, int(config.parallel.recompute), config.moe_layers
    row = config.model.hidden_size * product_bytes(config)

    def send(kind, size, number):
        return Exchange(kind, "expert", ranks, size, number * len(layers))

    if moe.dispatch == "capacity":  # recompute: there once more; nothing backward reads the way back
        yield send("AlltoAll", FLOAT * math.prod(slot_shape(config)) // degrees.data_parallel, 4 + again + repeated)
        return
    yield send("AlltoAll", FLOAT * moe.expert_num, 1 + again)  # how many rows each expert gets
    if moe.dispatch == "dropless_static":
        yield send("AlltoAll", row * ranks * buffer_slots(config), 4 + 2 * again)
        return
    yield send("AlltoAllV", row * worked_rows(config), 4 + 2 * again)
    if moe.expert_num > ranks:
        yield send("AlltoAllV", FLOAT * worked_rows(config), 1 + again)  # whose they are, of the experts there


def _of_model_slices(config, degrees, repeated, last):
    """Yields the sums of what model shards make, and the gathers of rows that are sharded between two layers."""
    model, moe, parallel = config.model, config.moe, config.parallel
    tensor, layers, conditional = degrees.model_parallel, model.num_layers, len(config.moe_layers)
    rows, wide = config.rows // degrees.data_parallel * model.hidden_size, product_bytes(config)
    shared, again = conditional if moe.shared_expert_num else 0, int(parallel.recompute)

    def reduce(numbers, count):
        return Exchange("AllReduce", "model", tensor, wide * numbers, count)

    yield reduce(rows, 2 * (layers - conditional + shared))
    if conditional and moe.dispatch == "capacity":
        yield reduce(worked_rows(config) * model.hidden_size, (2 + repeated) * conditional)
    elif conditional:  # rows that came back, float32
        yield Exchange("AllReduce", "model", tensor, FLOAT * rows, (2 + repeated) * conditional)
    if moe.use_shared_expert_gating:
        yield reduce(rows, again * shared)  # the gate's gradient reads the sum
    if model.qk_norm == "full":  # sums of squares of queries and keys
        squares = FLOAT * config.rows // degrees.data_parallel * 2 * tensor
        yield Exchange("AllGather", "model", tensor, squares, layers)  # kept where the layer is recomputed
        yield Exchange("ReduceScatter", "model", tensor, squares, layers)
    if not parallel.sequence_parallel:
        yield reduce(rows, layers * (2 + again))
        return
    yield Exchange("AllGather", "model", tensor, FLOAT * rows, layers * (2 + 2 * again) + last)
    yield Exchange("AllGather", "model", tensor, wide * rows, layers)
    yield Exchange("ReduceScatter", "model", tensor, FLOAT * rows, 2 * layers + last)
    yield Exchange("ReduceScatter", "model", tensor, wide * rows, layers * (1 + again))


def _of_cross_attention(config, degrees):
    """Yields the sums of what the cross-attention of a decoder's layers makes, forward and backward."""
    decoder, again = config.stacks[-1], int(config.parallel.recompute)
    rows = decoder.rows // degrees.data_parallel * config.model.hidden_size
    count = decoder.model.num_layers * (2 + again)
    yield Exchange("AllReduce", "model", degrees.model_parallel, product_bytes(config) * rows, count)


def flops(config: Config, vocab: int, stage: int = 0) -> float:
    """Returns the FLOPs of the matrix products of a device in a step, 2 for a multiply-add; backward counts twice
    forward, recompute once more.

    Scores of attention count as they are computed, see `seen_tokens`, and experts by `worked_rows`. Of a pipeline those
    of one stage.
    """
    stages, micro = config.parallel.pipeline_stage, config.micro_batches
    if stages > 1:
        config = stage_config(config, stage)
    blocks = sum(_block_products(stack) for stack in config.stacks)
    if config.model.type == "seq2seq":
        blocks += _cross_products(config)
    rows = config.data.batch_size * config.target_length // config.parallel.data_parallel
    passes = 4 if config.parallel.recompute else 3
    head = 3 * rows * config.model.hidden_size * vocab if stage == stages - 1 else 0
    return 2.0 * micro * (passes * blocks + head)


def _cross_products(config):
    """Returns the multiply-adds of a pass through the cross-attention of all layers of a decoder, on a device."""
    width, (encoder, decoder) = config.model.hidden_size, config.stacks
    data, tensor = config.parallel.data_parallel, config.parallel.model_parallel
    read, rows = encoder.rows // data, decoder.rows // data
    inner = mixed(decoder)
    each = 2 * inner * (rows * width + read * width + rows * encoder.model.seq_length)
    return decoder.model.num_layers * each / tensor


def _block_products(config):
    """Returns the multiply-adds of a pass through the blocks of a stack, on a device."""
    model, moe, parallel = config.model, config.moe, config.parallel
    rows, tensor, width = config.rows // parallel.data_parallel, parallel.model_parallel, model.hidden_size
    conditional, matrices = len(config.moe_layers), 3 if model.activation == "swiglu" else 2
    attention = model.num_layers * width * (projection(config) + mixed(config))
    attention += 2 * mixed(config) * sum(seen_tokens(config, index) for index in range(model.num_layers))
    blocks = rows * attention / tensor
    blocks += (model.num_layers - conditional) * rows * matrices * width * config.dense_width / tensor
    if conditional:
        hidden = worked_rows(config) * config.expert_width + rows * config.shared_width
        blocks += conditional * hidden * matrices * width / tensor
        blocks += conditional * rows * width * moe.expert_num
    return blocks
