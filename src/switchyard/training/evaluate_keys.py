"""Checks the keys by which one process or several evaluate or export a checkpoint.

No MindSpore in here: the launch scripts' --dry-run asks it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from switchyard import config as configuration
from switchyard.checkpoint.manifest import read_manifest, read_texts
from switchyard.checkpoint.store import resolve
from switchyard.config import Config
from switchyard.distributed.processes import on_one_device
from switchyard.errors import UserError
from switchyard.training.limits import check_mesh, of_sizes, refuse
from switchyard.trust import check_trusted_section

# what an override may not change: these decide names and shapes of the weights
SHAPE_KEYS = (
    "model.type",
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.n_kv_heads",
    "model.head_size",
    "model.qk_norm",
    "model.attention_bias",
    "model.intermediate_size",
    "model.norm",
    "model.position",
    "model.activation",
    "model.tie_word_embeddings",
    "moe.expert_num",
    "moe.experts",
    "moe.layers",
    "moe.moe_intermediate_size",
    "moe.shared_expert_num",
    "moe.shared_intermediate_size",
    "moe.granularity",
    "seq2seq.num_decoder_layers",
    "seq2seq.relative_attention_num_buckets",
    "seq2seq.sentinels",
    "vision.image_size",
    "vision.channels",
    "vision.classes",
    "vision.tasks",
    "vision.pool",
    "vision.regions",
    "vision.channel_groups",
    "cascade.stages",
)
OF_TRAINING = {"train": {"distill": None, "eval_every": 0, "gradient_accumulation_steps": 1}}
NOT_TOGETHER = (  # key -> its usual value, and why another one is refused
    ("parallel.pipeline_stage", 1, "evaluation runs no pipeline: 1, and more expert_parallel or model_parallel"),
    ("parallel.optimizer_shard", 0, "evaluation has no optimizer: 0, and more expert_parallel or model_parallel"),
    ("parallel.recompute", False, "evaluation has no backward pass: false"),
    ("moe.record", None, "choices are recorded by one process: leave it out"),
    ("moe.replay", None, "choices are replayed by one process: leave it out"),
)


def degrees_of_job(
    trained: Config,
    overrides: Sequence[str],
    count: int,
    target_of: Callable,
    trust_code: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Config, bool]:
    """Returns (the configuration by which `count` processes evaluate, whether the compiler shards the program).

    The degrees are those of the overrides; what they leave of the processes is data_parallel.

    Args:
        trained: of the checkpoint; its own degrees play no part.
        overrides: `section.key=value`.
        count: of processes.
        target_of: a section `context` -> the device it means.
        trust_code: whether classes that the checkpoint names, in files of somebody's own, may be imported: what a
            router can do stands in its class.
        say: receives the line about what is imported.

    Raises:
        UserError: degrees or keys that several processes do not evaluate with, a class that is not trusted.
    """
    tree = on_one_device(trained).model_dump()
    tree["moe"] |= {"record": None, "replay": None}  # those of the training run
    tree["train"] |= OF_TRAINING["train"]
    tree["parallel"] = {}
    config = configuration.build(tree, overrides, inherited=True, devices=count)
    check_trusted_section(config.moe, trust_code, say, overrides)
    keep_shapes(trained, config)
    for key, usual, why in NOT_TOGETHER:
        if config.value(key) != usual:
            raise UserError(f"{key}: {config.value(key)}; {why}")
    if config.model.type == "cascade":
        raise UserError("model.type: cascade; a cascade is evaluated by one process: start eval.py by itself")
    target = target_of(config.context)
    by_processes = check_mesh(config, count, target)
    refuse(of_sizes(config, target))
    return config, by_processes is None


def degrees_of_export(trained: Config, overrides: Sequence[str], count: int, target_of: Callable, *more) -> Config:
    """Returns the configuration by which `count` processes export a checkpoint; arguments as of `degrees_of_job`.

    Raises:
        UserError: a network without text or without experts, or degrees that do more than share the experts.
    """
    config, _ = degrees_of_job(trained, overrides, count, target_of, *more)
    if not config.reads_text:
        raise UserError(f"model.type: {config.model.type}; such a network is exported by one process: export.py alone")
    if not config.moe_layers:
        raise UserError("moe.expert_num: 1; there are no experts that processes could share: export.py alone")
    for key, wanted in (("expert_parallel", count), ("model_parallel", 1)):
        if getattr(config.parallel, key) != wanted:
            raise UserError(
                f"parallel.{key}: {getattr(config.parallel, key)}; {count} processes share the experts of an export "
                f"and nothing else: parallel.{key}={wanted}"
            )
    return config


def config_of(path: str | Path) -> Config:
    """Returns the configuration of a checkpoint, or of a run's newest one (UserError: there is none; DamagedError)."""
    return read_texts(read_manifest(resolve(path)))[0]


def overridden(config: Config, overrides: list[str] | tuple[str, ...]) -> Config:
    """Returns the configuration of a checkpoint with overrides that keep the weights' shapes (UserError)."""
    tree = on_one_device(config).model_dump()
    tree["moe"] |= {"record": None, "replay": None}  # those of the training run
    changed = configuration.build(tree, overrides, inherited=True)
    keep_shapes(config, changed)
    return changed


def keep_shapes(config: Config, changed: Config) -> None:
    """Refuses a changed configuration that would change the weights' shapes (UserError)."""
    learned = config.model.position == "learned"
    for key in (*SHAPE_KEYS, "train.lora", *(("model.seq_length",) if learned else ())):
        section, name = key.split(".")
        old, new = getattr(getattr(config, section), name), getattr(getattr(changed, section), name)
        if old != new:
            raise UserError(f"{key}: {new}; the checkpoint's weights were trained with {old}: leave the override out")
