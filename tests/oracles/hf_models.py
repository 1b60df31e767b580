"""Fixtures of Hugging Face, and what a model of ours makes of their tokens."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from switchyard.checkpoint import store
from switchyard.data import Tokenizer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "interop"
CASES = sorted(path.name for path in FIXTURES.iterdir())


def references(case: str) -> dict[str, np.ndarray]:
    """Returns tokens and valid [B, S], logits [T, V] of the real tokens, and choices [M, T, K] where there are any."""
    return load_file(FIXTURES / case / "reference.safetensors")


def run(path: Path, tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Computes (logits [T, V], choices [M, T, K]) of the real tokens by the model of a run folder; None without
    experts.
    """
    from mindspore import Tensor, ops

    from switchyard.models import create_model

    held = store.read(path, with_optimizer=False)
    config = held.config
    if config.moe_layers:
        config = config.model_copy(update={"moe": config.moe.model_copy(update={"record": "not written"})})
    model = create_model(config, Tokenizer.from_json(held.tokenizer_json).vocab_size).set_train(False)
    store.load_weights(model, held.weights)
    logits, _, choices = model(Tensor(tokens), Tensor(valid), ops.zeros((1, 1, 1)))
    real = valid.reshape(-1) > 0
    if not config.moe_layers:
        return logits.asnumpy()[real], None
    layers, chosen = len(config.moe_layers), config.moe.num_experts_chosen
    found = choices.asnumpy().reshape(-1, layers, chosen).transpose(1, 0, 2)  # [N, M * K] -> [M, N, K]
    return logits.asnumpy()[real], found[:, real]
