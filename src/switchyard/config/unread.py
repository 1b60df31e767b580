"""Lists the keys that a configuration does not read, from tables for each router, network, dispatch and device.

A key that differs from its default and is not read is refused where somebody surely expects it to change the
mathematics, and told in one line where a file for several purposes may well carry it. A router in a file of the user's
own may read anything.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from switchyard.config import old_keys
from switchyard.config.schema import Config
from switchyard.errors import shortened

LEARNED = (
    *("switch", "top_k", "noisy_top_k", "gshard", "cosine", "prototype", "sigmoid", "two_level", "sinkhorn", "base"),
    "multi_gate",
)
BLIND = ("hash", "random", "random_in_group", "task")  # choose without looking at a row
FIXED = (*BLIND, "lsh")
ROUTERS = (*LEARNED, *FIXED, "expert_choice", "mixture_of_depths", "tree", "dense", "merged", "soft")

# key of `moe` -> the routers that read it; a test compares it with what each router does
ROUTER_KEYS = {
    "jitter": tuple(name for name in ROUTERS if name not in BLIND),
    "aux_loss_factor": LEARNED,
    "z_loss_factor": (*LEARNED, "expert_choice", "dense", "merged"),
}
OFF = {"aux_loss_factor": 0, "z_loss_factor": 0}  # what no router contradicts
BY_ROW = (*LEARNED, *FIXED)  # rows choose experts, in training
BY_ROW_AT_EVALUATION = (*BY_ROW, "mixture_of_depths", "tree")
ROTARY_KEYS = ("partial_rotary", "rotary_scaling")
ATTENTION_KEYS = ("head_size", "qk_norm", "attention_bias", "sliding_window", "window_layers")
TEXT_KEYS = (
    *("num_heads", "n_kv_heads", *ATTENTION_KEYS, "seq_length", "position", "theta", *ROTARY_KEYS),
    *("tie_word_embeddings", "init_method_std"),
)
DECODER_KEYS = ("position", "theta", "init_method_std", "n_kv_heads")
ATTENTION_OF_DECODERS = (*ATTENTION_KEYS[1:], *ROTARY_KEYS)  # an encoder-decoder has heads of a size of their own too
CASCADE_KEYS = ("type", "activation", "compute_dtype")  # what a cascade reads of `model`
DECIDES = ("expert_num", "groups", "record", "replay")  # keys of `moe` that a dense model does not leave unread

TRAINED = (  # what weights have gone through already when they are evaluated or exported
    *("model.dropout", "moe.expert_dropout", "model.init_method_std", "moe.jitter", "moe.dispatch", "moe.losses"),
    *(
        "moe.aux_loss_factor",
        "moe.z_loss_factor",
        "moe.router_warmup_steps",
        "moe.router_freeze_step",
        "moe.router.random_draw",
    ),
    *("moe.router.consistency_loss_factor", "moe.router.sinkhorn_iterations", "moe.router.topk_bias_update_rate"),
)


@dataclass(frozen=True)
class Unread:
    """Keys that are not read.

    Attributes:
        keys: `section.key` of each.
        reason: why, and what to do.
        refused: whether such a key is refused, and not only told.
    """

    keys: tuple[str, ...]
    reason: str
    refused: bool = False


def unread(config: Config, target: str = "auto") -> Iterator[Unread]:
    """Yields all keys that training does not read, whatever their value. The first entry of a key counts.

    Args:
        config: the whole configuration.
        target: the device: Ascend, GPU, CPU, or "auto" where nobody has looked yet.
    """
    yield from _by_network(config)
    if config.moe_layers:
        yield from _by_router(config)
        yield from _by_capacity(config)
    yield from _by_run(config)
    yield from _by_device(config, config.context.device_target if target == "auto" else target)


def _keys(section: str, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{section}.{name}" for name in names)


def _all_but(section: str, names: Sequence[str]) -> tuple[str, ...]:
    fields = Config.model_fields[section].annotation.model_fields
    return _keys(section, [name for name in fields if name not in names])


def _by_network(config: Config) -> Iterator[Unread]:
    """Yields the keys that the network does not read."""
    network = config.model.type
    if config.reads_text:
        yield Unread((*_all_but("vision", ()), *_all_but("cascade", ())), f"model.type '{network}' reads text")
    else:
        of_text = ("data.mixture", "data.on_error", "data.document_mask", "data.loss_mask")
        yield Unread(("data.tokenizer", "export.max_length", *of_text), f"model.type '{network}' reads images")
    if network == "seq2seq":
        yield Unread(_keys("model", DECODER_KEYS), "model.type 'seq2seq' has the positions and initial weights of T5")
        yield Unread(_keys("model", ATTENTION_OF_DECODERS), "only model.type 'decoder' has it: leave it out", True)
        yield Unread(("train.sample_every",), "no text is sampled of an encoder-decoder")
    else:
        yield Unread(_all_but("seq2seq", ()), "only model.type 'seq2seq' reads it")
    if network == "vision":
        apart = (*_keys("model", TEXT_KEYS), "moe.expert_dropout", *_all_but("cascade", ()))
        yield Unread(apart, "model.type 'vision' does not use it")
    if network == "cascade":
        apart = (*_all_but("model", CASCADE_KEYS), *_all_but("moe", ("record", "replay")))
        yield Unread(
            (*apart, "vision.pool", "vision.regions", "vision.channel_groups"), "model.type 'cascade' does not use it"
        )
    elif not config.moe_layers:
        yield Unread(
            ("moe.record", "moe.replay"), "no layer is conditional, so no expert is chosen: leave it out", True
        )
        yield Unread(_all_but("moe", DECIDES), "no layer is conditional: moe.expert_num 1 or moe.layers []")
    yield from _by_unit(config, network)
    if network == "decoder":
        yield from _by_positions(config)
    everywhere = len(config.moe_layers) == config.all_layers
    if everywhere and config.moe.moe_intermediate_size:
        yield Unread(("model.intermediate_size",), "every layer is conditional and moe.moe_intermediate_size is set")


def _by_unit(config: Config, network: str) -> Iterator[Unread]:
    """Yields the keys of units of routing, and of shared experts, that the configuration does not have."""
    kind = config.granularity if config.moe_layers else ""
    for key, needs in (("vision.regions", "region"), ("vision.channel_groups", "channel")):
        if network == "vision" and kind != needs:
            yield Unread((key,), f"only moe.granularity '{needs}' reads it")
    if config.moe_layers and kind != "slice":
        yield Unread(("moe.slice_length",), "only moe.granularity 'slice' reads it: use that, or leave it out", True)
    if config.moe_layers and config.moe.shared_expert_num == 0:
        yield Unread(("moe.shared_intermediate_size",), "needs moe.shared_expert_num of 1 or more", True)


def _by_positions(config: Config) -> Iterator[Unread]:
    """Yields the keys of positions and windows that a decoder does not have."""
    if config.model.position == "learned":
        yield Unread(("model.theta",), "only model.position 'rotary' reads it")
        yield Unread(_keys("model", ROTARY_KEYS), "only model.position 'rotary' reads it: leave it out", True)
    if config.model.sliding_window is None:
        yield Unread(("model.window_layers",), "model.sliding_window is null: set it, or leave this out", True)


def _by_router(config: Config) -> Iterator[Unread]:
    """Yields what the router does not read."""
    router = config.moe.router
    if router not in ROUTERS:
        return
    for name, readers in ROUTER_KEYS.items():
        if router in readers:
            continue
        if name.endswith("_factor"):  # files that are tried with several routers carry them
            yield Unread((f"moe.{name}",), f"moe.router '{router}' has no such loss")
            continue
        reason = f"moe.router '{router}' does not read it: take none of {', '.join(BLIND)}, or leave it out"
        yield Unread((f"moe.{name}",), reason, True)
    for option, reason in router.options.idle():
        yield Unread((f"moe.router.{option}",), reason, True)


def _by_capacity(config: Config) -> Iterator[Unread]:
    """Yields the keys of slots and of blocks that the router and the dispatch do not read."""
    moe, router = config.moe, config.moe.router
    own = router not in ROUTERS
    by_row = own or router in BY_ROW
    by_row_later = own or router in BY_ROW_AT_EVALUATION
    slots = by_row and moe.dispatch == "capacity"
    slots_later = by_row_later and moe.eval_capacity_factor is not None
    reason = (
        f"moe.dispatch '{moe.dispatch}' drops no choice"
        if by_row
        else f"moe.router '{router}' has no slots of this kind"
    )
    if not slots and router not in ("expert_choice", "mixture_of_depths"):
        yield Unread(("moe.capacity_factor",), reason)
    if not slots and not slots_later:
        yield Unread(_keys("moe", ("drop_order", "min_capacity", "reroute")), reason)
    if not by_row_later and router != "expert_choice":
        yield Unread(("moe.eval_capacity_factor",), reason)
    if not by_row_later:
        yield Unread(("moe.dropless_block_size",), reason)


def _by_run(config: Config) -> Iterator[Unread]:
    """Yields the keys that the course of the run does not read."""
    if config.schedule.type == "constant":
        yield Unread(
            ("schedule.lr_end", "schedule.total_steps"), "schedule.type 'constant' keeps the peak learning rate"
        )
    if config.model.compute_dtype != "float16":
        yield Unread(("train.init_loss_scale",), "only model.compute_dtype 'float16' reads it")
    if config.train.spike_factor is None:
        yield Unread(("train.spike_window",), "train.spike_factor is null")
    if config.train.on_bad_loss == "stop":
        yield Unread(("train.max_bad_losses",), "train.on_bad_loss 'stop' ends the run at the first bad loss")
    if config.train.eval_every == 0:
        yield Unread(("train.eval_batches",), "train.eval_every 0 evaluates the full validation set once, at the end")


def _by_device(config: Config, target: str) -> Iterator[Unread]:
    """Yields the keys that one device, or a kind of device, does not read."""
    if config.devices == 1:
        alone = ("parallel.comm_fusion", "parallel.transformer_opt", "context.launch_blocking")
        yield Unread((*alone, "train.replica_check_every"), "the job runs on one device")
    if config.parallel.model_parallel == 1:
        yield Unread(("parallel.sequence_parallel",), "only parallel.model_parallel above 1 reads it")
    if config.context.mode == "pynative":
        yield Unread(("context.compile_cache",), "context.mode pynative compiles no graph")
    if target in ("GPU", "CPU"):
        yield Unread(("parallel.transformer_opt",), "only Ascend reads it")
    if not config.reads_text:
        yield Unread(("context.fused_operators",), "only networks of text read it")
    if target in ("Ascend", "CPU"):
        yield Unread(("context.launch_blocking",), "only GPUs read it")
    if target == "CPU":
        yield Unread(("parallel.comm_fusion",), "only Ascend and GPUs read it")


def unread_keys(config: Config) -> set[str]:
    """Returns all keys that no device reads, whatever their value."""
    return {key for one in unread(config) for key in one.keys}


def changed(config: Config, key: str) -> bool:
    """Returns whether a key holds neither its default nor a value with the same effect as the default."""
    section, _, name = key.partition(".")
    value = config.value(key)
    if name.startswith("router."):
        return value != type(config.moe.router.options).model_fields[name.removeprefix("router.")].default
    default = Config.model_fields[section].annotation.model_fields[name].default
    if section == "moe" and name in OFF and value == OFF[name]:
        return False
    if name == "replica_check_every" and value == 0:
        return False
    return value != default


def without_effect(config: Config, target: str = "auto") -> dict[str, Unread]:
    """Returns key -> why it is not read, for all changed keys."""
    found: dict[str, Unread] = {}
    for one in unread(config, target):
        for key in one.keys:
            if key not in found and changed(config, key):
                found[key] = one
    return found


def refused(config: Config) -> dict[str, str]:
    """Returns key -> reason, for the changed keys that are refused because nothing reads them."""
    return {key: one.reason for key, one in without_effect(config).items() if one.refused}


def notes(config: Config, overrides: Sequence[str] = (), target: str = "auto") -> list[str]:
    """Lines for the beginning of a run: keys that have no effect in it, and overrides that another one replaces."""
    told = _told(config, {key: one.reason for key, one in without_effect(config, target).items()})
    return told + old_keys.notes(config.moe.router) + _replaced(overrides)


def notes_of_checkpoint(config: Config, overrides: Sequence[str] = (), exports: bool = False) -> list[str]:
    """Returns the same lines where a checkpoint is evaluated or exported: the keys of the run that would be refused
    today, and the overrides that only training reads.
    """
    what = "an export" if exports else "an evaluation"
    idle = {*TRAINED, *_all_but("train", ("seed", "lora")), *_all_but("optimizer", ()), *_all_but("schedule", ())}
    if config.moe.router != "expert_choice":
        idle.add("moe.capacity_factor")
    idle |= {"moe.eval_capacity_factor", "moe.drop_order"} if exports else set(_all_but("export", ()))
    given = [override.partition("=")[0].strip() for override in overrides]
    unasked = {key: f"{what} does not read it" for key in given if key in idle}
    return _told(config, refused(config) | unasked) + old_keys.notes(config.moe.router) + _replaced(overrides)


def _told(config: Config, reasons: dict[str, str]) -> list[str]:
    """Returns one line of keys, their values and why nothing reads them; an empty list where there are no such keys."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        by_reason.setdefault(reason, []).append(f"{key} {shortened(config.value(key))}")
    parts = [f"{', '.join(keys)} ({reason})" for reason, keys in by_reason.items()]
    return [f"note: keys without effect here: {'; '.join(parts)}"] if parts else []


def _replaced(overrides: Sequence[str]) -> list[str]:
    """Returns a line for each key that several overrides set to different values."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        values.setdefault(key.strip(), []).append(value.strip())
    return [
        f"note: override {shortened(key)} is given {len(given)} times; the last value is used: {shortened(given[-1])}"
        for key, given in values.items()
        if len(set(given)) > 1
    ]
