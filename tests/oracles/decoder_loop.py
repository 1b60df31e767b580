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
        x = x + np.stack([_attention(rows, _below(part, "attention."), model, index) for rows in normed])
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


def _frequency(i, size, model):
    """Angle of one position for the pair i of a head's rotating columns, by the definition of each scaling."""
    plain, scaling = model.theta ** (-2 * i / size), model.rotary_scaling
    if scaling is None:
        return plain
    if scaling.type == "linear":
        return plain / scaling.factor
    turns = scaling.original_max_position_embeddings * plain / (2 * np.pi)
    if scaling.type == "llama3":
        if turns < scaling.low_freq_factor:
            return plain / scaling.factor
        if turns > scaling.high_freq_factor:
            return plain
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return (1 - smooth) * plain / scaling.factor + smooth * plain

    def pair(wanted):  # whose frequency turns so often
        return size / 2 * np.log(scaling.original_max_position_embeddings / (wanted * 2 * np.pi)) / np.log(model.theta)

    low, high = max(np.floor(pair(scaling.beta_fast)), 0), min(np.ceil(pair(scaling.beta_slow)), size - 1)
    ramp = min(max((i - low) / (high - low), 0), 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp)


def _magnitude(model):
    """What cosines and sines are multiplied by: 0.1 ln(factor) + 1 for yarn, or what is given."""
    scaling = model.rotary_scaling
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return scaling.attention_factor or 0.1 * np.log(scaling.factor) + 1


def _rotate(vector, position, model):
    """Turns the pair (i, i + r / 2) of the first r columns by position times its frequency."""
    size = int(len(vector) * model.partial_rotary)
    half, turned = size // 2, vector.copy()
    for i in range(half):
        angle = position * _frequency(i, size, model)
        cos, sin = np.cos(angle) * _magnitude(model), np.sin(angle) * _magnitude(model)
        turned[i] = vector[i] * cos - vector[i + half] * sin
        turned[i + half] = vector[i + half] * cos + vector[i] * sin
    return turned


def _heads_normed(heads, gain, model):
    """RMSNorm of [S, X, h]: over each head, or over all X heads of a position."""
    axis = (1, 2) if model.qk_norm == "full" else 2
    gain = gain.reshape(heads.shape[1:]) if model.qk_norm == "full" else gain
    return heads / np.sqrt((heads**2).mean(axis, keepdims=True) + model.norm_eps) * gain


def _attention(rows, weights, model, layer):
    """One sequence [S, D]: every head, every position."""
    heads, size = model.num_heads, model.head_size or model.hidden_size // model.num_heads
    kv_heads = model.n_kv_heads or heads
    repeat = heads // kv_heads
    qkv = rows @ weights["qkv.weight"] + weights.get("qkv.bias", 0)
    qkv = qkv.reshape(len(rows), kv_heads, repeat + 2, size)
    queries, keys = qkv[:, :, :repeat].reshape(len(rows), heads, size), qkv[:, :, repeat]
    if model.qk_norm:
        queries = _heads_normed(queries, weights["qk_norm.queries.gain"], model)
        keys = _heads_normed(keys, weights["qk_norm.keys.gain"], model)
    far = model.sliding_window or len(rows)
    far = far if model.window_layers == "all" or layer in model.window_layers else len(rows)
    mixed = np.zeros((len(rows), heads, size))
    for head in range(heads):
        query, key, value = queries[:, head], keys[:, head // repeat], qkv[:, head // repeat, repeat + 1]
        if model.position == "rotary":
            query = [_rotate(vector, s, model) for s, vector in enumerate(query)]
            key = [_rotate(vector, s, model) for s, vector in enumerate(key)]
        for s in range(len(rows)):
            seen = [t for t in range(s + 1) if s - t < far]
            scores = np.array([query[s] @ key[t] for t in seen]) / np.sqrt(size)
            share = np.exp(scores - scores.max())
            mixed[s, head] = sum(w * value[t] for t, w in zip(seen, share / share.sum()))
    return mixed.reshape(len(rows), -1) @ weights["out.weight"] + weights.get("out.bias", 0)
