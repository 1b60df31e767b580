"""Reads back the metrics of a run: losses and expert loads by step. Nothing here imports MindSpore.

Legend: T logged steps, M conditional layers, E experts.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from switchyard import config as configuration
from switchyard.config import Config
from switchyard.data.tokenizer import expected_vocabulary
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
        accuracies: share of right answers at each evaluation of an image run; empty for text.
        choices: what an answer is chosen from, classes or vocabulary; None where it is not known without the data.
        load: [T, M, E] choices of each expert before dropping; M is 0 for a dense model.
        layers: indices of the M conditional layers, from 0.
    """

    steps: np.ndarray
    losses: np.ndarray
    validation_steps: np.ndarray
    validation_losses: np.ndarray
    load: np.ndarray
    layers: tuple[int, ...]
    accuracies: np.ndarray = field(default_factory=lambda: np.zeros(0))
    choices: int | None = None

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
    config = configuration.load(run / "config.yaml", inherited=True)
    try:
        return replace(_history(train, evaluations, config.moe_layers), choices=answers(config))
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
        accuracies=np.array([record["accuracy"] for record in evaluations if "accuracy" in record], float),
    )


def answers(config: Config) -> int | None:
    """Returns the number of values that an answer is chosen from; None where it is not known without the data."""
    if not config.reads_text:
        return config.vision.classes if len(config.vision.tasks) == 1 else None
    if config.data.tokenizer == "char":  # as many as the text has characters
        return None
    try:
        return expected_vocabulary(config)
    except UserError:  # a tokenizer that is not there any more
        return None
