"""Checkpoints of a decoder that was never trained: every tensor has other numbers. No MindSpore in here."""

from pathlib import Path

import numpy as np

from switchyard.checkpoint import store as checkpoint
from switchyard.config import Config, build

LAYERS, EXPERTS, D, F, V = 4, 8, 8, 16, 24


def config_of(**parallel) -> Config:
    """A decoder whose layers 1 and 3 have 8 experts."""
    tree = {
        "model": {"num_layers": LAYERS, "hidden_size": D, "num_heads": 4, "intermediate_size": F, "seq_length": 16},
        "moe": {"expert_num": EXPERTS, "layers": 2},
        "data": {"batch_size": 64},
        "parallel": parallel,
    }
    return build(tree)


def shapes_of() -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.table": (V, D), "norm.weight": (D,)}
    for layer in range(LAYERS):
        own = f"layers.{layer}."
        shapes[own + "attention_norm.weight"] = (D,)
        shapes[own + "attention.qkv.weight"] = (D, 3 * D)
        shapes[own + "attention.out.weight"] = (D, D)
        shapes[own + "feed_forward_norm.weight"] = (D,)
        if layer % 2:
            shapes[own + "feed_forward.router.weight"] = (D, EXPERTS)
            shapes[own + "feed_forward.experts.w_in"] = (EXPERTS, D, F)
            shapes[own + "feed_forward.experts.w_out"] = (EXPERTS, F, D)
        else:
            shapes[own + "feed_forward.w_in"] = (1, D, F)
            shapes[own + "feed_forward.w_out"] = (1, F, D)
    return shapes


def arrays_of(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> tuple[dict, dict]:
    """(weights, optimizer) of those shapes."""
    random = np.random.default_rng(seed)
    weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    optimizer = {
        f"{moment}.{name}": random.random(shape).astype(np.float32)
        for moment in ("moment1", "moment2")
        for name, shape in shapes.items()
    }
    for name in ("correction1", "correction2", "loss_scale"):
        optimizer[name] = random.random(()).astype(np.float32)
    return weights, optimizer | {"good_steps": np.array(7, np.int32)}


def state_of(step: int) -> dict:
    """What a run keeps besides its tensors."""
    return {"step": step, "data_index": step, "train_seed": 1, "noise_rule": "", "best_loss": None, "seconds": 0.5}


def save_whole(run: Path, step: int = 3, shapes: dict | None = None) -> tuple[Path, dict, dict]:
    """(directory, weights, optimizer) of a checkpoint of one device."""
    weights, optimizer = arrays_of(shapes or shapes_of())
    return checkpoint.save(run, config_of(), "{}", weights, optimizer, state_of(step)), weights, optimizer


def slice_by_hand(name: str, array: np.ndarray, parallel: dict, rank: int) -> np.ndarray | None:
    """What a rank holds of a tensor, said as plainly as it can be; None where it is of another stage."""
    dp, ep = parallel.get("data_parallel", 1), parallel.get("expert_parallel", 1)
    tp, pp = parallel.get("model_parallel", 1), parallel.get("pipeline_stage", 1)
    t, e = rank % tp, rank // tp % ep
    o, stage = rank // tp // ep % (dp // ep), rank // tp // dp
    stages = [0, pp - 1] if "embedding" in name else [pp - 1] if "." in name else list(range(pp))
    if "layers." in name:
        stages = [int(name.split("layers.")[1].split(".")[0]) // (LAYERS // pp)]
    if stage not in stages:
        return None
    copies = [(o, dp // ep), (e, ep), (t, tp)]  # of one slice: (which, of how many) of each axis that does not cut it
    if ".experts." in name:
        array, copies[1] = np.split(array, ep, 0)[e], (0, 1)
    axis = 2 if "w_in" in name else 1 if "w_out" in name or "qkv" in name else 0 if "attention.out" in name else None
    if axis is not None:
        array, copies[2] = np.split(array, tp, axis)[t], (0, 1)
    (o, outer), (e, experts), (t, models) = copies
    count, index = outer * experts * models, (o * experts + e) * models + t
    if parallel.get("optimizer_shard") and array.ndim:
        if len(array) % count == 0:
            return np.split(array, count, 0)[index]
        if ("w_in" in name or "w_out" in name) and array.shape[1] % count == 0:  # stacked matrices: the next axis
            return np.split(array, count, 1)[index]
    return array


def content_of(path: Path) -> dict[str, bytes]:
    """Name -> bytes of each file of tensors in a checkpoint."""
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}
