"""Reads back the metrics of a run: losses and expert loads by step. Nothing here imports MindSpore.

Legend: T logged steps, M conditional layers, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from switchyard import config as configuration
from switchyard.errors import UserError
from switchyard.files import UnfitError
from switchyard.report.records import parsed, read_text
from switchyard.training.metrics import METRICS


@dataclass(frozen=True)
class History:
    """Holds the figures of a run by step.

    Attributes:
        steps, losses: [T] training cross-entropy, nats per token.
        validation_steps, validation_losses: the evaluations.
        load: [T, M, E] choices of each expert before dropping; M is 0 for a dense model.
        layers: indices of the M conditional layers, from 0.
    """

    steps: np.ndarray
    losses: np.ndarray
    validation_steps: np.ndarray
    validation_losses: np.ndarray
    load: np.ndarray
    layers: tuple[int, ...]

    @property
    def relative_load(self) -> np.ndarray:
        """Returns the load divided by the mean load of its layer and step: [T, M, E]."""
        return self.load / np.maximum(self.load.mean(2, keepdims=True), 1e-9)


def read_history(run: Path) -> History:
    """Reads `metrics.jsonl` and `config.yaml` of a run folder; the last line may have been cut by a kill.

    Raises:
        UserError: no such file, or no logged step in it.
    """
    try:
        records = parsed(read_text(run))
    except UnfitError as error:
        raise UserError(f"run '{run}': {METRICS}: {error}; give a run folder such as runs/NAME") from None
    except OSError as error:
        raise UserError(f"run '{run}': {METRICS}: {error.strerror}; give a run folder such as runs/NAME") from None
    train = [record for record in records if record["kind"] == "train"]
    # the last of a step counts: the final one is over the whole validation set, those before it over a sample
    evaluations = list({record["step"]: record for record in records if record["kind"] == "evaluation"}.values())
    if not train:
        raise UserError(f"run '{run}': {METRICS} holds no logged step; train for at least one")
    layers = configuration.load(run / "config.yaml", inherited=True).moe_layers
    try:
        return _history(train, evaluations, layers)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"run '{run}': {METRICS} holds a line that is no record of this run: {error!r}") from None


def _history(train: list[dict[str, Any]], evaluations: list[dict[str, Any]], layers: tuple[int, ...]) -> History:
    """Returns the history of records whose kinds are known (KeyError, TypeError, ValueError: of other keys or
    types)."""
    load = np.array([record["load"] for record in train], float) if layers else np.zeros((len(train), 0, 0))
    return History(
        steps=np.array([record["step"] for record in train]),
        losses=np.array([record["loss"] for record in train], float),
        validation_steps=np.array([record["step"] for record in evaluations]),
        validation_losses=np.array([record["loss"] for record in evaluations], float),
        load=load,
        layers=layers,
    )
