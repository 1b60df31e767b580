"""Fixtures of Hugging Face, what a model of ours makes of their tokens, and copies with one thing changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from switchyard import config as configuration
from switchyard.checkpoint import store
from switchyard.checkpoint.tensors import read_header
from switchyard.data import Tokenizer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "interop"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/reference.safetensors"))


def references(case: str) -> dict[str, np.ndarray]:
    """Returns tokens and valid [B, S], logits [T, V] of the real tokens, and choices [M, T, K] where there are any."""
    return load_file(FIXTURES / case / "reference.safetensors")


def run(path: Path, tokens: np.ndarray, valid: np.ndarray, **changes: dict) -> tuple[np.ndarray, np.ndarray | None]:
    """Computes (logits [T, V], choices [M, T, K]) of the real tokens by the model of a run folder.

    Args:
        path: the run folder.
        tokens, valid: [B, S].
        changes: section -> keys in the place of those of the run.

    Returns:
        The second is None where there are no experts.
    """
    from mindspore import Tensor, ops

    from switchyard.models import create_model

    held = store.read(path, with_optimizer=False)
    if held.config.moe_layers:
        changes["moe"] = {"record": "not written"} | changes.get("moe", {})
    tree = held.config.model_dump()
    config = configuration.build({name: part | changes.get(name, {}) for name, part in tree.items()}, inherited=True)
    model = create_model(config, Tokenizer.from_json(held.tokenizer_json).vocab_size).set_train(False)
    store.load_weights(model, held.weights)
    logits, _, choices = model(Tensor(tokens), Tensor(valid), ops.zeros((1, 1, 1)))
    real = valid.reshape(-1) > 0
    if not config.moe_layers:
        return logits.asnumpy()[real], None
    layers, chosen = len(config.moe_layers), config.moe.num_experts_chosen
    found = choices.asnumpy().reshape(-1, layers, chosen).transpose(1, 0, 2)  # [N, M * K] -> [M, N, K]
    return logits.asnumpy()[real], found[:, real]


def bits_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Returns name -> (type, shape, bytes) of the tensors in model*.safetensors."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        content = file.read_bytes()
        for name, entry in read_header(file).items():
            assert name not in found
            found[name] = (entry.dtype, entry.shape, content[entry.start : entry.start + entry.bytes])
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Returns config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def changed(case: str, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Copies a case and changes its config.json."""
    shutil.copytree(FIXTURES / case, folder)
    tree = config_of(folder)
    change(tree)
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return folder
