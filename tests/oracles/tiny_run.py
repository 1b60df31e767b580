"""Small configurations, texts and steps for the tests of training."""

import json
from pathlib import Path

import numpy as np

from switchyard.config import Config, build

TEXT = "".join(f"line {number}: {number * 37 % 101} sheep jump over the {number % 7} gates\n" for number in range(300))


def write_text(folder: Path) -> Path:
    """A text of about 13,000 characters."""
    path = folder / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run_config(folder: Path | None = None, **sections) -> Config:
    """One dense layer of width 16 on the text in `folder`, unless the sections say otherwise."""
    tree = {
        "model": {"num_layers": 1, "hidden_size": 16, "num_heads": 2, "seq_length": 16},
        "data": {"batch_size": 4, "tokenizer": "char"},
        "schedule": {"warmup_steps": 2, "learning_rate": 0.01, "lr_end": 0.001},
        "train": {"name": "tiny", "steps": 6, "log_every": 1, "eval_every": 0, "checkpoint_every": 0},
    }
    if folder is not None:
        tree["data"]["path"] = str(folder / "text.txt")
        tree["train"]["output_dir"] = str(folder / "runs")
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    return build(tree)


def metrics_of(run: Path, kind: str = "train") -> list[dict]:
    """The lines of one kind in a run's metrics."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line["kind"] == kind]


TIMED = {"tokens_per_second", "tokens_per_second_device", "mfu", "memory_peak"}  # and those of seconds


def untimed(line: dict) -> dict:
    """The figures of a line that do not depend on the time that a step took."""
    return {name: value for name, value in line.items() if name not in TIMED and not name.endswith("_seconds")}


def losses_of(run: Path) -> dict[int, float]:
    """Step -> training loss, as it was written down."""
    return {line["step"]: line["loss"] for line in metrics_of(run)}


def token_batch(micro_batches: int, batch: int, length: int, vocabulary: int = 17, seed: int = 0):
    """(tokens, labels, valid) of a step, [A, B, S] each."""
    tokens = np.random.default_rng(seed).integers(0, vocabulary, (micro_batches, batch, length + 1)).astype(np.int32)
    return tokens[..., :-1], tokens[..., 1:], np.ones((micro_batches, batch, length), np.float32)
