"""Small decoders in several styles, and random tokens for them."""

import numpy as np
from mindspore import Tensor
from oracles.tiny import NO_NOISE

from switchyard.config import Config, build
from switchyard.moe.metrics import SCALARS

VOCABULARY = 13


def decoder_config(model=None, moe=None, batch=2, seed=1) -> Config:
    """Two layers of width 16, with what `model` and `moe` say otherwise."""
    tree = {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_length": 8, "intermediate_size": 20}
    tree |= {"init_method_std": 0.3}  # large enough that every part is seen in the logits
    return build(
        {"model": tree | (model or {}), "moe": moe or {}, "data": {"batch_size": batch}, "train": {"seed": seed}}
    )


def random_tokens(batch=2, length=8, seed=0) -> np.ndarray:
    """Tokens [B, S] int32."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def run_decoder(model, tokens, valid=None, noise=NO_NOISE):
    """Forward on arrays -> (logits [B, S, V], statistics [M, 6 + 2 E] of all groups together, see moe.metrics)."""
    valid = np.ones(tokens.shape, np.float32) if valid is None else valid
    logits, stats, _ = model(Tensor(tokens), Tensor(valid), Tensor(noise))
    stats = stats.asnumpy().sum(0).reshape(len(model.moe_layers), -1) if len(stats) else np.zeros((0, 0))
    return logits.asnumpy().reshape(*tokens.shape, -1), stats


def loads_of(stats: np.ndarray) -> np.ndarray:
    """Statistics [M, 6 + 2 E] -> choices per expert [M, E]."""
    return np.split(stats[:, len(SCALARS) :], 2, axis=1)[0]


EXPERTS = {"expert_num": 4, "router": "top_k", "num_experts_chosen": 2}
VARIANTS = {
    "dense-rotary-tied": ({}, {}),
    "dense-learned-free-layernorm-gelu": (
        {"position": "learned", "tie_word_embeddings": False, "norm": "layernorm", "activation": "gelu"},
        {},
    ),
    "grouped-query-swiglu": ({"n_kv_heads": 2, "activation": "swiglu", "theta": 100.0}, {}),
    "multi-query-free": ({"n_kv_heads": 1, "tie_word_embeddings": False}, {}),
    "experts-everywhere": ({"activation": "swiglu"}, EXPERTS | {"shared_expert_num": 1, "moe_intermediate_size": 7}),
    "experts-in-the-second": ({"n_kv_heads": 2, "position": "learned"}, {"expert_num": 4, "layers": 2}),
}
