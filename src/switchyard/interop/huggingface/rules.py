"""Says what becomes of each tensor: one rule for each parameter of ours, with the names of theirs.

Hugging Face's linear layers hold [out, in], ours [in, out]. Experts are one tensor each there and stacked here.
Queries, keys and values are three matrices there and one here, ordered key/value head by key/value head. Rotary halves
stand alike on both sides, so no column is permuted inside a head.

Legend: V vocabulary, D width, H query heads, J key/value heads, h head size, R = H / J, W = J * (R + 2) * h, Q = H * h,
K = J * h, F dense hidden width, E experts, X hidden width of an expert, S hidden width of the shared experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from switchyard.config import Config

PARTS = ("Q", "K", "K")  # of the rows of a fused tensor: queries, keys, values


@dataclass(frozen=True)
class Rule:
    """Ties a parameter to the tensors that it is made of.

    Attributes:
        ours: name of the parameter, with {layer} where each layer has one.
        axes: its shape, letters of the legend.
        theirs: name of the tensor, with {layer}, and {expert} where each expert has one; three names, of queries, keys
            and values, where ours joins them.
        turned: whether the last two axes of ours are theirs in the other order.
        when: which models, or which of their layers, have it: a key of `conditions`.
    """

    ours: str
    axes: str
    theirs: str | tuple[str, str, str]
    turned: bool = False
    when: str = "always"

    @property
    def per_layer(self) -> bool:
        """Returns whether each layer has such a parameter."""
        return "{layer}" in self.ours


@dataclass(frozen=True)
class Source:
    """Describes one tensor of theirs, as a part of a parameter of ours.

    Attributes:
        name: of the tensor.
        shape: of the tensor.
        expert: its index on the first axis of ours; None where ours has no axis of experts.
        columns: which of the last axis of ours it fills; None = all.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    columns: np.ndarray | None = None


@dataclass(frozen=True)
class Parameter:
    """Holds one parameter of a model with what it is made of.

    Attributes:
        name: of ours.
        shape: of ours.
        turned: see Rule.
        sources: in the order of theirs.
        copies: names of further tensors with the numbers of the only source: written, and read where they are there.
    """

    name: str
    shape: tuple[int, ...]
    turned: bool
    sources: tuple[Source, ...]
    copies: tuple[str, ...] = ()


def sizes(config: Config, vocab_size: int) -> dict[str, int]:
    """Returns the number for each letter of the legend."""
    model, h = config.model, config.model.size_of_head
    queries, keys = model.num_heads * h, model.kv_heads * h
    return {
        "1": 1, "V": vocab_size, "D": model.hidden_size, "W": queries + 2 * keys, "Q": queries, "K": keys, "h": h,
        "F": config.dense_width, "E": config.moe.expert_num, "X": config.expert_width, "S": config.shared_width,
    }  # fmt: skip


def conditions(config: Config, layer: int | None) -> dict[str, bool]:
    """Returns which rules hold for a model, or for one of its layers."""
    model, moe, conditional = config.model, config.moe, layer in config.moe_layers
    return {
        "always": True,
        "untied": not model.tie_word_embeddings,
        "qkv bias": model.attention_bias is not None,
        "all bias": model.attention_bias == "all",
        "head norm": model.qk_norm == "head",
        "full norm": model.qk_norm == "full",
        "dense": not conditional,
        "conditional": conditional,
        "shared": conditional and moe.shared_expert_num > 0,
        "shared gate": conditional and moe.use_shared_expert_gating,
        "router bias": conditional and moe.router == "sigmoid",
    }


def parameters(rules: tuple[Rule, ...], config: Config, vocab_size: int) -> Iterator[Parameter]:
    """Yields the parameters of a model, those of a layer together."""
    numbers, whole = sizes(config, vocab_size), conditions(config, None)
    for rule in rules:
        if not rule.per_layer and whole[rule.when]:
            yield _parameter(rule, config, numbers, None)
    for layer in range(config.model.num_layers):
        holds = conditions(config, layer)
        for rule in rules:
            if rule.per_layer and holds[rule.when]:
                yield _parameter(rule, config, numbers, layer)


def _parameter(rule: Rule, config: Config, numbers: dict[str, int], layer: int | None) -> Parameter:
    letters = rule.axes.split()
    shape = tuple(numbers[letter] for letter in letters)
    if isinstance(rule.theirs, tuple):
        sources = _fused(rule, config, numbers, layer)
    elif len(letters) == 3:  # experts, or the one network of a dense feed-forward
        theirs = (shape[2], shape[1]) if rule.turned else shape[1:]
        names = [rule.theirs.format(layer=layer, expert=expert) for expert in range(shape[0])]
        sources = tuple(Source(name, theirs, expert) for expert, name in enumerate(names))
    else:
        sources = (Source(rule.theirs.format(layer=layer), shape[::-1] if rule.turned else shape),)
    return Parameter(rule.ours.format(layer=layer), shape, rule.turned, sources)


def _fused(rule: Rule, config: Config, numbers: dict[str, int], layer: int | None) -> tuple[Source, ...]:
    """Returns the sources of queries, keys and values."""
    width, sources = numbers["D"], []
    for name, part, columns in zip(rule.theirs, PARTS, fused_columns(config)):
        shape = (numbers[part], width) if rule.turned else (numbers[part],)
        sources.append(Source(name.format(layer=layer), shape, None, columns))
    return tuple(sources)


def fused_columns(config: Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the columns of queries [Q], keys [K] and values [K] in the fused matrix, in the order of theirs."""
    model = config.model
    kv_heads, h = model.kv_heads, model.size_of_head
    repeat = model.num_heads // kv_heads
    place = np.arange(kv_heads * (repeat + 2) * h).reshape(kv_heads, repeat + 2, h)  # [J, R + 2, h]
    return place[:, :repeat].reshape(-1), place[:, repeat].reshape(-1), place[:, repeat + 1].reshape(-1)
