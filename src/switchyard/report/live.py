"""Shows a run at work in the terminal: `python -m switchyard.report live RUN`. Reads the run's files alone.

Legend: T logged steps, M conditional layers, E experts.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from switchyard import config as configuration
from switchyard.cli import Parser, finite
from switchyard.config import Config
from switchyard.errors import UserError
from switchyard.report.colours import expert_colours
from switchyard.report.records import CONFIG, EVALUATION, RESULT, SAMPLE, TRAIN, Records, group, parsed
from switchyard.training.metrics import METRICS

BARS = " ▁▂▃▄▅▆▇█"
FULL = 2.0  # times the mean load: the highest bar
CHART_ROWS = 9
QUIET = 20.0  # times the usual time between two records, after which a run is said to be silent
LEAST_QUIET = 120.0  # seconds
MOST_TEXT = 400  # characters of a sampled text


@dataclass
class Follower:
    """Reads a run folder again and again; of metrics.jsonl only what was added since.

    Attributes:
        run: the folder.
        records: all records so far.
    """

    run: Path
    records: list[dict[str, Any]] = field(default_factory=list)
    _offset: int = 0
    _file: tuple[int, int] = (0, 0)
    _rest: bytes = b""

    def read(self) -> Records:
        """Returns the records as they are now."""
        self._read_metrics()
        config, result = self._config(), _json(self.run / RESULT)
        return Records(self.run, config, group(self.records), result)

    def _read_metrics(self) -> None:
        """Reads what was appended; a file that was replaced, as a resumed run does, is read from its beginning."""
        try:
            found = (self.run / METRICS).stat()
            if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
                self._file, self._offset, self._rest, self.records = (found.st_dev, found.st_ino), 0, b"", []
            with open(self.run / METRICS, "rb") as file:
                file.seek(self._offset)
                added = file.read()
        except OSError:  # not there yet, or away for a moment on a shared disk
            return
        self._offset += len(added)
        whole, end, rest = (self._rest + added).rpartition(b"\n")
        self._rest = rest
        if end:
            self.records += parsed(whole.decode("utf-8", "replace"))

    def _config(self) -> Config | None:
        try:
            return configuration.load(self.run / CONFIG, inherited=True)
        except UserError:  # not there yet
            return None

    def silence(self) -> float | None:
        """Returns the seconds since the newest record; None before the first."""
        try:
            return max(time.time() - (self.run / METRICS).stat().st_mtime, 0.0) if self.records else None
        except OSError:
            return None


def _json(path: Path) -> dict[str, Any] | None:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return tree if isinstance(tree, dict) else None


def last_step(run: Records) -> int:
    """Returns the newest step that a record names, 0 before the first."""
    return max((line["step"] for lines in run.lines.values() for line in lines), default=0)


def has_ended(run: Records) -> bool:
    """Returns whether a run has made all its steps."""
    return bool(run.config and run.result and run.result.get("steps") == run.config.train.steps)


def state_of(run: Records, silence: float | None) -> str:
    """Says in a few words what a run is doing."""
    if has_ended(run):
        return "finished"
    if run.config is None:
        return "waiting for its configuration"
    steps, seconds = _pace(run)
    if not last_step(run):
        return "before its first step"
    usual = run.config.train.log_every * seconds / steps if steps else 0.0
    if silence is not None and silence > max(QUIET * usual, LEAST_QUIET):
        return f"no record for {silence / 60:.0f} min: stopped, or busy"
    return "training"


def _pace(run: Records) -> tuple[int, float]:
    """Returns (steps, seconds) of training by the last ten speeds; (0, 0) where none is known."""
    _, speeds = run.series(TRAIN, "tokens_per_second")
    if not len(speeds) or run.config is None or not speeds[-10:].mean():
        return 0, 0.0
    return 1, run.config.micro_batches * run.config.predictions / float(speeds[-10:].mean())


def remaining(run: Records) -> float | None:
    """Returns the seconds of training that are left at the pace of the last records; None where no pace is known."""
    steps, seconds = _pace(run)
    return (run.config.train.steps - last_step(run)) * seconds if steps and run.config else None


def bar(load: Sequence[float]) -> str:
    """Returns one character for each expert of a layer, as high as its load: the mean is half of the height."""
    relative = np.asarray(load, float) / max(float(np.mean(load)), 1e-9)
    heights = np.clip(np.ceil(relative / FULL * (len(BARS) - 1)), 0, len(BARS) - 1).astype(int)
    return "".join(BARS[height] for height in heights)


def spark(values: Sequence[float], width: int) -> str:
    """Returns a curve of one line: the least value is the lowest bar."""
    values = np.asarray(values, float)
    if not len(values):
        return ""
    means = np.array([part.mean() for part in np.array_split(values, min(width, len(values)))])
    span = (means.max() - means.min()) or 1.0
    return "".join(BARS[1 + round(7 * (mean - means.min()) / span)] for mean in means)


def chart(steps: np.ndarray, values: np.ndarray, last: float, width: int, rows: int = CHART_ROWS) -> list[str]:
    """Draws a curve in Braille dots, two a column and four a row.

    Args:
        steps, values: [T].
        last: step at the right end.
        width, rows: characters.

    Returns:
        The rows, with the ends of the range at the left of the first and the last. Of many values the largest 3 % stand
        at the upper end, so that the first steps do not hide the others.
    """
    if not len(values):
        return []
    low, high = float(values.min()), float(np.quantile(values, 0.97 if len(values) > 30 else 1.0))
    values = np.minimum(values, high)
    span, cells = (high - low) or 1.0, np.zeros((rows * 4, width * 2), bool)
    x = np.minimum((steps / max(last, 1.0) * (width * 2 - 1)).astype(int), width * 2 - 1)
    y = ((high - values) / span * (rows * 4 - 1)).round().astype(int)
    for (x1, y1), (x2, y2) in zip(zip(x, y), zip([*x[1:], x[-1]], [*y[1:], y[-1]])):
        for part in np.linspace(0, 1, max(abs(x2 - x1), abs(y2 - y1), 1) + 1):
            cells[round(y1 + (y2 - y1) * part), round(x1 + (x2 - x1) * part)] = True
    bits = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])
    blocks = cells.reshape(rows, 4, width, 2).transpose(0, 2, 1, 3)  # [rows, width, 4, 2]
    lines = ["".join(chr(0x2800 + int((block * bits).sum())) for block in row) for row in blocks]
    marks = [f"{high:8.3f}", *[" " * 8] * (rows - 2), f"{low:8.3f}"]
    return [f"{mark} {line}" for mark, line in zip(marks, lines)]


def printable(text: str) -> str:
    """Returns text without characters that steer a terminal."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "·" for sign in text)[:MOST_TEXT]


def frame(run: Records, silence: float | None, width: int):
    """Returns one view of a run for a terminal that is `width` characters wide: what rich prints."""
    from rich.console import Group
    from rich.panel import Panel

    parts = [_head(run, silence, width), *_curves(run, width), *_experts(run, width)]
    for sample in run.kind(SAMPLE)[-1:]:
        text = printable(f"{sample.get('prompt', '')}{sample.get('text', '')}")
        parts.append(Panel(_plain(text), title=f"text sampled at step {sample['step']}", title_align="left"))
    return Group(*parts)


def _plain(text: str, style: str = ""):
    from rich.text import Text

    return Text(text, style)  # no mark-up is read in it


def _head(run: Records, silence: float | None, width: int):
    """Returns the panel with the name, the progress and the newest figures."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    total = run.config.train.steps if run.config else None
    done, left, figures = last_step(run), remaining(run), []
    if total:
        figures.append(f"step {done:,} of {total:,} ({100 * done / total:.0f} %)")
    if left is not None and not has_ended(run):
        figures.append(f"about {_clock(left)} left")
    _, losses = run.series(TRAIN, "loss")
    _, validation = run.series(EVALUATION, "loss")
    _, speeds = run.series(TRAIN, "tokens_per_second")
    figures += [f"loss {losses[-1]:.4f}"] if len(losses) else []
    figures += [f"validation {validation[-1]:.4f}"] if len(validation) else []
    unit = run.config.unit if run.config else "tokens"
    figures += [f"{speeds[-1]:,.0f} {unit}/s"] if len(speeds) else []
    room = max(width - 4, 10)
    full = room * min(done, total) // total if total else 0
    progress = Text("━" * full, "green").append("─" * (room - full), "dim")
    return Panel(
        Group(progress, _plain("   ".join(figures))),
        title=_plain(f"{run.name}: {state_of(run, silence)}", "bold"),
        title_align="left",
    )


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"


def _curves(run: Records, width: int) -> Iterator[Any]:
    """Yields the curve of the loss, and one line for each further figure."""
    from rich.panel import Panel

    steps, losses = run.series(TRAIN, "loss")
    if not len(losses):
        return
    last = run.config.train.steps if run.config else steps[-1]
    rows = chart(steps, losses, last, max(width - 15, 10))
    for name, kind, key in (
        ("valid.", EVALUATION, "loss"),
        ("accuracy", EVALUATION, "accuracy"),
        ("lr", TRAIN, "learning_rate"),
        ("grad", TRAIN, "gradient_norm"),
        ("speed", TRAIN, "tokens_per_second"),
    ):
        _, values = run.series(kind, key)
        if len(values):
            rows.append(f"{name:>8} {spark(values, max(width - 26, 10))} {values[-1]:.4g}")
    yield Panel(_plain("\n".join(rows)), title="training loss", title_align="left")


def _experts(run: Records, width: int) -> Iterator[Any]:
    """Yields the bars of the experts of each layer at the newest logged step."""
    from rich.panel import Panel
    from rich.text import Text

    steps, load = run.by_layer("load")  # [T, M, E]
    if load.ndim != 3:
        return
    colours, lines = expert_colours(load.shape[2]), []
    room = max(width - 40, 8)  # experts of a line
    figures = {key: run.by_layer(key)[1] for key in ("max_violation", "layer_dropped")}
    for place, layer in enumerate(run.layers):
        signs = bar(load[-1, place])
        line = Text(f"layer {layer:<3} ")
        for sign, colour in zip(signs[:room], colours):
            line.append(sign, colour)
        line.append(f"… {len(signs) - room} more" if len(signs) > room else "")
        for name, key, form in (("MaxVio", "max_violation", "{:.2f}"), ("dropped", "layer_dropped", "{:.1%}")):
            if figures[key].size:
                line.append(f"  {name} {form.format(figures[key][-1, place])}", "dim")
        lines.append(line)
    title = f"load of the experts at step {int(steps[-1])} (half height: the mean)"
    yield Panel(Text("\n").join(lines), title=title, title_align="left")


def watch(run: Path, every: float, once: bool) -> None:
    """Prints frames until the run has ended.

    Raises:
        UserError: `run` is no folder.
    """
    from rich.console import Console
    from rich.live import Live

    if not run.is_dir():
        raise UserError(f"run '{run}': no such folder; give a run folder such as runs/NAME")
    follower, console = Follower(run), Console()
    if once:
        console.print(frame(follower.read(), follower.silence(), console.width))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            records = follower.read()
            live.update(frame(records, follower.silence(), console.width), refresh=True)
            if has_ended(records):
                return
            time.sleep(every)


def main(arguments: list[str]) -> None:
    """Runs the command line."""
    parser = Parser(prog="python -m switchyard.report live", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, on this machine or a shared disk")
    parser.add_argument("--every", type=finite, default=2.0, metavar="S", help="seconds between two frames (default 2)")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    chosen = parser.parse_args(arguments)
    if chosen.every < 0.1:
        parser.error(f"argument --every: {chosen.every}; at least 0.1")
    try:
        watch(chosen.run, chosen.every, chosen.once)
    except KeyboardInterrupt:
        if chosen.once:
            raise
