"""Computes what a run reads, writes and loses each day, from measured rates and stated assumptions. No MindSpore here.

A failure costs the steps since the newest checkpoint, half of the interval on average, and the time to start again.
"""

import math
from dataclasses import dataclass

from switchyard.config import Config
from switchyard.planner.costs import Costs
from switchyard.planner.own_layout import giga
from switchyard.planner.sizes import FLOAT, parameter_count
from switchyard.text_table import table

DAY = 86400.0  # seconds
SAVE_RATE = 0.85e9  # bytes per second that a process prepares to write, hashes included: one core of a Xeon, 0.8 GB
READ_RATE = 0.33e9  # the same of reading: its files are verified, its numbers looked at
TOKEN = FLOAT  # bytes of a token on the disk, see data.mindrecord


@dataclass(frozen=True)
class Assumptions:
    """Holds what nobody measured for the planner.

    Attributes:
        failures: of the whole job, a day.
        disk: bytes per second that the disk of the run folder takes from, or gives to, all processes together.
        restart: seconds from a failure to the reading of the checkpoint: to notice it, to start, to compile.
    """

    failures: float
    disk: float = 20e9
    restart: float = 900.0


@dataclass(frozen=True)
class Day:
    """Holds the figures of a day of a run.

    Attributes:
        step: seconds of a step.
        checkpoint: bytes of one on the disk.
        interval: steps between two.
        save, read: seconds of writing one while training waits, and of reading it at a start.
        steps: that a day's work keeps.
        text: bytes of training text read a day.
        written, restored: bytes of checkpoints written, and read after failures, a day.
        saving, repeated, restarting: seconds of a day that are no training: saving, steps done again, starting again.
        best_interval: steps between checkpoints that lose least.
    """

    step: float
    checkpoint: int
    interval: int
    save: float
    read: float
    steps: float
    text: float
    written: float
    restored: float
    saving: float
    repeated: float
    restarting: float
    best_interval: int

    @property
    def lost(self) -> float:
        """Returns the share of a day that is no training."""
        return (self.saving + self.repeated + self.restarting) / DAY


def day_of(config: Config, cost: Costs, vocab: int, step: float, assumed: Assumptions) -> Day:
    """Returns the figures of a day.

    Args:
        config: of the run.
        cost: of a device of it, of a pipeline the stage that holds most.
        vocab: entries V.
        step: seconds of a step.
        assumed: see Assumptions.
    """
    share = cost.weights + cost.optimizer
    checkpoint = 3 * FLOAT * parameter_count(config, vocab)  # weights and two moments
    save = max(checkpoint / assumed.disk, share / SAVE_RATE)
    loaded = share * config.devices
    read = max(loaded / assumed.disk, share / READ_RATE)
    interval = min(config.train.checkpoint_every or config.train.steps, config.train.steps)
    work = interval * step
    # a day is: work + saving + failures * (half an interval and its saving + start)
    restarting = assumed.failures * (assumed.restart + read)
    repeated = min(assumed.failures * (work + save) / 2, max(DAY - restarting, 0.0))
    restarting = min(restarting, DAY)
    left = DAY - restarting - repeated  # training that counts, and its saving
    saving = left * save / (work + save)
    steps = (left - saving) / step
    done = steps + repeated / (step + save / interval)
    return Day(
        step=step,
        checkpoint=checkpoint,
        interval=interval,
        save=save,
        read=read,
        steps=steps,
        text=done * config.micro_batches * config.data.batch_size * config.window * TOKEN,
        written=done / interval * checkpoint,
        restored=assumed.failures * loaded,
        saving=saving,
        repeated=repeated,
        restarting=restarting,
        best_interval=best_interval(step, save, assumed.failures),
    )


def best_interval(step: float, save: float, failures: float) -> int:
    """Returns the steps between checkpoints that lose least time; 0 where nothing fails.

    They take sqrt(2 * save * time between failures) seconds (Young, A first order approximation to the optimum
    checkpoint interval, 1974).
    """
    return max(1, round(math.sqrt(2 * save * DAY / failures) / step)) if failures else 0


def render_day(day: Day, assumed: Assumptions) -> list[str]:
    """Renders the figures of a day, and what they assume."""
    written = f"checkpoints written, one in {day.interval} steps"
    rows = [
        ["steps that count", f"{day.steps:,.0f}", "", f"{day.steps * day.step / DAY:.1%}"],
        ["training text read", "", giga(day.text), ""],
        [written, f"{day.written / day.checkpoint:,.1f}", giga(day.written), f"{day.saving / DAY:.1%}"],
        ["checkpoints read after failures", f"{assumed.failures:g}", giga(day.restored), ""],
        ["steps done again after failures", f"{day.repeated / day.step:,.0f}", "", f"{day.repeated / DAY:.1%}"],
        ["starting again", f"{assumed.failures:g}", "", f"{day.restarting / DAY:.1%}"],
    ]
    lines = table(["a day", "number", "GB", "time"], rows)
    lines.append(
        f"a checkpoint is {giga(day.checkpoint)} GB; {day.save:.0f} s to write it, {day.read:.0f} s to read it at a "
        "start"
    )
    if day.best_interval:
        lines.append(f"train.checkpoint_every={day.best_interval} would lose least (Young's rule)")
    return [
        *lines,
        f"assumed: {assumed.failures:g} failures a day, disk {assumed.disk / 1e9:g} GB/s for all processes together, "
        f"{assumed.restart:g} s to start again, a step of {day.step:.2f} s as ranked below, training waits for saving",
        f"measured on a core of a Xeon: a process writes {SAVE_RATE / 1e9:g} GB/s and reads {READ_RATE / 1e9:g} GB/s",
    ]
