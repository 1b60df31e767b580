"""Merges low-rank adapters into the weights beside them: W + A B alpha / r (arXiv 2106.09685, section 4.1).

`python -m switchyard.checkpoint merge RUN --out DIR` writes a checkpoint without adapters; export.py merges by itself.
"""

import re
from pathlib import Path

import numpy as np

from switchyard.checkpoint.manifest import KINDS, read_manifest, read_texts
from switchyard.checkpoint.reader import Tensors
from switchyard.checkpoint.writer import assemble, from_arrays, publish, write_shards
from switchyard.config import Config
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import on_one_device
from switchyard.errors import UserError
from switchyard.files import unfinished

ADAPTER = re.compile(r"(.*)\.lora(_in|_gate|_out)?\.[ab]")


def is_adapter(name: str) -> bool:
    """Returns whether a parameter, by its name, belongs to a low-rank adapter."""
    return ADAPTER.fullmatch(name) is not None


def beside(name: str) -> str:
    """Returns the name of the weight that an adapter stands beside."""
    prefix, which = ADAPTER.fullmatch(name).groups()
    return f"{prefix}.w{which}" if which else f"{prefix}.weight"


def merged(config: Config, weights: dict[str, np.ndarray]) -> tuple[Config, dict[str, np.ndarray]]:
    """Returns a configuration and weights without adapters, which compute the same; those without adapters as they are.

    Args:
        config: of the weights.
        weights: full tensors by name; they are left as they are.
    """
    lora = config.train.lora
    if lora is None:
        return config, weights
    found = {name: value for name, value in weights.items() if not is_adapter(name)}
    for name in filter(is_adapter, weights):
        if name.endswith(".a"):
            a, b = (weights[f"{name[:-1]}{which}"].astype(np.float64) for which in "ab")  # [.., I, r], [.., r, O]
            found[beside(name)] = (found[beside(name)] + a @ b * (lora.alpha / lora.rank)).astype(np.float32)
    return config.model_copy(update={"train": config.train.model_copy(update={"lora": None})}), found


def merge(path: Path, out: Path) -> Config:
    """Writes a checkpoint as one without adapters, for one device; it holds no state of an optimizer.

    Args:
        path: the directory of the checkpoint.
        out: the new directory, which appears in full or not at all.

    Returns:
        The configuration of the new checkpoint.

    Raises:
        UserError: a damaged checkpoint, one without adapters, or `out` exists.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"--out: '{out}' already exists; remove it or give another folder")
    manifest = read_manifest(path)
    old, tokenizer_json, state = read_texts(manifest)
    if old.train.lora is None:
        raise UserError(f"checkpoint '{path}': holds no adapters (train.lora: null); there is nothing to merge")
    tensors = Tensors(manifest, "weights")
    config, weights = merged(on_one_device(old), {name: tensors.read_finite(name) for name in tensors.entries})
    degrees, layers = ParallelDims(), config.model.num_layers
    parts = [from_arrays(arrays, degrees, 0, layers) for arrays in (weights, {})]
    entries, read = (dict(zip(KINDS, part)) for part in zip(*parts))
    with unfinished(out.absolute()) as folder:
        write_shards(folder, degrees, layers, 0, entries, read)
        assemble(folder, config, tokenizer_json, state, degrees, wait=0)
        publish(folder, out.absolute())
    return config
