"""Experiment trackers that get the figures of a run: TensorBoard, and W&B, MLflow or SwanLab where installed.

`train.loggers` names them. A tracker that fails, for example because of the network, is switched off with one warning
line, and the training goes on. A full disk under TensorBoard's file ends the run, as under metrics.jsonl. Addresses,
keys and offline modes are those of each tracker's own environment variables.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from switchyard.config import Config
from switchyard.errors import shortened
from switchyard.file_errors import writing
from switchyard.json_text import to_json
from switchyard.optional import require
from switchyard.training.events import EventFile

PROJECT = "switchyard"  # the project, or experiment, that holds all runs
IDS = "loggers.json"  # in a run folder: name of a tracker -> identifier of the run there
LONGEST_VALUE = 500  # characters of a parameter that MLflow takes
BATCH = 100  # parameters that MLflow takes at once


class Logger(Protocol):
    """Takes the figures of a run."""

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Takes figures of a step by tag, such as train/loss, and distributions by tag."""

    def flush(self) -> None:
        """Brings what was taken to the disk, where the logger has a file."""

    def close(self, completed: bool = True) -> None:
        """Ends the run; `completed` is False for a run that was interrupted or has failed."""


class Tracker:
    """Base class of the loggers that are packages of their own.

    Args:
        config: the whole configuration, which becomes the parameters of the run.
        run: the run folder.
        known: the identifier of the run that goes on; None for a new run.

    Attributes:
        id: the identifier of the run, with which a resumed training goes on.
        module: the package that is imported.
        package: what `pip install` takes.
        remedy: what the warning about a failed start advises.
    """

    id: str
    module: ClassVar[str]
    package: ClassVar[str]
    remedy: ClassVar[str]

    def __init__(self, config: Config, run: Path, known: str | None):
        raise NotImplementedError

    @classmethod
    def imported(cls) -> Any:
        """Imports the package (UserError: the package is not installed)."""
        return require(cls.module, cls.package, f"train.loggers: {cls.package.partition('-')[0]}")

    def flush(self) -> None:
        """Does nothing: trackers send, or write, what they take by themselves."""


class WandbLogger(Tracker):
    """Logs to Weights & Biases. Figures have `step` as their axis, because W&B's own axis cannot go back on resume."""

    module, package = "wandb", "wandb"
    remedy = "run `wandb login`, or set WANDB_MODE=offline"

    def __init__(self, config: Config, run: Path, known: str | None):
        wandb = self.imported()
        self._histogram, self.id = wandb.Histogram, known or uuid.uuid4().hex[:8]
        settings = wandb.Settings(silent=True, console="off")  # leaves stdout and stderr to the progress bar
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=config.train.name,
            id=self.id,
            resume="allow",
            dir=str(run),
            config=config.model_dump(),
            settings=settings,
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Takes figures of a step."""
        drawn = {tag: self._histogram(values) for tag, values in histograms.items()}
        self._run.log({"step": step, **scalars, **drawn})

    def close(self, completed: bool = True) -> None:
        """Ends the run; one that was interrupted is shown as failed until it is resumed."""
        self._run.finish(exit_code=0 if completed else 1)


class MlflowLogger(Tracker):
    """Logs to the MLflow server of MLFLOW_TRACKING_URI, else to files in train.output_dir/mlruns; no histograms."""

    module, package = "mlflow", "mlflow-skinny"
    remedy = "check MLFLOW_TRACKING_URI; without it files are written"

    def __init__(self, config: Config, run: Path, known: str | None):
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the default waits for many minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = self.imported()
        files = (run.parent / "mlruns").absolute().as_uri()
        self._metric, self._client = (
            mlflow.entities.Metric,
            mlflow.MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", files)),
        )
        self.id = known or self._created(config)
        self._client.update_run(self.id, status="RUNNING")
        if not known:
            self._write_parameters(config, mlflow.entities.Param)

    def _created(self, config: Config) -> str:
        """Makes a run, and the experiment where there is none yet; returns the identifier of the run."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        return self._client.create_run(experiment, run_name=config.train.name).info.run_id

    def _write_parameters(self, config: Config, parameter: Callable[[str, str], Any]) -> None:
        """Writes section.key of the configuration as parameters of the run."""
        keys = [
            parameter(f"{section}.{key}", str(value)[:LONGEST_VALUE])
            for section, part in config.model_dump().items()
            for key, value in part.items()
        ]
        for start in range(0, len(keys), BATCH):
            self._client.log_batch(self.id, params=keys[start : start + BATCH])

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Takes figures of a step."""
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, [self._metric(tag, float(value), now, step) for tag, value in scalars.items()])

    def close(self, completed: bool = True) -> None:
        """Ends the run."""
        self._client.set_terminated(self.id, "FINISHED" if completed else "KILLED")


class SwanlabLogger(Tracker):
    """Logs to SwanLab. Takes no histograms.

    A run in the cloud goes on when the training is resumed; in the other modes of SWANLAB_MODE a new run begins.
    """

    module, package = "swanlab", "swanlab"
    remedy = "run `swanlab login`, or set SWANLAB_MODE=offline"

    def __init__(self, config: Config, run: Path, known: str | None):
        self._swanlab, self.id = self.imported(), known or uuid.uuid4().hex[:20]
        goes_on = {"id": self.id, "resume": "allow"} if os.environ.get("SWANLAB_MODE", "online") == "online" else {}
        self._swanlab.init(
            project=os.environ.get("SWANLAB_PROJ_NAME", PROJECT),
            name=config.train.name,
            log_dir=str(run / "swanlog"),
            config=config.model_dump(),
            **goes_on,
        )

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Takes figures of a step."""
        self._swanlab.log(dict(scalars), step=step)

    def close(self, completed: bool = True) -> None:
        """Ends the run."""
        self._swanlab.finish(state="success" if completed else "aborted")


TRACKERS: dict[str, type[Tracker]] = {"wandb": WandbLogger, "mlflow": MlflowLogger, "swanlab": SwanlabLogger}


class Guarded:
    """Passes figures to a tracker. An error of the tracker switches the tracker off, with one warning line.

    Args:
        name: the name in `train.loggers`.
        start: makes the tracker.
        say: takes a line for the user.
    """

    def __init__(self, name: str, start: Callable[[], Tracker], say: Callable[[str], None]):
        self.name, self._say, self._tracker = name, say, None
        self._tracker = self._tried(start)

    @property
    def id(self) -> str | None:
        """Returns the identifier of the run; None where the tracker has failed."""
        return self._tracker and self._tracker.id

    def _tried(self, action: Callable[[], Any]) -> Any:
        """Calls a function; an error becomes a warning, and the tracker is not called again."""
        try:
            return action()
        except Exception as error:  # of a library and of all that it uses
            what = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 200)
            remedy = f"; {TRACKERS[self.name].remedy}" if self._tracker is None else ""
            self._say(f"warning: train.loggers: {self.name} is switched off; training goes on: {what}{remedy}")
            self._tracker = None

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Passes figures of a step."""
        if tracker := self._tracker:
            self._tried(lambda: tracker.log(step, scalars, histograms))

    def flush(self) -> None:
        """Asks the tracker to write what it holds."""
        if self._tracker:
            self._tried(self._tracker.flush)

    def close(self, completed: bool = True) -> None:
        """Ends the run of the tracker."""
        if tracker := self._tracker:
            self._tried(lambda: tracker.close(completed))


def check_loggers(names: Sequence[str]) -> None:
    """Imports the packages of the loggers (UserError: one is not installed, with the command that installs it)."""
    for name in names:
        if name in TRACKERS:
            TRACKERS[name].imported()


def open_loggers(config: Config, run: Path, done: int, say: Callable[[str], None]) -> list[Logger]:
    """Makes the loggers of `train.loggers` for the process that writes the run folder.

    Args:
        config: the whole configuration.
        run: the run folder.
        done: steps that were made; figures of later steps that an earlier training has logged are replaced, or stand
            beside the new ones where a tracker cannot replace.
        say: takes a line for the user.

    Returns:
        One logger for each name.

    Raises:
        UserError: a file in the run folder cannot be written.
    """
    known, found = read_ids(run) if done else {}, []
    for name in dict.fromkeys(config.train.loggers):
        if name == "tensorboard":
            found.append(EventFile(run, done + 1 if done else None))
        else:
            found.append(Guarded(name, lambda name=name: TRACKERS[name](config, run, known.get(name)), say))
    trackers = {logger.name: logger.id for logger in found if isinstance(logger, Guarded) and logger.id}
    if trackers:
        with writing(run / IDS):
            (run / IDS).write_text(to_json(known | trackers, indent=1), encoding="utf-8")
    return found


def read_ids(run: Path) -> dict[str, str]:
    """Returns name of a tracker -> identifier of the run; empty where the run folder holds none, or no valid ones."""
    try:
        held = json.loads((run / IDS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {name: one for name, one in held.items() if isinstance(one, str)} if isinstance(held, dict) else {}
