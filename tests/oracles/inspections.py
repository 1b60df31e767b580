"""An inspection that was typed by hand, for tests of what a report shows."""

import numpy as np

from switchyard.config import build
from switchyard.report.inspection import CHOSEN, Inspection

WORDS = ["<b>", "fox", "␣", "jumps"]  # the first must never become a tag


def typed_inspection(experts: int = 4, layers=(0, 2), choices_num: int = 2, tokens: int = 64) -> Inspection:
    """Tokens 0, 1, 2, 3, 0, 1 ...: token v goes to expert v of the first layer, and to v + 1 as its second choice; in
    the next layer one further."""
    ids = np.arange(tokens) % 4
    moe = {"expert_num": experts, "num_experts_chosen": choices_num, "layers": list(layers), "router": "top_k"}
    model = {"num_layers": max(layers) + 1, "seq_length": 16}
    config = build({"model": model, "moe": moe, "data": {"batch_size": 2}})
    choices = np.stack(
        [np.stack([(ids + place + rank) % experts for rank in range(choices_num)], 1) for place in range(len(layers))]
    )  # [M, N, K]
    gates = np.broadcast_to(np.linspace(0.7, 0.3, choices_num, dtype=np.float32), choices.shape)
    confidence = np.stack([np.linspace(0.3, 0.9, tokens) + place / 100 for place in range(len(layers))])
    losses = np.linspace(3.0, 1.0, tokens)
    pieces = [WORDS[one].replace("␣", " ") for one in ids]
    figures = (choices.astype(np.int16), gates, confidence, losses, CHOSEN)
    return Inspection(config, 40, *figures, ids, WORDS, pieces, (0, tokens))
