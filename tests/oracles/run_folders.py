"""Run folders with metrics that were typed by hand, for tests of reports."""

import json
from pathlib import Path

from switchyard.config import build


def train_line(step: int, load: list[list[int]] | None = None, **figures) -> dict:
    """A record of a logged step; the loss is 3 - step / 100."""
    line = {"kind": "train", "step": step, "loss": 3 - step / 100, "learning_rate": 0.01, "gradient_norm": 1.0}
    line |= {"tokens_per_second": 1000.0, "balance_loss": 1.0}
    if load:
        layers = len(load)
        line |= {"load": load, "importance": [[float(one) for one in row] for row in load]}
        line |= {key: [0.25] * layers for key in ("layer_dropped", "entropy", "max_violation", "z")}
    return line | figures


def evaluation_line(step: int, loss: float, load: list[list[int]] | None = None, layers=(0, 2), **figures) -> dict:
    """A record of an evaluation."""
    audits = [
        {"layer": layer, "load": row, "importance": row, "dropped": 0.0, "entropy": 1.0, "max_violation": 0.5, "z": 0.1}
        for layer, row in zip(layers, load or [])
    ]
    interval = [loss - 0.1, loss + 0.1]
    return {"kind": "evaluation", "step": step, "loss": loss, "loss_ci95": interval, "layers": audits} | figures


def write_folder(folder: Path, lines: list[dict], result: dict | None = None, tail: str = "", **sections) -> Path:
    """Writes config.yaml of three layers, of which `sections` say more, metrics.jsonl and result.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = build({"model": {"num_layers": 3}, "train": {"name": "typed", "steps": 100}} | sections)
    (folder / "config.yaml").write_text(config.to_yaml())
    text = "".join(json.dumps(line) + "\n" for line in lines) + tail
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder
