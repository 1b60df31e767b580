"""Checks rules between fields of the configuration (cross-field checks)."""

from switchyard.config.rotary_scaling import scaling_laws
from switchyard.config.router_options import RouterOptions
from switchyard.config.seq2seq import SHORTEST


def choice_laws(moe):
    """Laws of learned token choice, whatever the router; those of a router stand with its options."""
    copies, chosen = moe.copies, moe.num_experts_chosen
    yield moe.expert_num % copies == 0, "moe.copies", copies, f"must divide moe.expert_num ({moe.expert_num})"
    experts = moe.expert_num // copies
    yield (
        copies == 1 or chosen <= experts,
        "moe.num_experts_chosen",
        chosen,
        f"at most moe.expert_num / moe.copies ({experts})",
    )
    whole = moe.dispatch == "capacity" or moe.reroute == 0
    yield whole, "moe.reroute", moe.reroute, f"must be 0: moe.dispatch {moe.dispatch!r} drops no choice"
    yield (
        not moe.use_shared_expert_gating or moe.shared_expert_num > 0,
        "moe.use_shared_expert_gating",
        True,
        "needs moe.shared_expert_num of 1 or more",
    )
    own = moe.dispatcher is None or moe.dispatch == "capacity"
    yield own, "moe.dispatch", moe.dispatch, "moe.dispatcher decides what is dropped: leave moe.dispatch out"
    if moe.record is not None:
        yield moe.record != moe.replay, "moe.record", moe.record, "must not be the file that moe.replay reads"
    steps, decided = moe.router_warmup_steps, moe.replay is not None or moe.force_balance
    reason = "cannot be combined with moe.replay or moe.force_balance"
    yield not (steps and decided), "moe.router_warmup_steps", steps, reason


OFFERED = {
    "decoder": ("token", "slice"),
    "seq2seq": ("token",),
    "vision": ("sample", "region", "channel", "task"),
    "cascade": ("sample",),
}
NOT_OFFERED = {
    "sample": "a decoder must not route by the full sample, which includes later tokens; use 'token' or 'slice'",
    "task": "text has no tasks; use 'token' or 'slice', or model.type 'vision'",
    "region": "regions are parts of images; use model.type 'vision'",
    "channel": "channel groups are parts of images; use model.type 'vision'",
    "token": "images have no tokens; use 'sample', 'region', 'channel' or 'task'",
    "slice": "windows of tokens are for model.type 'decoder'; use 'token' for text, 'sample' or others for images",
}


def granularity_laws(config):
    """Laws of what is routed as one row, by network."""
    kind, moe, network = config.granularity, config.moe, config.model.type
    yield kind in OFFERED[network], "moe.granularity", kind, NOT_OFFERED[kind]
    if kind == "slice":
        length = config.model.seq_length
        yield length % moe.slice_length == 0, "moe.slice_length", moe.slice_length, f"must divide seq_length ({length})"
        for key, file in (("moe.record", moe.record), ("moe.replay", moe.replay)):
            yield file is None, key, file, "choices are recorded per token; set moe.granularity to 'token'"
        steps = moe.router_warmup_steps
        yield (
            not steps,
            "moe.router_warmup_steps",
            steps,
            "choices are forced per token; set moe.granularity to 'token'",
        )
    if kind != "token":
        for key, name in (("moe.experts", moe.experts), ("moe.dispatcher", moe.dispatcher)):
            yield name is None, key, name, "classes of your own work on tokens; set moe.granularity to 'token'"
        gated = moe.use_shared_expert_gating
        yield (
            not gated,
            "moe.use_shared_expert_gating",
            gated,
            "the gate works per token; set moe.granularity to 'token'",
        )
    if kind == "task":
        by_task = moe.router in ("task", "multi_gate", "random_in_group")
        yield (
            by_task,
            "moe.router",
            moe.router,
            "moe.granularity 'task' routes by task id; use 'task', 'multi_gate' or 'random_in_group'",
        )
    if network == "seq2seq":
        yield from seq2seq_laws(config)
    elif network != "decoder":
        yield from image_laws(config)


def seq2seq_laws(config):
    """Laws of the encoder-decoder: its positions, its corrupted text, and what it does not have."""
    model, moe, own = config.model, config.moe, config.seq2seq
    length, buckets = own.relative_attention_max_distance, own.relative_attention_num_buckets
    reason = f"must be above half of seq2seq.relative_attention_num_buckets ({buckets})"
    yield length > buckets // 2, "seq2seq.relative_attention_max_distance", length, reason
    reason = f"at least {SHORTEST}: a token, a sentinel and the end of the input"
    yield model.seq_length >= SHORTEST, "model.seq_length", model.seq_length, reason
    if model.seq_length >= SHORTEST:
        spans = own.spans(config.window)[1]
        reason = f"at least {spans}, the spans of an input of model.seq_length ({model.seq_length})"
        yield spans <= own.sentinels, "seq2seq.sentinels", own.sentinels, reason
    reason = "must be null: model.type 'seq2seq' has as many key/value heads as heads"
    yield model.n_kv_heads in (None, model.num_heads), "model.n_kv_heads", model.n_kv_heads, reason
    only = "is for model.type 'decoder': leave it out"
    yield not config.parallel.sequence_parallel, "parallel.sequence_parallel", True, only
    for key in ("record", "replay", "router_warmup_steps"):
        value = getattr(moe, key)
        yield not value, f"moe.{key}", value, only


def image_laws(config):
    """Laws of the networks that read images."""
    vision, moe, network = config.vision, config.moe, config.model.type
    side = vision.image_size
    yield (
        config.model.dropout == 0,
        "model.dropout",
        config.model.dropout,
        f"must be 0: model.type '{network}' has no dropout",
    )
    rate = moe.expert_dropout
    yield not rate, "moe.expert_dropout", rate, f"must be 0 or null: model.type '{network}' has no dropout"
    for key, file in (("moe.record", moe.record), ("moe.replay", moe.replay)):
        yield file is None, key, file, "choices are recorded for text only; use model.type 'decoder'"
    steps = moe.router_warmup_steps
    yield not steps, "moe.router_warmup_steps", steps, "choices are forced for text only; use model.type 'decoder'"
    yield (
        not moe.losses.get("sequence"),
        "moe.losses.sequence",
        moe.losses.get("sequence"),
        "images are not sequences; remove it",
    )
    if network == "cascade":
        tasks = vision.tasks
        yield len(tasks) == 1, "vision.tasks", tasks, "a cascade has one task"
        yield (
            moe.expert_num == 1,
            "moe.expert_num",
            moe.expert_num,
            "must be 1: the experts of a cascade are cascade.stages",
        )
        return
    yield side % vision.pool == 0, "vision.pool", vision.pool, f"must divide vision.image_size ({side})"
    tasks = len(vision.tasks)
    asked = moe.router.given().get("task_num", tasks)
    yield asked == tasks, "moe.router.task_num", asked, f"must be the number of vision.tasks ({tasks})"
    if config.granularity == "region":
        parts = vision.regions
        yield side // vision.pool % parts == 0, "vision.regions", parts, f"must divide the side ({side // vision.pool})"
        yield side % parts == 0, "vision.regions", parts, f"must divide vision.image_size ({side})"
    if config.granularity == "channel":
        parts, width = vision.channel_groups, config.model.hidden_size
        yield width % parts == 0, "vision.channel_groups", parts, f"must divide model.hidden_size ({width})"
        first = 0 not in config.moe_layers or vision.channels % parts == 0
        reason = f"must divide vision.channels ({vision.channels}) where layer 0 is conditional: moe.layers [1, ...]"
        yield first, "vision.channel_groups", parts, reason


def parallel_laws(config):
    """Laws of the degrees: every slice is as large as any other."""
    model, parallel, experts = config.model, config.parallel, config.moe.expert_num
    stages, tensor = parallel.pipeline_stage, parallel.model_parallel
    slices, key = parallel.data_parallel, "parallel.expert_parallel"
    yield (
        experts % parallel.expert_parallel == 0,
        key,
        parallel.expert_parallel,
        f"must divide moe.expert_num ({experts})",
    )
    reason = f"must divide parallel.data_parallel ({slices})"
    yield slices % parallel.expert_parallel == 0, key, parallel.expert_parallel, reason
    for size, name in (
        (model.kv_heads, "the key/value heads"),
        (config.dense_width, "the hidden width of a dense feed-forward"),
        (config.expert_width, "the hidden width of an expert"),
        (config.shared_width, "the hidden width of the shared experts"),
    ):
        yield size % tensor == 0, "parallel.model_parallel", tensor, f"must divide {name} ({size})"
    yield (
        stages <= model.num_layers,
        "parallel.pipeline_stage",
        stages,
        f"at most model.num_layers ({model.num_layers})",
    )
    micro = parallel.micro_batch_num
    reason = f"at least parallel.pipeline_stage ({stages}), otherwise a stage is idle"
    yield stages == 1 or micro >= stages, "parallel.micro_batch_num", micro, reason
    yield micro == 1 or stages > 1, "parallel.micro_batch_num", micro, "needs parallel.pipeline_stage of 2 or more"
    groups = config.groups
    yield groups % slices == 0, "moe.groups", groups, f"must be a multiple of parallel.data_parallel ({slices})"
    rows = config.rows // slices
    whole = not parallel.sequence_parallel or rows % tensor == 0
    yield (
        whole,
        "parallel.sequence_parallel",
        True,
        f"model_parallel ({tensor}) must divide the rows of a data-parallel shard ({rows})",
    )
    for degree, able in (
        ("expert_parallel", ("decoder", "seq2seq")),
        ("model_parallel", ("decoder", "seq2seq")),
        ("pipeline_stage", ("decoder",)),
    ):
        size, names = getattr(parallel, degree), " or ".join(f"'{name}'" for name in able)
        holds = size == 1 or model.type in able
        yield holds, f"parallel.{degree}", size, f"must be 1 unless model.type is {names}"


LARGEST_ARRAY = 2**58  # numbers; NumPy counts bytes up to 2^63


def size_laws(config):
    """Laws of what NumPy can count: the product of several keys, each within its own limits."""
    model, vision = config.model, config.vision
    widest = 16 * max(config.dense_width, config.expert_width, config.shared_width)  # 9: convolutions
    for key, numbers in (
        ("model.hidden_size", model.hidden_size * widest * config.moe.expert_num),
        ("model.seq_length", model.seq_length**2),
        ("vision.image_size", 16 * vision.image_size**2 * max(vision.channels, model.hidden_size)),
        ("data.batch_size", config.data.batch_size * model.seq_length * model.hidden_size),
    ):
        reason = f"makes arrays of {numbers:.1e} elements together with the other sizes; reduce the sizes"
        yield numbers < LARGEST_ARRAY, key, config.value(key), reason


def laws(config):
    """Yields (holds, key, value, what is allowed) of each cross-field law of a Config."""
    yield from size_laws(config)
    yield from granularity_laws(config)
    yield from model_laws(config.model)
    yield from layer_laws(config)
    yield from parallel_laws(config)
    yield from run_laws(config)
    yield from data_laws(config)


def model_laws(model):
    """Laws of the network's sizes."""
    heads, kv_heads = model.num_heads, model.kv_heads
    text = model.type in ("decoder", "seq2seq")
    yield (
        not text or model.head_size is not None or model.hidden_size % heads == 0,
        "model.num_heads",
        heads,
        f"must divide model.hidden_size ({model.hidden_size})",
    )
    yield heads % kv_heads == 0, "model.n_kv_heads", kv_heads, f"must divide model.num_heads ({heads})"
    if model.type != "decoder":
        return
    yield from rotary_laws(model)
    if isinstance(model.window_layers, list):
        top, count = max(model.window_layers, default=0), model.num_layers
        yield top < count, "model.window_layers", top, f"at most model.num_layers - 1 ({count - 1})"
        idle = model.sliding_window is None or model.window_layers != []
        yield idle, "model.sliding_window", model.sliding_window, "model.window_layers [] names no layer: leave it out"


def rotary_laws(model):
    """Laws of the columns of a head that rotate."""
    if model.position != "rotary":
        return
    size, turning = model.size_of_head, model.rotary_size
    if model.partial_rotary < 1:
        reason = f"must rotate an even number of the {size} columns of a head, 2 or more; it makes {turning}"
        yield turning > 0 and turning % 2 == 0, "model.partial_rotary", model.partial_rotary, reason
    change = "model.head_size" if model.head_size else "model.hidden_size or model.num_heads"
    reason = f"needs an even head size, not {size}; change {change}, or use 'learned'"
    yield turning % 2 == 0, "model.position", "rotary", reason
    if model.rotary_scaling is not None:
        yield from scaling_laws(model.rotary_scaling, model.theta)


def layer_laws(config):
    """Laws of the conditional layers: their experts, their router, their places and their groups."""
    model, moe = config.model, config.moe
    chosen, experts = moe.num_experts_chosen, moe.expert_num
    yield chosen <= experts, "moe.num_experts_chosen", chosen, f"at most moe.expert_num ({experts})"
    yield from choice_laws(moe)
    if isinstance(moe.router.options, RouterOptions):  # those of a router in a user's own file are not typed yet
        yield from moe.router.options.laws(moe)
    if isinstance(moe.layers, list):
        top, last = max(moe.layers, default=0), config.all_layers - 1
        what = "the last layer of the decoder" if model.type == "seq2seq" else "model.num_layers - 1"
        yield top <= last, "moe.layers", top, f"at most {what} ({last})"
    if isinstance(moe.layers, int):
        count = model.num_layers
        yield moe.layers <= count, "moe.layers", moe.layers, f"every n-th needs n <= model.num_layers ({count})"
    per_step = config.data.batch_size
    yield (
        per_step % config.groups == 0,
        "data.batch_size",
        per_step,
        f"must be a multiple of the routing groups ({config.groups}: moe.groups or parallel.data_parallel)",
    )


def data_laws(config):
    """Laws of the section data."""
    data, text = config.data, config.reads_text
    yield text or not data.mixture, "data.mixture", len(data.mixture), f"model.type {config.model.type!r} reads images"
    parallel, decodes = config.parallel, config.model.type == "decoder"
    for key in ("document_mask", "loss_mask"):
        whole = parallel.pipeline_stage == 1 and (key == "loss_mask" or parallel.model_parallel == 1)
        yield decodes or not getattr(data, key), f"data.{key}", "true", "needs model.type 'decoder'"
        yield (
            whole or not getattr(data, key),
            f"data.{key}",
            "true",
            "not with pipeline_stage or model_parallel above 1",
        )
    yield not (data.document_mask and config.train.distill), "data.document_mask", "true", "not with train.distill"
    yield not (data.mixture and data.path), "data.path", data.path, "data.mixture names the corpora; leave it null"


def tuning_laws(config):
    """Laws of adapters and of a teacher."""
    network, lora, distill = config.model.type, config.train.lora, config.train.distill
    for key, value in (("train.lora", lora), ("train.distill", distill)):
        yield value is None or network == "decoder", key, value, f"needs model.type 'decoder', not {network!r}"
    if lora is not None:
        conditional = bool(config.moe_layers)
        yield "router" not in lora.targets or conditional, "train.lora.targets", "router", "the model has no router"
        own = conditional and config.moe.experts is not None and "experts" in lora.targets
        yield (
            not own,
            "train.lora.targets",
            "experts",
            f"moe.experts {config.moe.experts} have no adapters: leave it out",
        )
    if distill is not None:
        weight = config.moe.consistency_loss_factor
        yield not weight, "train.distill", distill.teacher, "needs moe.router.consistency_loss_factor 0"


def run_laws(config):
    """Laws of the learning rate and of the export."""
    yield from tuning_laws(config)
    for key, file in (("moe.record", config.moe.record), ("moe.replay", config.moe.replay)):
        reason = "follows the batches in order: set train.on_bad_loss to 'stop' or 'skip'"
        yield file is None or config.train.on_bad_loss != "rewind", key, file, reason
    model = config.model
    yield (
        config.schedule.lr_end <= config.schedule.learning_rate,
        "schedule.lr_end",
        config.schedule.lr_end,
        f"at most schedule.learning_rate ({config.schedule.learning_rate})",
    )
    length = config.export.max_length
    yield (
        length is None or model.position == "rotary" or length <= model.seq_length,
        "export.max_length",
        length,
        f"learned positions end at model.seq_length ({model.seq_length}); use model.position=rotary for longer text",
    )
