"""Estimates what a device holds besides weights, gradients and moments: activations, copies, what ZeRO puts together.

No MindSpore in here. The legend is that of `costs`.
"""

from switchyard.config import Config
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.stages import stage_config
from switchyard.moe.dispatch.capacity import buffer_slots
from switchyard.planner.host import noise_slices
from switchyard.planner.sizes import (
    FLOAT,
    Shape,
    is_cut_inside,
    mixed,
    product_bytes,
    projection,
    shard_sizes,
    takes,
    worked_rows,
)

IN_PRODUCT_TYPE = (  # model.compute_dtype
    *("q.weight", "kv.weight", "qkv.weight", "qkv.bias", "out.weight", "out.bias", "head.weight"),
    *("w_in", "w_gate", "w_out"),
)


def micro_batches_of_call(config: Config) -> int:
    """Returns the micro-batches of one call of the step's program: 1, of a pipeline several."""
    return config.micro_batches // config.train.gradient_accumulation_steps


def gathered_bytes(config: Config, sizes: dict[str, tuple[int, int]]) -> int:
    """Returns the bytes of the float32 weights that ZeRO puts together, at their peak; what is put together in the type
    of the products is among the copies, see `copied_bytes`. Sizes: name -> `shard_sizes`."""
    half = product_bytes(config) != FLOAT
    more = [
        FLOAT * (own - kept) for name, (own, kept) in sizes.items() if not (half and name.endswith(IN_PRODUCT_TYPE))
    ]
    return max(more, default=0) if config.parallel.optimizer_shard == 3 else sum(more)


def copied_bytes(config: Config, shapes: dict[str, Shape]) -> int:
    """Returns the bytes of the weights in the type of the products, where that is not float32.

    A copy is kept for the backward pass, unless that makes it again: recompute does so of layers, but for what the
    compiler gathers with ZeRO 1; ZeRO 3 of all that it gathers. Of copies that are made again those of one layer count.
    """
    wide, degrees, parallel = product_bytes(config), ParallelDims.of(config.parallel), config.parallel
    if wide == FLOAT:
        return 0
    kept, again = 0, {}
    for name, shape in shapes.items():
        if len(shape) < 2:
            continue
        own, held = shard_sizes(name, shape, degrees)
        by_compiler = held < own and not is_cut_inside(name, shape, degrees)
        stack, _, in_layer = name.partition("layers.")
        made_again = held < own and parallel.optimizer_shard == 3
        made_again = made_again or (parallel.recompute and bool(in_layer) and not by_compiler)
        if made_again:
            layer = stack + in_layer.split(".")[0]
            again[layer] = again.get(layer, 0) + wide * own
        else:
            kept += wide * own
    return kept + max(again.values(), default=0)


def activation_bytes(config: Config, vocab: int, shapes: dict[str, Shape], stage: int = 0) -> int:
    """Estimates the bytes that the forward pass keeps for the backward pass on a device.

    Of each block: its residual rows, both norms' results and their copies in the type of the products, projections,
    attention weights (fused attention keeps 16 numbers of a row and head in their place), hidden rows, slots and what
    came back of them; weights in that type, see `copied_bytes`; logits and their logarithms; the noise. With
    recompute of all blocks the input only, and one block whole.
    A stage of a pipeline keeps as many micro-batches as there are stages behind it, and one.
    What the device's memory pool wastes and what its kernels need as work space is not in it.
    """
    stages, micro = config.parallel.pipeline_stage, micro_batches_of_call(config)
    if stages > 1:
        config = stage_config(config, stage)
    wide = product_bytes(config)
    kept = sum(_stack_bytes(stack, config.model.seq_length * (place > 0)) for place, stack in enumerate(config.stacks))
    kept *= min(micro, stages - stage)
    kept += copied_bytes(config, shapes)
    data = config.parallel.data_parallel
    kept += config.data.batch_size * config.target_length // data * vocab * (wide + 2 * FLOAT) * (stage == stages - 1)
    return int(kept + noise_slices(config) * micro * config.rows // data * config.model.hidden_size * FLOAT)


def _stack_bytes(config, read):
    """Returns the activation bytes of the blocks of a stack; `read`: rows of a sequence that cross-attention sees."""
    model, parallel = config.model, config.parallel
    rows, width = config.rows // parallel.data_parallel, model.hidden_size
    between = rows * width * FLOAT  # rows between the parts
    between //= parallel.model_parallel if parallel.sequence_parallel else 1
    blocks = [_block_bytes(config, index, rows, between) for index in range(model.num_layers)]
    if read:
        blocks = [block + _cross_bytes(config, read, rows, between) for block in blocks]
    return model.num_layers * between + max(blocks) if parallel.recompute else sum(blocks)


def _cross_bytes(config, read, rows, between):
    """Returns the activation bytes of one cross-attention of `rows` rows, which see `read` rows of a sequence."""
    model, tensor, wide = config.model, config.parallel.model_parallel, product_bytes(config)
    memory = config.data.batch_size * read // config.parallel.data_parallel
    width = model.hidden_size
    kept = 2 * between + rows * width * wide + memory * width * wide  # residual, norm; what goes into the products
    kept += wide * width * (4 * rows + 4 * memory) // tensor  # queries, keys and values, and their copies by head
    kept += rows * model.num_heads * read * (FLOAT + (wide if wide != FLOAT else 0)) // tensor  # before the product
    return kept + (between if model.dropout else 0)


def _block_bytes(config, index, rows, between):
    """Returns the activation bytes of one block without recompute."""
    model, moe, parallel = config.model, config.moe, config.parallel
    width, wide, tensor = model.hidden_size, product_bytes(config), parallel.model_parallel
    hidden_copies = 3 if model.activation == "swiglu" else 2  # before and after the non-linearity, and the gate
    weights = model.seq_length * (FLOAT + (wide if wide != FLOAT else 0))  # [S] of a row and head, before the product
    if takes(config, "FlashAttentionScore"):
        weights = 16 * FLOAT  # softmax_max and softmax_sum
    kept = 4 * between + 2 * rows * width * wide  # two residuals, two norms; what goes into the products
    kept += (
        rows * wide * (2 * projection(config) + mixed(config)) // tensor + rows * model.num_heads * weights // tensor
    )
    if model.dropout:
        kept += 2 * between
    if index not in config.moe_layers:
        return kept + rows * hidden_copies * config.dense_width * wide // tensor
    slots = worked_rows(config)
    kept += slots * hidden_copies * config.expert_width * wide // tensor
    if moe.dispatch == "dropless_static":
        slots = parallel.expert_parallel * buffer_slots(config)
    kept += slots * width * (2 * FLOAT + wide if moe.dispatch == "capacity" else 3 * wide)
    kept += rows * hidden_copies * config.shared_width * wide // tensor
    return kept + 4 * rows * moe.expert_num * FLOAT  # logits, probabilities, choices of the router
