"""What a layout costs a device: what it holds, what it sends, what it computes. No MindSpore in here.

Parameters, optimizer state and exchanges are those of the graph that the compiler makes of `training.parallel_step`, to
the byte (tests/parallel/test_costs.py); activations are an estimate.

Legend: N tokens and G groups of all devices together; n = N / data_parallel rows and g groups of a data slice; D width,
F hidden width, E experts, C slots, V vocabulary, X columns of the projection to queries, keys and values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from switchyard.capacity import buffer_slots, check_sort_keys, check_sorted_rows, slot_shape, zero_rows
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.kernels.fused import fused_operators
from switchyard.parallel.placement import EXPERT, MODEL, Degrees, optimizer_slices, placement, slices

FLOAT = 4  # bytes of float32: parameters, gradients, moments, rows between the parts of a layer
TALLY = 6  # figures of a conditional layer besides load and importance, see moe.MoELayer.tally
SCALARS = 3  # of the optimizer: two bias corrections and the learning rate; with float16 the loss scale's inverse
CUT_ROUTERS = ("gshard", "sinkhorn", "switch", "top_k")
IN_PRODUCT_TYPE = ("qkv.weight", "out.weight", "head.weight", "w_in", "w_gate", "w_out")  # model.compute_dtype
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """Collectives that are alike.

    Attributes:
        kind: AllReduce, AlltoAll, AlltoAllV, AllGather, ReduceScatter.
        group: expert, replicas (of an expert slice), data, model or stage (all), see `Degrees`.
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
        """Bytes that leave a device in all: ring algorithms, in which AllReduce passes its data twice."""
        passes = 2 if self.kind == "AllReduce" else 1
        return self.number * self.bytes * passes * (self.ranks - 1) / self.ranks


@dataclass(frozen=True)
class Costs:
    """Of one device and one step; bytes, and FLOPs of the matrix products.

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
        """All that is held at once."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations

    @property
    def sent(self) -> float:
        """Bytes that leave the device."""
        return sum(one.sent for one in self.exchanges)

    def exchanged(self, kind: str) -> int:
        """Bytes of the collectives of a kind; AlltoAllV counts as AlltoAll."""
        return sum(one.bytes * one.number for one in self.exchanges if one.kind.removesuffix("V") == kind)


def costs(config: Config, vocab: int) -> Costs:
    """Costs of a configuration's layout; vocab: entries V.

    Raises:
        UserError: the training step cannot be cut so.
    """
    check_offered(config)
    degrees = Degrees.of(config.parallel)
    whole = parameters(config, vocab)
    held = {name: _held(name, shape, degrees) for name, shape in whole.items()}  # (slice, of it with ZeRO)
    weights = FLOAT * sum(kept for _, kept in held.values())
    gathered = sum(FLOAT * (cut - kept) for cut, kept in held.values())
    if degrees.optimizer_shard == 3:
        gathered = max(FLOAT * (cut - kept) for cut, kept in held.values())
    micro_batches, half = config.train.gradient_accumulation_steps, config.model.compute_dtype == "float16"
    return Costs(
        weights=weights,
        gradients=weights * min(micro_batches, 2),  # those of a micro-batch, and the sum of the ones before
        optimizer=2 * weights + (SCALARS + half) * FLOAT,
        gathered=gathered,
        activations=activation_bytes(config, vocab, whole),
        exchanges=tuple(exchanges(config, vocab)),
        flops=micro_batches * flops(config, vocab),
    )


def check_offered(config: Config) -> None:
    """Refuses what `training.parallel_step` refuses, in its words, and what is not counted here (UserError)."""
    cut, moe, train, model = config.parallel, config.moe, config.train, config.model
    layers, steps, level = bool(config.moe_layers), train.gradient_accumulation_steps, cut.optimizer_shard
    routers = f"cannot be cut over devices; one of {', '.join(CUT_ROUTERS)}"
    refused = [
        ("model.type", model.type, model.type == "decoder", "only a decoder is cut over devices"),
        ("parallel.pipeline_stage", cut.pipeline_stage, cut.pipeline_stage == 1, "1: a decoder is not cut into stages"),
        (
            "train.gradient_accumulation_steps",
            steps,
            steps == 1 or not level,
            f"1 with parallel.optimizer_shard ({level})",
        ),
        ("moe.granularity", config.granularity, not layers or config.granularity == "token", "'token'"),
        ("moe.router", moe.router, not layers or moe.router in CUT_ROUTERS, routers),
        ("moe.copies", moe.copies, not layers or moe.copies == 1, "1 where parallel degrees cut the model"),
    ]
    for key, value, offered, allowed in refused:
        if not offered:
            raise UserError(f"{key}: {value}; {allowed}")
    check_sort_keys(config)
    if layers and moe.dispatch != "capacity":
        check_sorted_rows(config)


def parameters(config: Config, vocab: int) -> dict[str, Shape]:
    """Name -> whole shape of every parameter of the decoder."""
    model, width = config.model, config.model.hidden_size
    found = {"embedding.table": (vocab, width)}
    if model.position == "learned":
        found["position.table"] = (model.seq_length, width)
    for index in range(model.num_layers):
        prefix = f"layers.{index}."
        found |= _norm(f"{prefix}attention_norm", model)
        found[f"{prefix}attention.qkv.weight"] = (width, projection(config))
        found[f"{prefix}attention.out.weight"] = (width, width)
        found |= _norm(f"{prefix}feed_forward_norm", model) | _feed_forward(config, index, f"{prefix}feed_forward.")
    found |= _norm("norm", model)
    if not model.tie_word_embeddings:
        found["head.weight"] = (width, vocab)
    return found


def projection(config: Config) -> int:
    """Columns X of the matrix that makes queries, keys and values."""
    model = config.model
    return model.hidden_size + 2 * (model.n_kv_heads or model.num_heads) * (model.hidden_size // model.num_heads)


def _norm(name, model):
    shape = (model.hidden_size,)
    return {f"{name}.gain": shape} | ({f"{name}.bias": shape} if model.norm == "layernorm" else {})


def _feed_forward(config, index, prefix):
    width, moe = config.model.hidden_size, config.moe

    def matrices(name, count, hidden):
        found = {f"{name}w_in": (count, width, hidden)}
        if config.model.activation == "swiglu":
            found[f"{name}w_gate"] = (count, width, hidden)
        return found | {f"{name}w_out": (count, hidden, width)}

    if index not in config.moe_layers:
        return matrices(prefix, 1, config.dense_width)
    found = {f"{prefix}router.weight": (width, moe.expert_num)}
    found |= matrices(f"{prefix}experts.", moe.expert_num, config.expert_width)
    if moe.shared_expert_num:
        found |= matrices(f"{prefix}shared.", 1, config.expert_width * moe.shared_expert_num)
    if moe.use_shared_expert_gating:
        found[f"{prefix}shared.gate"] = (1, width, 1)
    return found


def _held(name, shape, degrees):
    """(numbers of a rank's slice, numbers of it that the rank keeps between steps)."""
    cut = placement(name, shape, degrees)
    size = math.prod(shape) // math.prod(slices(axis, degrees) for axis in cut)
    return size, size // optimizer_slices(shape, cut, degrees, 0)


def exchanges(config: Config, vocab: int) -> Iterator[Exchange]:
    """The collectives of a step, forward, backward, clip and AdamW."""
    degrees, micro_batches = Degrees.of(config.parallel), config.train.gradient_accumulation_steps
    if degrees.devices == 1:
        return
    for one in _of_micro_batch(config, vocab, degrees):
        yield replace(one, number=one.number * micro_batches)
    yield Exchange("AllReduce", "stage", degrees.devices, FLOAT)  # norm of the gradients


def _of_micro_batch(config, vocab, degrees):
    """Those of one micro-batch; its gradients are summed at once."""
    layers = len(config.moe_layers)
    for name, shape in parameters(config, vocab).items():
        yield from _of_gradient(name, shape, config, degrees)
    if degrees.expert_parallel > 1 and layers:
        yield from _of_experts(config, degrees)
    if degrees.model_parallel > 1:
        yield from _of_model_slices(config, degrees)
    if degrees.data_parallel > 1:
        figures = 2 + layers * (TALLY + 2 * config.moe.expert_num)
        for numbers in (1, figures):  # valid tokens; figures of the step
            yield Exchange("AllReduce", "data", degrees.data_parallel, FLOAT * numbers)


def _of_gradient(name, shape, config, degrees):
    """A gradient's sum over those that hold the same slice; with ZeRO the slice is put together before it is used."""
    cut = placement(name, shape, degrees)
    ranks, (size, kept) = degrees.replica(cut, 0)[1], _held(name, shape, degrees)
    group = "replicas" if EXPERT in cut else "data" if MODEL in cut else "stage"
    if ranks == 1:
        return
    if kept == size:
        yield Exchange("AllReduce", group, ranks, FLOAT * size)
        return
    again = degrees.optimizer_shard == 3 and _read_again(name, config)
    wide = product_bytes(config) if name.endswith(IN_PRODUCT_TYPE) else FLOAT  # cast before they are gathered
    yield Exchange("AllGather", group, ranks, wide * size, 2 if again else 1)
    yield Exchange("ReduceScatter", group, ranks, FLOAT * size)


def _read_again(name, config):
    """Whether the backward pass reads a parameter: those of products and of fused norms, not gains and biases of others
    nor tables that rows are taken of."""
    kind, model = name.rsplit(".", 1)[1], config.model
    if kind == "gain":
        return model.norm == "rmsnorm" and _takes(config, "RmsNorm")
    return kind not in ("bias", "table") or (name == "embedding.table" and model.tie_word_embeddings)


def _takes(config, name):
    """Whether the graph has a fused operator; where no device is named it is the one for Ascend that is counted."""
    target = config.context.device_target
    return name in fused_operators(config, "Ascend" if target == "auto" else target)


def _of_experts(config, degrees):
    """Rows to their experts and back, forward and backward."""
    moe, ranks, again, layers = config.moe, degrees.expert_parallel, int(config.parallel.recompute), config.moe_layers
    row = config.model.hidden_size * product_bytes(config)

    def send(kind, size, number):
        return Exchange(kind, "expert", ranks, size, number * len(layers))

    if moe.dispatch == "capacity":  # recompute: there once more; nothing backward reads the way back
        yield send("AlltoAll", FLOAT * math.prod(slot_shape(config)) // degrees.data_parallel, 4 + again)
        return
    yield send("AlltoAll", FLOAT * moe.expert_num, 1 + again)  # how many rows each expert gets
    if moe.dispatch == "dropless_static":
        yield send("AlltoAll", row * ranks * buffer_slots(config), 4 + 2 * again)
        return
    yield send("AlltoAllV", row * worked_rows(config), 4 + 2 * again)
    if moe.expert_num > ranks:
        yield send("AlltoAllV", FLOAT * worked_rows(config), 1 + again)  # whose they are, of the experts there


def worked_rows(config: Config) -> int:
    """Rows that a device's experts work on in a conditional layer.

    With capacities their slots, filled or not; dropless what a balanced router sends, zero rows of each device besides.
    """
    moe, data = config.moe, config.parallel.data_parallel
    if moe.dispatch == "capacity":
        return math.prod(slot_shape(config)[:3]) // data
    return config.rows // data * moe.choices + zero_rows(config)


def _of_model_slices(config, degrees):
    """Sums of what the model slices of a network make, and rows put together again where they are cut."""
    model, moe, cut = config.model, config.moe, config.parallel
    tensor, layers, conditional = degrees.model_parallel, model.num_layers, len(config.moe_layers)
    rows, wide = config.rows // degrees.data_parallel * model.hidden_size, product_bytes(config)
    shared, again = conditional if moe.shared_expert_num else 0, int(cut.recompute)

    def reduce(numbers, count):
        return Exchange("AllReduce", "model", tensor, wide * numbers, count)

    yield reduce(rows, 2 * (layers - conditional + shared))
    if conditional and moe.dispatch == "capacity":
        yield reduce(worked_rows(config) * model.hidden_size, 2 * conditional)
    elif conditional:  # rows that came back, float32
        yield Exchange("AllReduce", "model", tensor, FLOAT * rows, 2 * conditional)
    if moe.use_shared_expert_gating:
        yield reduce(rows, again * shared)  # the gate's gradient reads the sum
    if not cut.sequence_parallel:
        yield reduce(rows, layers * (2 + again))
        return
    yield Exchange("AllGather", "model", tensor, FLOAT * rows, layers * (2 + 2 * again) + 1)
    yield Exchange("AllGather", "model", tensor, wide * rows, layers)
    yield Exchange("ReduceScatter", "model", tensor, FLOAT * rows, 2 * layers + 1)
    yield Exchange("ReduceScatter", "model", tensor, wide * rows, layers * (1 + again))


def product_bytes(config: Config) -> int:
    """Bytes of a number in the matrix products."""
    return FLOAT if config.model.compute_dtype == "float32" else 2


def flops(config: Config, vocab: int) -> float:
    """Of a device's matrix products in a micro-batch, 2 a multiply-add.

    Backward counts twice forward, recompute once more. Scores of attention count in full, as they are computed, and
    experts by `worked_rows`.
    """
    model, moe, cut = config.model, config.moe, config.parallel
    rows, tensor, width = config.rows // cut.data_parallel, cut.model_parallel, model.hidden_size
    conditional, matrices = len(config.moe_layers), 3 if model.activation == "swiglu" else 2
    attention = width * (projection(config) + width) + 2 * model.seq_length * width
    blocks = model.num_layers * rows * attention / tensor
    blocks += (model.num_layers - conditional) * rows * matrices * width * config.dense_width / tensor
    if conditional:
        slots = worked_rows(config) + moe.shared_expert_num * rows
        blocks += conditional * slots * matrices * width * config.expert_width / tensor
        blocks += conditional * rows * width * moe.expert_num
    passes = 4 if cut.recompute else 3
    return 2.0 * (passes * blocks + 3 * rows * width * vocab)


def activation_bytes(config: Config, vocab: int, whole: dict[str, Shape]) -> int:
    """An estimate of what the forward pass leaves for the backward pass on a device.

    Of each block: its residual rows, both norms' results and their copies in the type of the products, projections,
    attention weights (fused attention keeps 16 numbers of a row and head in their place), hidden rows, slots and what
    came back of them; the weights in that type where it is not float32; logits and their logarithms; the noise. With
    recompute of all blocks the input only, and one block whole.
    What the device's memory pool wastes and what its kernels need as work space is not in it.
    """
    model, cut, degrees = config.model, config.parallel, Degrees.of(config.parallel)
    rows, width, wide = config.rows // cut.data_parallel, model.hidden_size, product_bytes(config)
    between = rows * width * FLOAT // (cut.model_parallel if cut.sequence_parallel else 1)  # rows between the parts
    blocks = [_block_bytes(config, index, rows, between) for index in range(model.num_layers)]
    kept = model.num_layers * between + max(blocks) if cut.recompute else sum(blocks)
    copies = sum(_held(name, shape, degrees)[0] for name, shape in whole.items() if len(shape) > 1)
    kept += copies * wide if wide != FLOAT else 0
    noise = (1 + 2 * model.num_layers) * (model.dropout > 0)
    noise += len(config.moe_layers) * ((config.moe.jitter > 0) + (config.moe.drop_order == "random"))
    return int(kept + rows * vocab * (wide + 2 * FLOAT) + noise * rows * width * FLOAT)


def _block_bytes(config, index, rows, between):
    """Of one block without recompute."""
    model, moe, cut = config.model, config.moe, config.parallel
    width, wide, tensor = model.hidden_size, product_bytes(config), cut.model_parallel
    hidden_copies = 3 if model.activation == "swiglu" else 2  # before and after the non-linearity, and the gate
    weights = model.seq_length * (FLOAT + (wide if wide != FLOAT else 0))  # [S] of a row and head, before the product
    if _takes(config, "FlashAttentionScore"):
        weights = 16 * FLOAT  # softmax_max and softmax_sum
    kept = 4 * between + 2 * rows * width * wide  # two residuals, two norms; what goes into the products
    kept += rows * wide * (2 * projection(config) + width) // tensor + rows * model.num_heads * weights // tensor
    if model.dropout:
        kept += 2 * between
    if index not in config.moe_layers:
        return kept + rows * hidden_copies * config.dense_width * wide // tensor
    slots = worked_rows(config)
    kept += slots * hidden_copies * config.expert_width * wide // tensor
    if moe.dispatch == "dropless_static":
        slots = cut.expert_parallel * buffer_slots(config)
    kept += slots * width * (2 * FLOAT + wide if moe.dispatch == "capacity" else 3 * wide)
    kept += rows * moe.shared_expert_num * hidden_copies * config.expert_width * wide // tensor
    return kept + 4 * rows * moe.expert_num * FLOAT  # logits, probabilities, choices of the router
