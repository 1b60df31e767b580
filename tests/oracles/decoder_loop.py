"""The decoder in plain numpy: attention as a loop over sequences, heads and positions, in float64.

Weights are a dict with the parameter names of `Decoder`. The conditional layers are `moe_loop`.
Legend: B batch, S sequence, D width, H query heads, J key/value heads, h head size, V vocabulary.
"""

import numpy as np
from oracles.moe_loop import Rules, moe_loop, work


def decoder_loop(weights: dict, config, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of a dropless forward pass without dropout: tokens [B, S]."""
    model = config.model
    x = weights["embedding.table"][tokens]  # [B, S, D]
    if model.position == "learned":
        x = x + weights["position.table"][: tokens.shape[1]]
    for index in range(model.num_layers):
        part = _below(weights, f"layers.{index}.")
        normed = _norm(x, _below(part, "attention_norm."), model)
        x = x + np.stack([_attention(rows, _below(part, "attention."), model) for rows in normed])
        normed = _norm(x, _below(part, "feed_forward_norm."), model)
        x = x + _feed_forward(normed, _below(part, "feed_forward."), index in config.moe_layers, config)
    x = _norm(x, _below(weights, "norm."), model)
    return x @ (weights["embedding.table"].T if model.tie_word_embeddings else weights["head.weight"])


def _below(weights, prefix):
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _norm(x, weights, model):
    if model.norm == "rmsnorm":
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_eps) * weights["gain"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + model.norm_eps) * weights["gain"] + weights["bias"]


def _feed_forward(x, weights, conditional, config):
    kind = config.model.activation
    if not conditional:
        named = {f"dense.{name}": value for name, value in weights.items()}
        return np.stack([[work(row, named, "dense", 0, kind) for row in rows] for rows in x])
    normalise = config.moe.router.given().get("norm_topk_prob") and config.moe.num_experts_chosen > 1
    rules = Rules(kind, config.moe.num_experts_chosen, normalise)
    return moe_loop(x, np.ones(x.shape[:2]), weights, rules).out


def _rotate(vector, position, theta):
    """Turns the pair (i, i + h / 2) by position * theta^(-2 i / h)."""
    half = len(vector) // 2
    turned = np.empty_like(vector)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(vector))
        turned[i] = vector[i] * np.cos(angle) - vector[i + half] * np.sin(angle)
        turned[i + half] = vector[i + half] * np.cos(angle) + vector[i] * np.sin(angle)
    return turned


def _attention(rows, weights, model):
    """One sequence [S, D]: every head, every position."""
    heads, size = model.num_heads, model.hidden_size // model.num_heads
    kv_heads = model.n_kv_heads or heads
    repeat = heads // kv_heads
    qkv = (rows @ weights["qkv.weight"]).reshape(len(rows), kv_heads, repeat + 2, size)
    mixed = np.zeros((len(rows), heads, size))
    for head in range(heads):
        group, place = divmod(head, repeat)
        query, key, value = qkv[:, group, place], qkv[:, group, repeat], qkv[:, group, repeat + 1]
        if model.position == "rotary":
            query = [_rotate(vector, s, model.theta) for s, vector in enumerate(query)]
            key = [_rotate(vector, s, model.theta) for s, vector in enumerate(key)]
        for s in range(len(rows)):
            scores = np.array([query[s] @ key[t] for t in range(s + 1)]) / np.sqrt(size)
            share = np.exp(scores - scores.max())
            mixed[s, head] = sum(w * value[t] for t, w in enumerate(share / share.sum()))
    return mixed.reshape(len(rows), -1) @ weights["out.weight"]
