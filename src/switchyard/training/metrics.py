"""Writes the metrics of a run: JSON lines, loggers such as TensorBoard, and lines or a progress bar on the terminal."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from switchyard.errors import UserError
from switchyard.file_errors import append, writing
from switchyard.json_text import to_json
from switchyard.training.cost import cost_words
from switchyard.training.events import EventFile
from switchyard.training.loggers import Logger
from switchyard.training.router_metrics import histograms, layer_metrics, scalars, step_arrays

METRICS = "metrics.jsonl"
EVALUATION, RESUMED, REWOUND = "evaluation", "resumed", "rewound"  # kinds of lines


class MetricsLog:
    """Writes metrics.jsonl of a run folder, and hands its figures to loggers.

    Each line is one JSON object with `kind` ("train", "evaluation", "sample", "exchanges", "resumed", "skipped",
    "rewound", "save_failed") and `step`; see `train_figures`, `Evaluation.to_dict`, `TextSampler` and `Change.to_dict`
    for the rest. There is one line of a kind for a step, of evaluations one with `whole` and one without, and of
    "rewound" one for each `number`, whatever was killed and resumed in between. Within `with`, an error is not hidden
    by what closing the files raises.

    Args:
        run: the run folder.
        resume_step: lines and events after this step are dropped; 0 starts anew.
        writes: False leaves both to another process, and only knows what they hold.
        layers: indices of the conditional layers, which the events of their metrics are named by.
        open_loggers: makes the loggers of a run that goes on after a step; None makes that of TensorBoard.

    Raises:
        UserError: from any of its methods, where a file cannot be written; metrics.jsonl keeps whole lines.
    """

    def __init__(
        self,
        run: Path,
        resume_step: int = 0,
        writes: bool = True,
        layers: tuple[int, ...] = (),
        open_loggers: Callable[[int], Sequence[Logger]] | None = None,
    ):
        self._path, self._layers = run / METRICS, layers
        self._open_loggers = open_loggers or (lambda step: [EventFile(run, step + 1 if step else None)])
        kept = _kept(self._path, resume_step) if resume_step else {}
        self._evaluations = {key: line for key, line in kept.items() if key[0] == EVALUATION}
        self._known = set(kept)
        self._file, self._loggers = None, ()
        if not writes:
            return
        self._begin(kept.values())
        self._loggers = self._open_loggers(resume_step)

    def _begin(self, lines: Iterable[str]) -> None:
        """Replaces the file by one of these lines, and opens it behind them."""
        temporary = self._path.with_name(f".{METRICS}")
        with writing(self._path):
            temporary.write_text("".join(lines), encoding="utf-8")
            os.replace(temporary, self._path)
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by `close`)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(*([UserError] if kind else [])):
            self.close(completed=kind is None)

    def write(self, figures: dict[str, Any]) -> None:
        """Appends one object; loggers get its numbers, named kind/key, see also `router_metrics.scalars`.

        An evaluation that is there already, made again by a resumed run, takes the place of the first.
        """
        line, key = to_json(figures) + "\n", _key(figures)
        before = self._evaluations.get(key)
        self._known.add(key)
        if figures["kind"] == EVALUATION:
            self._evaluations[key] = line
        if self._file is None or line == before:
            return
        if before is not None:
            self._file.close()
            self._begin(other for other in _lines(self._path) if other != before)
        with writing(self._path):
            append(self._file, line)
        self._log(figures)

    def rewind(self, step: int) -> None:
        """Drops the lines and events after a step: the run has gone back to it."""
        self._evaluations = {key: line for key, line in self._evaluations.items() if key[1] <= step}
        self._known = {key for key in self._known if key[1] <= step}
        if self._file is None:
            return
        self._file.close()
        self._begin(line for line in _lines(self._path) if json.loads(line)["step"] <= step)
        for logger in self._loggers:
            logger.close(completed=False)
        self._loggers = self._open_loggers(step)

    def _log(self, figures: dict[str, Any]) -> None:
        """Hands the numbers of a line, and the metrics of every conditional layer, to the loggers."""
        kind, step, layers = figures["kind"], figures["step"], layer_metrics(figures, self._layers)
        numbers = {f"{kind}/{name}": value for name, value in figures.items() if isinstance(value, (int, float))}
        del numbers[f"{kind}/step"]  # the axis
        numbers |= scalars(kind, layers)
        for logger in self._loggers:
            logger.log(step, numbers, dict(histograms(kind, layers)))

    def evaluated(self, step: int, whole: bool) -> float | None:
        """Returns the loss of an evaluation that the lines of the run hold, of the whole validation set or of a part.

        None: there is no such line, or its loss is not finite.
        """
        line = self._evaluations.get((EVALUATION, step, whole))
        return None if line is None else json.loads(line)["loss"]

    def holds(self, kind: str, step: int) -> bool:
        """Returns whether a line of this kind and step was there when a resumed run began, or was written since."""
        return (kind, step, True) in self._known

    def flush(self) -> None:
        """Brings figures to the disk, so that a run that is killed later shows them."""
        for logger in self._loggers:
            logger.flush()

    def close(self, completed: bool = True) -> None:
        """Ends the file and the loggers, which are told whether the run has made all of its steps."""
        if self._file is not None:
            self._file.close()
        for logger in self._loggers:
            logger.close(completed)


@dataclass
class Clock:
    """Counts the seconds of training steps alone: compiling, evaluations and checkpoints are not counted.

    Attributes:
        seconds: in all.
        mark_seconds: the same at the last call of `rate`.
        mark_steps: steps since then.
    """

    seconds: float = 0.0
    mark_seconds: float = 0.0
    mark_steps: int = 0

    def add(self, seconds: float) -> None:
        """Adds one step."""
        self.seconds += seconds
        self.mark_steps += 1

    def rate(self, tokens: int) -> float | None:
        """Returns tokens per second since the last call, with `tokens` a step; None if there was no step."""
        seconds, steps = self.seconds - self.mark_seconds, self.mark_steps
        self.mark_seconds, self.mark_steps = self.seconds, 0
        return tokens * steps / seconds if steps else None


class Progress:
    """Shows a run: a bar and lines on a terminal, plain lines elsewhere.

    Args:
        total: steps of the run.
        done: steps that a resumed run has behind it.
        unit: what is counted, tokens or images.
    """

    def __init__(self, total: int, done: int, unit: str = "tokens"):
        self._total, self._unit = total, unit
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, file=sys.stderr)

    def advance(self) -> None:
        """Advances the bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def say(self, text: str) -> None:
        """Prints one line."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def train_line(self, figures: dict[str, Any]) -> str:
        """Returns the line of a logged step."""
        parts = [
            f"step {figures['step']}/{self._total}",
            f"loss {figures['loss']:.4f}",
            f"lr {figures['learning_rate']:.2e}",
            f"grad {figures['gradient_norm']:.3f}",
        ]
        if figures["tokens_per_second"]:
            parts.append(f"{figures['tokens_per_second']:,.0f} {self._unit}/s")
        if "memory_peak" in figures:
            parts += cost_words(figures)
        if "load_min" in figures:
            parts.insert(2, f"balance {figures['balance_loss']:.3f} z {figures['z_loss']:.3f}")
            parts.append(f"load {figures['load_min']:.2f}..{figures['load_max']:.2f}")
            parts.append(f"dropped {100 * figures['dropped']:.1f}%")
        if "loss_scale" in figures:
            parts.append(f"scale {figures['loss_scale']:g}" + (" skipped" if figures["skipped"] else ""))
        return "  ".join(parts)


def train_figures(
    step: int, figures: dict[str, Any], learning_rate: float, tokens_per_second: float | None
) -> dict[str, Any]:
    """Returns the object of one logged step.

    Args:
        step: number of the step, from 1.
        figures: what TrainStep returned.
        learning_rate: of the step.
        tokens_per_second: since the last logged step, evaluations and checkpoints not counted; None at the first.

    Returns:
        kind, step, loss, balance_loss, z_loss, gradient_norm, learning_rate, tokens_per_second; of a conditional model
        also load_min and load_max (over layers and experts, relative to the mean load of the layer), dropped (mean
        over layers, a fraction) and the lists of `step_arrays`; with float16 also loss_scale and skipped.
    """
    out = {"kind": "train", "step": step}
    for name in ("loss", "balance_loss", "z_loss", "gradient_norm"):
        out[name] = float(figures[name])
    out |= {"learning_rate": learning_rate, "tokens_per_second": tokens_per_second}
    if "loss_scale" in figures:
        out["loss_scale"] = float(figures["loss_scale"])
        out["skipped"] = int(figures["skipped"])
    if routers := figures["routers"]:
        low, high = load_range(routers["load"])
        out |= {"load_min": low, "load_max": high, "dropped": float(routers["dropped"].mean())}
        out |= step_arrays(routers)
    return out


def load_range(load: np.ndarray) -> tuple[float, float]:
    """Returns the least and largest load of an expert relative to the mean load of its layer: [M, E] -> (min, max)."""
    relative = load / np.maximum(load.mean(1, keepdims=True), 1e-9)
    return float(relative.min()), float(relative.max())


def exchange_line(exchanged: dict[str, tuple[int, int]]) -> str:
    """Describes the communication of a device in one step."""
    parts = [f"{number} {kind} of {size:,} bytes" for kind, (number, size) in sorted(exchanged.items())]
    return f"communication per step: {', '.join(parts) or 'none'}"


def _lines(path: Path) -> list[str]:
    """Returns the complete lines of a metrics file; a last line truncated by a kill is left out."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines(True) if line.endswith("\n")]


def _kept(path: Path, step: int) -> dict[tuple, str]:
    """Returns the lines of a metrics file up to a step by their keys: of two with one key the later counts."""
    found = {}
    for line in _lines(path):
        try:
            figures = json.loads(line)
            follows = figures["kind"] in (RESUMED, REWOUND)  # belongs to the steps that follow
            after = follows and figures["step"] == step
            if figures["step"] <= step and not after:
                found[_key(figures)] = line
        except (ValueError, KeyError, TypeError):  # what another program has written
            continue
    return found


def _key(figures: dict[str, Any]) -> tuple:
    """Returns what a line of a run is known by: its kind and step, of an evaluation whether it is whole, and of going
    back its number."""
    return (figures["kind"], figures["step"], figures.get("number", figures.get("whole", True)))
