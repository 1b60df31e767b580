"""Reads how choices fall on experts, and says what part of them capacities drop. No MindSpore in here."""

from dataclasses import dataclass

import numpy as np

from switchyard.config import Config
from switchyard.config.reader import parse_json, read_text
from switchyard.errors import UserError, shortened
from switchyard.moe.dispatch.capacity import dropped_of_record, dropped_share

LARGEST_LOAD = 1 << 26  # bytes of a file of tokens per expert


@dataclass(frozen=True)
class Load:
    """Describes how choices fall on experts: `shares` [M, E] or [E], a `record` [.., N, K], or evenly."""

    shares: np.ndarray | None = None
    record: np.ndarray | None = None

    def dropped(self, config: Config) -> float:
        """Returns the share of the choices that get no slot."""
        if config.moe.dispatch != "capacity":
            return 0.0
        if self.record is not None:
            return dropped_of_record(config, self.record)
        first, lost, made = 0, 0.0, 0
        for stack in config.stacks:  # whose rows, and so choices, differ
            layers = len(stack.moe_layers)
            shares = self.shares if self.shares is None or self.shares.ndim == 1 else self.shares[first:][:layers]
            if layers:
                lost += dropped_share(stack, shares) * stack.rows * layers
            first, made = first + layers, made + stack.rows * layers
        return lost / max(made, 1)


def read_load(path: str, config: Config) -> Load:
    """Reads how choices fell on experts.

    Args:
        path: a JSON file of tokens per expert, E numbers or M lists of them; or a file that moe.record wrote.
        config: whose experts and conditional layers they are of.

    Raises:
        UserError: the file does not fit.
    """
    experts, layers, key = config.moe.expert_num, len(config.moe_layers), "--tokens-per-expert"
    if not path.endswith(".json"):
        from switchyard.moe.routing.replay import read

        wanted = {"experts": experts, "layers": list(config.moe_layers), "choices": config.moe.choices}
        record = read(path, wanted, key)["experts"]
        if record.shape[-2] != config.rows:
            raise UserError(f"{key}: {path}; recorded with {record.shape[-2]} rows, this run has {config.rows}")
        return Load(record=record)
    wanted = "must hold a JSON list of numbers, or one list a layer"
    try:
        tokens = np.array(parse_json(read_text(path, key, wanted, LARGEST_LOAD)), np.float64)
        if not np.isfinite(tokens).all():
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise UserError(f"{key}: {shortened(path)}; {wanted}") from None
    if tokens.shape not in ((experts,), (layers, experts)):
        wanted = f"[{experts}] or [{layers}, {experts}]"
        raise UserError(f"{key}: {path}; holds {list(tokens.shape)} numbers, wants {wanted}")
    if (tokens < 0).any() or (tokens.sum(-1) <= 0).any():
        raise UserError(f"{key}: {path}; numbers of tokens must be 0 or more, and some above 0 in each layer")
    return Load(shares=tokens / tokens.sum(-1, keepdims=True))
