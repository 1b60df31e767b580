"""The conditional layer as a literal loop over tokens and experts, with its gradient written by hand.

Plain numpy in float64, slow and obviously right; nothing of the library is used. Weights and gradients are dicts with
the parameter names of `MoELayer`: router.weight, experts.w_in, experts.w_gate, experts.w_out, shared.w_in, ...

Legend: G groups, N rows of a group, E experts, K choices of a row, D width, F hidden width.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Rules:
    """How the layer works. `capacity`: slots of an expert in one group, None = nothing is dropped."""

    activation: str = "relu"
    choices: int = 1
    normalise: bool = False
    capacity: int | None = None
    order: str = "position"


@dataclass
class Pass:
    """What came out: rows [G, N, D], the two losses, the audit, and the gradients by name ('rows' for the input)."""

    out: np.ndarray
    balance: float = 0.0
    z: float = 0.0
    audit: dict = field(default_factory=dict)
    gradients: dict = field(default_factory=dict)


@dataclass
class Token:
    """One real row after routing."""

    logits: np.ndarray
    probabilities: np.ndarray
    experts: list[int]
    gates: np.ndarray
    total: float  # what the gates were divided by


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def activate(kind: str, x: np.ndarray):
    """(value, slope) of the non-linearity."""
    if kind == "relu":
        return np.maximum(x, 0.0), (x > 0).astype(np.float64)
    if kind == "gelu":
        inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
        tanh = np.tanh(inner)
        return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * np.sqrt(2 / np.pi) * (
            1 + 3 * 0.044715 * x**2
        )
    s = sigmoid(x)  # swiglu: the gate is silu
    return x * s, s + x * s * (1 - s)


def work(x, weights, prefix, expert, kind):
    """One row through one expert: [D] -> [D]."""
    up = x @ weights[f"{prefix}.w_in"][expert]
    if kind == "swiglu":
        hidden = activate(kind, x @ weights[f"{prefix}.w_gate"][expert])[0] * up
    else:
        hidden = activate(kind, up)[0]
    return hidden @ weights[f"{prefix}.w_out"][expert]


def work_backward(x, d_y, weights, gradients, prefix, expert, kind):
    """Adds to the expert's gradients and returns that of the row: [D], [D] -> [D]."""
    w_in, w_out = weights[f"{prefix}.w_in"][expert], weights[f"{prefix}.w_out"][expert]
    up = x @ w_in
    if kind == "swiglu":
        w_gate = weights[f"{prefix}.w_gate"][expert]
        gate, slope = activate(kind, x @ w_gate)
        hidden, d_hidden = gate * up, w_out @ d_y
        d_up, d_gate = d_hidden * gate, d_hidden * up * slope
        gradients[f"{prefix}.w_gate"][expert] += np.outer(x, d_gate)
        d_x = w_in @ d_up + w_gate @ d_gate
    else:
        hidden, slope = activate(kind, up)
        d_up = (w_out @ d_y) * slope
        d_x = w_in @ d_up
    gradients[f"{prefix}.w_in"][expert] += np.outer(x, d_up)
    gradients[f"{prefix}.w_out"][expert] += np.outer(hidden, d_y)
    return d_x


def route(x, router, rules) -> Token:
    """One row's decision: the K most probable experts and their gates."""
    logits = x @ router
    p = np.exp(logits - logits.max())
    p = p / p.sum()
    experts = sorted(range(len(p)), key=lambda e: (-logits[e], e))[: rules.choices]
    gates = np.array([p[e] for e in experts])
    total = gates.sum() if rules.normalise and rules.choices > 1 else 1.0
    return Token(logits, p, experts, gates / total, total)


def seat(tokens: list, rules, experts: int) -> set:
    """The choices (n, k) that get a slot: each expert admits in order until it is full."""
    choices = [(n, k) for n, token in enumerate(tokens) if token for k in range(rules.choices)]
    if rules.order == "position":
        choices.sort(key=lambda c: (c[1], c[0]))  # all first choices before any second
    else:
        choices.sort(key=lambda c: -tokens[c[0]].gates[c[1]])
    seated, used = set(), [0] * experts
    for n, k in choices:
        expert = tokens[n].experts[k]
        if rules.capacity is None or used[expert] < rules.capacity:
            used[expert] += 1
            seated.add((n, k))
    return seated


def moe_loop(rows, valid, weights, rules: Rules, upstream=None, jitter=None) -> Pass:
    """Runs the layer on rows [G, N, D] with valid [G, N].

    upstream: (d_out [G, N, D], d_balance, d_z) to get gradients as well. jitter [G, N, D]: factors on what the router
    sees.
    """
    groups, experts = rows.shape[0], weights["router.weight"].shape[1]
    jitter = np.ones_like(rows) if jitter is None else jitter
    result = Pass(np.zeros_like(rows))
    result.gradients = {name: np.zeros_like(value) for name, value in weights.items()} | {"rows": np.zeros_like(rows)}
    load, importance, entropy, seats, asked = np.zeros(experts), np.zeros(experts), 0.0, 0, 0
    total = max(valid.sum(), 1)  # every mean is over the real rows of all groups
    for g in range(groups):
        tokens = [
            route(x * j, weights["router.weight"], rules) if real else None
            for x, j, real in zip(rows[g], jitter[g], valid[g])
        ]
        seated = seat(tokens, rules, experts)
        _forward(g, rows[g], tokens, seated, weights, rules, result)
        real = [token for token in tokens if token]
        count = np.zeros(experts)
        for token in real:
            for expert in token.experts:
                count[expert] += 1
        many = max(len(real), 1)
        share, mean = count / (many * rules.choices), sum(t.probabilities for t in real) / many
        result.balance += experts * float((share * mean).sum()) * len(real) / total  # a group counts by its real rows
        result.z += sum(_log_sum(t.logits) ** 2 for t in real) / total
        entropy -= sum((t.probabilities * np.log(t.probabilities)).sum() for t in real) / total
        load, importance = load + count, importance + sum(t.probabilities for t in real)
        seats, asked = seats + len(seated), asked + len(real) * rules.choices
        if upstream is not None:
            d_p = upstream[1] * experts * share / total  # of each real row's probabilities
            d_z = upstream[2] / total
            _backward(g, rows[g], jitter[g], upstream[0][g], (d_p, d_z), tokens, seated, weights, rules, result)
    result.audit = {
        "load": load,
        "importance": importance,
        "dropped": 1 - seats / max(asked, 1),
        "entropy": float(entropy),
        "max_violation": load.max() / load.mean() - 1,
        "z": result.z,
    }
    return result


def _log_sum(logits):
    return float(np.log(np.exp(logits).sum()))


def _forward(g, rows, tokens, seated, weights, rules, result):
    for n, x in enumerate(rows):
        if "shared.w_in" in weights and tokens[n]:
            result.out[g, n] += work(x, weights, "shared", 0, rules.activation)
        for k in range(rules.choices):
            if (n, k) in seated:
                token = tokens[n]
                result.out[g, n] += token.gates[k] * work(x, weights, "experts", token.experts[k], rules.activation)


def _backward(g, rows, jitter, d_out, d_losses, tokens, seated, weights, rules, result):
    gradients, d_rows = result.gradients, result.gradients["rows"][g]
    for n, x in enumerate(rows):
        if "shared.w_in" in weights and tokens[n]:
            d_rows[n] += work_backward(x, d_out[n], weights, gradients, "shared", 0, rules.activation)
        token = tokens[n]
        if token is None:
            continue
        d_gates = np.zeros(rules.choices)
        for k, expert in enumerate(token.experts):
            if (n, k) in seated:
                d_gates[k] = work(x, weights, "experts", expert, rules.activation) @ d_out[n]
                d_y = token.gates[k] * d_out[n]
                d_rows[n] += work_backward(x, d_y, weights, gradients, "experts", expert, rules.activation)
        if token.total != 1.0:  # g_k = p_k / sum of the chosen p
            d_gates = (d_gates - d_gates @ token.gates) / token.total
        d_p = d_losses[0].copy()
        for k, expert in enumerate(token.experts):
            d_p[expert] += d_gates[k]
        p = token.probabilities
        d_logits = p * (d_p - p @ d_p) + d_losses[1] * 2 * _log_sum(token.logits) * p
        gradients["router.weight"] += np.outer(x * jitter[n], d_logits)
        d_rows[n] += weights["router.weight"] @ d_logits * jitter[n]
