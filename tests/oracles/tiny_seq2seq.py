"""Small encoder-decoders, and random pairs of inputs and targets for them."""

import numpy as np

from switchyard.config import build
from switchyard.config.seq2seq import PAD

VOCABULARY, LENGTH, TARGETS = 20, 9, 4
MOE = {"expert_num": 4, "layers": 2, "jitter": 0.1}


def seq2seq_config(moe=None, model=None, **sections):
    """Two layers a stack of width 16, every second of them with 4 experts, unless the sections say otherwise."""
    tree = {"type": "seq2seq", "num_layers": 2, "hidden_size": 16, "num_heads": 4, "seq_length": LENGTH}
    tree |= {"intermediate_size": 20, "dropout": 0.0}
    seq2seq = {"noise_density": 0.2, "initializer_factor": 1.0, "sentinels": 4, "relative_attention_num_buckets": 8}
    seq2seq |= {"relative_attention_max_distance": 10}
    found = {"model": tree | (model or {}), "moe": MOE if moe is None else moe, "seq2seq": seq2seq}
    return build(found | {"data": {"batch_size": 2}} | sections)


def random_pair(batch=2, seed=0):
    """Tokens [B, S + T] without padding, valid [B, T]."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCABULARY, (batch, LENGTH + TARGETS)).astype(np.int32)
    tokens[:, LENGTH] = PAD
    return tokens, np.ones((batch, TARGETS), np.float32)
