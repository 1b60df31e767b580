"""Reads what a run has written into its folder so far. Nothing here imports MindSpore.

Legend: T logged steps, M conditional layers, E experts.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.files import UnfitError, read_regular
from switchyard.training.metrics import METRICS

LONGEST = 1 << 32  # bytes of the metrics
LONGEST_RESULT = 1 << 26  # bytes of result.json
CONFIG, RESULT = "config.yaml", "result.json"
TRAIN, EVALUATION, SAMPLE, RESUMED = "train", "evaluation", "sample", "resumed"


@dataclass(frozen=True)
class Records:
    """Holds the records of a run folder.

    Attributes:
        path: the folder.
        config: of the run; None where `config.yaml` is missing or cannot be read.
        lines: records of metrics.jsonl by kind, in the order of the file; of evaluations the last of each step.
        result: what result.json holds; None before the run has ended.
        missing: one line for each piece that is not there.
    """

    path: Path
    config: Config | None
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Returns the name of the folder."""
        return self.path.name

    @property
    def layers(self) -> tuple[int, ...]:
        """Returns the indices of the M conditional layers, from 0."""
        return self.config.moe_layers if self.config else ()

    def kind(self, kind: str) -> list[dict[str, Any]]:
        """Returns the records of one kind."""
        return self.lines.get(kind, [])

    def series(self, kind: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps [T], numbers [T]) of a key; records without the key, or whose number is null, are left out."""
        pairs = [(line["step"], line[key]) for line in self.kind(kind) if _is_number(line.get(key))]
        return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)

    def by_layer(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns (steps [T], numbers [T, M] or [T, M, E]) of a key of the training records; T is 0 where none has
        it."""
        found = [(line["step"], line[key]) for line in self.kind(TRAIN) if _fits(line.get(key), len(self.layers))]
        shape = np.shape(found[-1][1]) if found else ()
        found = [(step, value) for step, value in found if np.shape(value) == shape]
        return np.array([step for step, _ in found], float), np.array([value for _, value in found], float)


def read_records(run: str | Path) -> Records:
    """Reads a run folder; what is missing or damaged is named in `missing`.

    Raises:
        UserError: `run` is no folder.
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"run '{run}': no such folder; give a run folder such as runs/NAME")
    missing: list[str] = []
    lines = group(_lines(run, missing))
    return Records(run, _config(run, missing), lines, _result(run), tuple(missing))


def parsed(text: str) -> list[dict[str, Any]]:
    """Returns the records of the text of metrics.jsonl; a line that is no record, such as one cut by a kill, is left
    out."""
    return [record for record in map(_parsed, text.splitlines()) if record]


def group(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the records by kind; of two evaluations of a step the last counts, which covers the whole set."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["kind"], []).append(record)
    found[EVALUATION] = list({record["step"]: record for record in found.get(EVALUATION, [])}.values())
    return found


def read_text(run: Path) -> str:
    """Returns the text of metrics.jsonl (OSError, UnfitError)."""
    return read_regular(run / METRICS, LONGEST).decode("utf-8", "replace")


def _lines(run: Path, missing: list[str]) -> list[dict[str, Any]]:
    try:
        return parsed(read_text(run))
    except UnfitError as error:
        missing.append(f"{METRICS}: {error}")
    except OSError as error:
        missing.append(f"{METRICS}: {error.strerror}")
    return []


def _config(run: Path, missing: list[str]) -> Config | None:
    if not (run / CONFIG).exists():
        missing.append(f"{CONFIG}: No such file")
        return None
    try:
        return configuration.load(run / CONFIG, inherited=True)
    except UserError as error:
        missing.append(f"{CONFIG}: {error}")
    return None


def _result(run: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(read_regular(run / RESULT, LONGEST_RESULT))
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    fits = isinstance(record, dict) and isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if fits else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fits(value: Any, layers: int) -> bool:
    """Returns whether a value is a list of a number, or of a list of numbers, for each conditional layer."""
    if not isinstance(value, list) or len(value) != layers or not layers:
        return False
    flat = [number for part in value for number in (part if isinstance(part, list) else [part])]
    return all(_is_number(number) for number in flat) and len({np.shape(part) for part in value}) == 1
