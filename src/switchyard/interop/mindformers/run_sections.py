"""Translates what files of MindFormers say of a run: optimizer, rates, batches, device. No MindSpore in here."""

from typing import Any

from switchyard.errors import UserError, represented
from switchyard.interop.mindformers.reader import UNKNOWN, Left, Reader
from switchyard.interop.mindformers.sections import NUMBER

CURVES = {"CosineWithWarmUpLR": "cosine", "LinearWithWarmUpLR": "linear", "ConstantWarmUpLR": "constant"}
LATE = "the first update has warmup_lr_init there: each rate comes one step earlier here"
TEXT = "give data.path: text, or a folder of python -m switchyard.data.prepare"
OWN_LOADER, DATASETS = "SwitchyardDataLoader", ("train_dataset", "train_dataset_task")
OURS = ("model", "moe_config", "parallel_config", "optimizer", "lr_schedule", "runner_config", "runner_wrapper",
        "recompute_config", "context", "callbacks", "parallel", "seed", "output_dir")  # fmt: skip
# keys of the whole file that have no counterpart -> (a value that changes nothing, why)
TOP = {
    "train_dataset": (None, TEXT),
    "train_dataset_task": (None, TEXT),
    "eval_dataset": (None, "data.val_fraction and data.val_path say what is evaluated"),
    "eval_dataset_task": (None, "data.val_fraction and data.val_path say what is evaluated"),
    "do_eval": (False, "train.eval_every says when"),
    "eval_step_interval": (None, "train.eval_every says when"),
    "eval_epoch_interval": (-1, "train.eval_every says when"),
    "load_checkpoint": ("", "weights of MindFormers' checkpoints are not read"),
    "pretrained_model_dir": (None, "weights and configuration of a folder of Hugging Face are not read here"),
    "resume_training": (False, "train.py --resume goes on with a run"),
    "use_legacy": (None, "which stack of MindFormers reads the file"),
    "use_parallel": (None, "the scripts of several devices start the processes"),
    "run_mode": ("train", "train.py trains"),
    "micro_batch_interleave_num": (1, "no interleaved halves of a batch"),
    "monitor_config": (None, "metrics.jsonl has loss, norms and expert loads"),
    "grouped_lr_schedule": (None, "all weights have one learning rate"),
    "swap_config": (None, "nothing is swapped to the host"),
    "lr_scale": (False, "the learning rate is given as it is"),
    "layer_scale": (False, "all layers have one learning rate"),
    "profile": (False, "no profiler"),
    "calculate_per_token_loss": (False, "the loss is a mean over tokens"),
    "print_separate_loss": (None, "metrics.jsonl has every loss by itself"),
    "use_skip_data_by_global_norm": (False, "steps without finite gradients are skipped, others are not"),
}
FORMATS = (
    "trainer", "auto_trans_ckpt", "load_ckpt_format", "only_save_strategy", "src_strategy_path_or_dir",
    "transform_process_num", "remove_redundancy", "remote_save_url", "auto_tune", "autotune_per_step",
    "filepath_prefix", "init_start_profile", "profile_start_step", "profile_stop_step", "profile_communication",
    "profile_memory", "profiler_level", "train_precision_sync", "infer_precision_sync", "eval_callbacks", "metric",
    "processor", "generation_config", "lr_scale_factor", "layer_decay", "use_legacy_format", "checkpoint",
    "tensorboard", "ignore_data_skip", "data_skip_steps", "load_ckpt_async",
)  # fmt: skip


def read_top(theirs: dict[str, Any], model: dict[str, Any]) -> tuple[list[Left], list[str]]:
    """Returns the keys of a whole file that have no counterpart, and those that this package decides by itself."""
    left, decided = [], []
    for key, value in theirs.items():
        usual, why = TOP.get(key, (None, UNKNOWN))
        if key in OURS or value in (None, usual):
            continue
        if key in FORMATS or (key in DATASETS and uses_own_data(theirs)):
            decided.append(key)
        else:
            left.append(Left(key, value, why))
    others = [key for key in model if key not in ("model_config", "arch")]
    return left + [Left(f"model.{key}", model[key], UNKNOWN) for key in others], decided


def uses_own_data(theirs: dict[str, Any]) -> bool:
    """Returns whether the training text comes through SwitchyardDataLoader."""
    dataset = theirs.get("train_dataset")
    loader = dataset.get("data_loader") if isinstance(dataset, dict) else None
    return isinstance(loader, dict) and loader.get("type") == OWN_LOADER


def read_run(theirs: dict[str, Any], tree: dict[str, dict[str, Any]]) -> list[Reader]:
    """Adds the sections of a run to `tree`, and returns the readers of all that was read."""
    readers = {}
    for name in (
        "optimizer",
        "lr_schedule",
        "runner_config",
        "runner_wrapper",
        "recompute_config",
        "parallel",
        "context",
    ):
        section = theirs.get(name) or {}
        if not isinstance(section, dict):
            raise UserError(f"{name}: {represented(section)}; must be a mapping of keys")
        readers[name] = Reader(name, section)
    train = read_runner(readers["runner_config"], tree, uses_own_data(theirs)) | read_callbacks(
        theirs.get("callbacks") or []
    )
    train |= {key: theirs[key] for key in ("seed", "output_dir") if theirs.get(key) is not None}
    train |= tree.pop("train", {})  # of a model of this package
    readers["data_loader"] = read_own_data(theirs.get("train_dataset"), tree, train)
    schedule = read_schedule(readers["lr_schedule"], train)
    optimizer = read_optimizer(readers["optimizer"], readers["runner_wrapper"], train, schedule)
    parallel = read_degrees(readers["parallel"], readers["recompute_config"])
    context = read_context(readers["context"])
    found = {"optimizer": optimizer, "schedule": schedule, "train": train, "context": context}
    tree.update({name: section for name, section in found.items() if section})
    if parallel:
        tree["parallel"] = tree.get("parallel", {}) | parallel
    return list(readers.values())


def read_own_data(dataset: Any, tree: dict[str, dict[str, Any]], train: dict[str, Any]) -> Reader:
    """Reads the text of SwitchyardDataLoader into the section `data`; other loaders have no counterpart, see TOP."""
    if not uses_own_data({"train_dataset": dataset}):
        return Reader("data_loader", {})
    reader = Reader("train_dataset.data_loader", dataset["data_loader"])
    found = {name: reader.take(name) for name in ("path", "tokenizer", "val_fraction")}
    tree["data"] = tree.get("data", {}) | {name: value for name, value in found.items() if value is not None}
    steps = reader.take("steps", kind=int)
    if steps is not None:
        train.setdefault("steps", steps * train.pop("epochs", 1))
    train.pop("epochs", None)
    reader.skip("type", "auto_register", "seq_length", "seed")
    return reader


def read_runner(reader: Reader, tree: dict[str, dict[str, Any]], counted: bool) -> dict[str, Any]:
    """Reads batches and steps; the batch of all devices goes into the section `data`.

    `counted`: the steps of an epoch are known, and the result has `epochs`.
    """
    size = reader.take("batch_size", kind=int)
    if size is not None:
        tree["data"] = {"batch_size": size * tree.get("parallel", {}).get("data_parallel", 1)}
    train = {"gradient_accumulation_steps": reader.take("gradient_accumulation_steps", default=1, kind=int)}
    stop = reader.take("stop_step", kind=int)
    if stop:
        train["steps"] = stop
    elif counted:
        train["epochs"] = reader.take("epochs", default=1, kind=int)
    else:
        reader.leave("epochs", "train.steps counts optimizer steps: set it")
    reader.skip("sink_mode", "sink_size", "num_classes")
    return train if reader.values else {}


def read_schedule(reader: Reader, train: dict[str, Any]) -> dict[str, Any]:
    """Reads the learning rate: update g, from 0, has there the rate that update g + 1, from 1, has here.

    With peak p and W' warm-up steps MindFormers gives update g the rate init + (p - init) g / W'. This package gives it
    p (g + 1) / W. Both are equal where W = W' + 1 and init = p / W; the curves behind end one step apart, too.
    """
    if not reader.values:
        return {}
    kind = reader.take("type", default="ConstantWarmUpLR", kind=str)
    if kind not in CURVES:
        reader.leave("type", f"one of {', '.join(CURVES)}")
    peak = float(reader.take("learning_rate", default=1e-3, kind=NUMBER))
    end = float(reader.take("lr_end", default=0.0, kind=NUMBER))
    total, warmup = read_steps(reader, train)
    init = float(reader.take("warmup_lr_init", default=0.0, kind=NUMBER))
    same = warmup == 0 or abs(init * (warmup + 1) - peak) <= 1e-6 * peak
    if not same:
        reader.left.append(Left("lr_schedule.warmup_lr_init", init, LATE))
    reader.leave(("decay_steps", "decay_ratio"), "the curve ends at schedule.total_steps")
    reader.leave("num_cycles", "half a wave", 0.5)
    curve = CURVES.get(kind, "cosine")
    found = {"type": curve, "learning_rate": peak, "lr_end": peak if curve == "constant" else end}
    found["warmup_steps"] = warmup + 1 if same else warmup
    if total and curve != "constant":
        found["total_steps"] = total + 1 if same else total
    return found


def read_steps(reader: Reader, train: dict[str, Any]) -> tuple[int | None, int]:
    """Reads (total steps, None where epochs decide; steps of warm-up)."""
    total = reader.take("total_steps", kind=int)
    total = total if total and total > 0 else train.get("steps")
    warmup = reader.take("warmup_steps", default=0, kind=int)
    ratio = reader.take("warmup_ratio", kind=NUMBER)
    if ratio and total:
        warmup = int(total * ratio)
    elif ratio:
        reader.leave("warmup_ratio", "needs total_steps: set schedule.warmup_steps")
    reader.leave("warmup_epochs", "set schedule.warmup_steps")
    return total, warmup


def read_optimizer(reader: Reader, wrapper: Reader, train: dict[str, Any], schedule: dict[str, Any]) -> dict[str, Any]:
    """Reads AdamW, and of the wrapper what clips gradients and scales the loss."""
    kind = reader.take("type", default="AdamW", kind=str)
    if reader.values and kind not in ("AdamW", "FusedAdamW"):
        reader.leave("type", "only AdamW")
    betas = reader.take("betas", default=[0.9, 0.999], kind=list)
    if len(betas) != 2:
        raise UserError(f"optimizer.betas: {betas}; must be two numbers")
    found = {
        "beta1": float(betas[0]),
        "beta2": float(betas[1]),
        "eps": float(reader.take("eps", default=1e-8, kind=NUMBER)),
        "weight_decay": float(reader.take("weight_decay", default=0.0, kind=NUMBER)),
    }
    rate = reader.take("learning_rate", kind=NUMBER)
    if rate is not None and not schedule:
        schedule |= {"type": "constant", "learning_rate": float(rate), "lr_end": float(rate), "warmup_steps": 0}
    reader.leave("swap", "nothing is swapped to the host", False)
    return (found if reader.values else {}) | read_wrapper(wrapper, train)


def read_wrapper(reader: Reader, train: dict[str, Any]) -> dict[str, Any]:
    """Reads the wrapper of a step: the largest norm of gradients, and the first loss scale into `train`."""
    kind = reader.take("type", default="MFTrainOneStepCell", kind=str)
    if kind not in ("MFTrainOneStepCell", "MFPipelineWithLossScaleCell", "SwitchyardTrainOneStepCell"):
        reader.leave("type", "train.py has a step of its own")
    reader.skip("auto_register", "micro_batch_num", "parallel_config", "calculate_per_token_loss")
    scale = reader.take("scale_sense")
    if isinstance(scale, dict):
        train["init_loss_scale"] = float(scale.get("loss_scale_value", 65536))
    elif isinstance(scale, int | float) and scale != 1:
        reader.leave("scale_sense", "the loss scale of float16 is dynamic here")
    reader.leave("local_norm", "metrics.jsonl has the global norm", False)
    if not reader.values:
        return {}
    clips = reader.take("use_clip_grad", default=False, kind=bool)
    norm = reader.take("max_grad_norm", default=1.0, kind=NUMBER)
    return {"clip_grad": float(norm) if clips else None}


def read_degrees(reader: Reader, recompute: Reader) -> dict[str, Any]:
    """Reads what MindSpore's parallel context and recomputation add to the section `parallel`."""
    found = {}
    if reader.take("enable_parallel_optimizer", default=False, kind=bool):
        level = (reader.take("parallel_optimizer_config", default={}) or {}).get("optimizer_level", "level1")
        found["optimizer_shard"] = 3 if level == "level3" else 1
    reader.take("parallel_optimizer_config")
    reader.leave("parallel_mode", "semi-automatic parallelism, or explicit collectives", 1)
    reader.skip("gradients_mean", "enable_alltoall", "full_batch", "dataset_strategy", "search_mode", "device_num")
    reader.skip("strategy_ckpt_config", "loss_repeated_mean", "strategy_ckpt_save_file")
    reader.leave("pipeline_config", "stages work one forward, one backward", None)
    if recompute.take("recompute") is True:
        found["recompute"] = True
    elif recompute.values.get("recompute"):
        recompute.leave("recompute", "all layers are recomputed, or none")
    names = ("select_recompute", "select_comm_recompute", "select_recompute_exclude", "select_comm_recompute_exclude")
    recompute.leave(names, "all layers are recomputed, or none", False)
    recompute.skip("parallel_optimizer_comm_recompute", "mp_comm_recompute", "recompute_slice_activation")
    return found


def read_context(reader: Reader) -> dict[str, Any]:
    """Reads the device."""
    found = {}
    target = reader.take("device_target", kind=str)
    if target is not None:
        found["device_target"] = target
    mode = reader.take("mode")
    if mode is not None:
        found["mode"] = "pynative" if mode in (1, "1", "PYNATIVE_MODE") else "graph"
    reader.skip(
        "device_id", "max_call_depth", "save_graphs", "save_graphs_path", "max_device_memory", "mempool_block_size"
    )
    reader.skip("memory_optimize_level", "jit_config", "affinity_cpu_list", "enable_graph_kernel", "graph_kernel_flags")
    reader.leave("ascend_config", "parallel.transformer_opt has MindSpore's switches")
    return found


def read_callbacks(callbacks: Any) -> dict[str, Any]:
    """Reads when a run logs and saves: MFLossMonitor and CheckpointMonitor; other callbacks are MindFormers' own."""
    if not isinstance(callbacks, list) or not all(isinstance(one, dict) for one in callbacks):
        raise UserError(f"callbacks: {represented(callbacks)}; must be a list of mappings with a type")
    found = {}
    for one in callbacks:
        if one.get("type") == "MFLossMonitor" and "per_print_times" in one:
            found["log_every"] = one["per_print_times"]
        if one.get("type") == "CheckpointMonitor":
            found |= {"checkpoint_every": one["save_checkpoint_steps"]} if "save_checkpoint_steps" in one else {}
            found |= {"keep_checkpoints": one["keep_checkpoint_max"]} if "keep_checkpoint_max" in one else {}
    return found
