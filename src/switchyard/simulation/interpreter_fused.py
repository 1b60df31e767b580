"""Implements fused operators of Ascend in numpy.

They do what MindSpore 2.9 documents of them; see interpreter_ops.

Legend: N rows, D width, B batch, H query heads, J key/value heads, S queries, T keys, h head size.
"""

import numpy as np

from switchyard.simulation.interpreter_ops import operator, sigmoid


@operator("RmsNorm")
def rms_norm(_, x, gain, eps):
    """Returns x / sqrt(mean(x^2) + eps) * gain over the last axis, and 1 / sqrt(..) [N, 1] in float32."""
    wide = x.astype(np.float32)
    scale = (1 / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(eps))).astype(np.float32)
    return (wide * scale * gain.astype(np.float32)).astype(x.dtype), scale


@operator("RmsNormGrad")
def rms_norm_grad(_, d_out, x, scale, gain):
    """Returns the gradients of the rows and, in float32, of the gain."""
    normed, d_normed = x * scale, d_out * gain
    d_x = scale * (d_normed - normed * (d_normed * normed).mean(-1, keepdims=True))
    return d_x.astype(d_out.dtype), (d_out * normed).sum(0).astype(np.float32)


@operator("Swiglu")
def swiglu(_, x, axis):
    """Returns a * sigmoid(a) * b of the halves a, b along an axis."""
    a, b = np.split(x, 2, int(axis))
    return a * sigmoid(a) * b


@operator("SwigluGrad")
def swiglu_grad(_, d_out, x, axis):
    """Returns the gradient of both halves."""
    a, b = np.split(x, 2, int(axis))
    gate = sigmoid(a)
    return np.concatenate([d_out * b * gate * (1 + a * (1 - gate)), d_out * a * gate], int(axis))


# ---- attention, layout BNSD, without dropout; a mask of 1 hides
def attention_weights(query, key, mask, heads, scale, before, after):
    """Returns the softmax of the scores [B, J, H / J, S, T] in float32, its largest scores and its sums [B, H, S, 1].

    `before`, `after`: keys that far before and after a query are computed, others are not, whatever the mask says.
    """
    batch, number, count, size = query.shape
    assert number == heads and number % key.shape[1] == 0, "heads of FlashAttentionScore"
    grouped = query.astype(np.float32).reshape(batch, key.shape[1], -1, count, size)
    scores = scale * (grouped @ key.astype(np.float32)[:, :, None].swapaxes(-1, -2))  # [B, J, H / J, S, T]
    far = np.arange(key.shape[2]) - np.arange(count)[:, None]  # [S, T]
    hidden = (far > after) | (-far > before)
    if mask is not None:
        assert mask.shape == hidden.shape, "attn_mask [S, T]"
        hidden = hidden | (mask != 0)
    scores = np.where(hidden, -np.inf, scores)
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    rows = (batch, number, count, 1)
    return weights / total, largest.reshape(rows), total.reshape(rows)


def checked_settings(shift, drop, padding, prefix, lengths, keep, layout, sparse):
    """Refuses what this project does not ask for (AssertionError)."""
    unused = (shift, drop, padding, prefix, *lengths)
    bnsd = layout in ("BNSD", 1)  # the compiler writes the layout as a number
    assert all(part is None for part in unused) and keep == 1 and bnsd and not int(sparse), "FlashAttentionScore"


@operator("FlashAttentionScore")
def flash_attention(_, query, key, value, shift, drop, padding, mask, prefix, *rest):
    """Queries [B, H, S, h], keys and values [B, J, T, h] -> (largest scores and sums [B, H, S, 8], unused, out)."""
    query_lengths, key_lengths, heads, keep, scale, before, after, _, layout, sparse = rest
    checked_settings(shift, drop, padding, prefix, (query_lengths, key_lengths), keep, layout, sparse)
    weights, largest, total = attention_weights(query, key, mask, heads, scale, before, after)
    out = (weights @ value.astype(np.float32)[:, :, None]).reshape(query.shape).astype(query.dtype)
    return np.repeat(largest, 8, -1), np.repeat(total, 8, -1), np.zeros(1, query.dtype), out


@operator("FlashAttentionScoreGrad")
def flash_attention_grad(_, query, key, value, d_out, shift, drop, padding, mask, largest, total, *rest):
    """Returns the gradients of queries, keys, values, and of the absent shift."""
    _, out, prefix, query_lengths, key_lengths, heads, keep, scale, before, after, _, layout, sparse = rest
    checked_settings(shift, drop, padding, prefix, (query_lengths, key_lengths), keep, layout, sparse)
    weights, *statistics = attention_weights(query, key, mask, heads, scale, before, after)
    for kept, wanted in zip((largest, total), statistics):
        assert np.allclose(kept[..., :1], wanted), "softmax_max, softmax_sum: not those of these queries and keys"
    dtype, split = query.dtype, (*weights.shape[:-1], query.shape[-1])  # [B, J, H / J, S, h]
    query, d_out, out = (part.astype(np.float32).reshape(split) for part in (query, d_out, out))
    key, value = (part.astype(np.float32)[:, :, None] for part in (key, value))  # [B, J, 1, T, h]
    d_weights = d_out @ value.swapaxes(-1, -2)
    d_scores = scale * weights * (d_weights - (d_out * out).sum(-1, keepdims=True))
    d_query = (d_scores @ key).reshape(split[0], -1, *split[3:])
    d_key, d_value = (part.swapaxes(-1, -2) for part in (d_scores, weights))
    d_key, d_value = (d_key @ query).sum(2), (d_value @ d_out).sum(2)
    return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype), np.zeros(0, dtype)


# ---- fused permutation; sorted_indices[c] is the row of choice c
@operator("MoeTokenPermute")
def token_permute(_, x, index, count, padded):
    """Returns a copy of a row for each of its choices, sorted by expert; and the row of each choice."""
    assert count is None and not padded, "MoeTokenPermute with padding"
    choices = index.shape[1] if index.ndim == 2 else 1
    order = np.argsort(index.ravel(), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    return x[order // choices], place.astype(np.int32)


@operator("MoeTokenPermuteGrad")
def token_permute_grad(_, d_out, place, choices, padded):
    """Adds up what came back to the copies of a row."""
    return d_out[place].reshape(-1, int(choices), d_out.shape[1]).sum(1)


@operator("InnerMoeTokenUnpermute", "MoeTokenUnpermute")
def token_unpermute(_, y, place, probabilities, padded, restore):
    """Returns the rows of a token's choices, weighted and added."""
    y = y[place]
    if probabilities is None:
        return y
    return (y.reshape(probabilities.shape + y.shape[1:]) * probabilities[..., None]).sum(1)


@operator("MoeTokenUnpermuteGrad")
def token_unpermute_grad(_, y, d_out, place, probabilities, padded, restore):
    """Returns the gradients of the rows and of the weights."""
    d_rows = np.zeros_like(y)
    if probabilities is None:
        d_rows[place] = d_out
        return d_rows, np.zeros(0, d_out.dtype)
    d_rows[place] = (d_out[:, None] * probabilities[..., None]).reshape(-1, d_out.shape[1])
    return d_rows, (d_out[:, None] * y[place].reshape(probabilities.shape + y.shape[1:])).sum(-1)


# ---- single operators that a GPU takes in the place of compositions
@operator("LayerNorm")
def layer_norm(_, x, gain, bias, *axes_and_eps):
    """Returns the normed rows, the mean and, in the place of the variance, variance + eps of each row [N, 1]."""
    eps = np.float32(axes_and_eps[-1])
    wide = x.astype(np.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = ((wide - mean) ** 2).mean(-1, keepdims=True) + eps
    return ((wide - mean) / np.sqrt(variance) * gain + bias).astype(x.dtype), mean, variance


@operator("LayerNormGrad")
def layer_norm_grad(_, x, d_out, variance, mean, gain, *axes):
    """Returns the gradients of rows, gain and bias; `variance` is that of `layer_norm`."""
    scale = 1 / np.sqrt(variance)
    normed, d_normed = (x - mean) * scale, d_out * gain
    shift = d_normed.mean(-1, keepdims=True) + normed * (d_normed * normed).mean(-1, keepdims=True)
    return (scale * (d_normed - shift)).astype(x.dtype), (d_out * normed).sum(0), d_out.sum(0)


@operator("SiLU")
def silu(_, x):
    """Returns x * sigmoid(x)."""
    return x * sigmoid(x)


@operator("SiLUGrad")
def silu_grad(_, d_out, x):
    """Returns the gradient of SiLU by its input."""
    gate = sigmoid(x)
    return d_out * gate * (1 + x * (1 - gate))


@operator("BiasAdd")
def bias_add(_, x, bias, *layout):
    """Returns x [N, C] plus a bias [C]."""
    return x + bias
