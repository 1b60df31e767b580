"""Does a long run that is left alone end as the undisturbed one? 10,000 steps on two processes, with all that happens.

    python benchmarks/reliability/long_run.py [--short] [--steps 10000] [--seed 1] [--folder DIR] [--json FILE]

The launch script trains a small conditional model on a mixture of three corpora, with --max-restarts,
train.async_checkpoint, train.on_bad_loss=skip, train.on_save_error=continue and train.stall_seconds. The undisturbed
run has one batch whose loss is NaN. The other run, at the same time, has the same batch, and besides: ranks that are
killed, a rank that is stopped, and a disk that is full until a rank has said so. The disk is a small file system in
memory, which needs root; without it that part is left out, and the figures say so.

Both runs must have the same losses, evaluations, weights and moments, bit for bit.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import campaign
import numpy as np
import psutil
import yaml
from campaign import Shown, checked_lines, small_disk
from oracles.jobs import start_alone, worker_of
from oracles.tiny_run import losses_of, metrics_of, run_config, untimed

from switchyard.checkpoint import store

STEPS, RESTARTS, STALL = 10_000, 20, 60.0
LOG_EVERY = 4  # steps between two losses that are written down and compared
EVENTS = ("kill", "kill", "kill", "kill", "stop", "full")
SHORT_STEPS, SHORT_EVENTS = 400, ("kill", "full")
DISK = 96 << 20  # bytes of the file system in memory
LEFT = 64 << 10  # bytes that are free while it is full: for lines of metrics, too few for a checkpoint
POISON = "SWITCHYARD_POISONED_BATCH"  # names the micro-batch whose loss is NaN
HOOK = '''"""Makes the loss of one micro-batch NaN, in a training that has this folder on its path.

A weight is NaN while the batch is read, as an error of a device or an overflow would make it.
"""

import importlib.util
import os
import sys


class Finder:
    """Changes switchyard.training.loop when it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "switchyard.training.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            advance = module.Trainer._advance

            def poisoned(trainer):
                if trainer._read() != int(os.environ["SWITCHYARD_POISONED_BATCH"]):
                    return advance(trainer)
                from mindspore import Tensor

                gain = next(one for one in trainer.model.get_parameters() if one.name == "norm.gain")
                kept = gain.asnumpy().copy()
                gain.set_data(Tensor(kept * float("nan")))
                try:
                    return advance(trainer)
                finally:
                    gain.set_data(Tensor(kept))

            module.Trainer._advance = poisoned

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, Finder())
'''


def prepare(folder: Path, draw: random.Random) -> list[dict]:
    """Prepares three corpora of lines, and returns the mixture."""
    from switchyard.data.prepare import main

    kinds = {
        "sheep": lambda number: f"{number}: {number * 37 % 101} sheep jump over the {number % 7} gates\n",
        "sums": lambda number: f"{number} + {number % 89} = {number + number % 89}\n",
        "letters": lambda number: " ".join(draw.choices("abcdefghij", k=12)) + "\n",
    }
    mixture = []
    for weight, (name, line) in enumerate(kinds.items(), 1):
        text = folder / f"{name}.txt"
        text.write_text("".join(map(line, range(4000))), encoding="utf-8")
        words = ["--input", str(text), "--out", str(folder / name), "--tokenizer", "byte", "--seq-length", "16"]
        words += ["--val-fraction", "0.01"]
        if main([*words, "--workers", "1"]):
            raise RuntimeError(name)
        mixture.append({"path": str(folder / name), "weight": weight})
    return mixture


def write_config(folder: Path, steps: int, output: Path, mixture: list[dict]) -> None:
    """Writes folder/config.yaml of a run in the folder `output`."""
    keys = {"steps": steps, "checkpoint_every": max(steps // 100, 10), "eval_every": steps // 4, "eval_batches": 2}
    keys |= {"async_checkpoint": True, "on_bad_loss": "skip", "on_save_error": "continue", "stall_seconds": STALL}
    keys |= {"keep_checkpoints": 3, "output_dir": str(output), "log_every": LOG_EVERY, "loggers": []}
    sections = {"moe": {"expert_num": 4}, "data": {"mixture": mixture, "path": None}, "train": keys}
    tree = yaml.safe_load(run_config(folder, **sections, schedule={"total_steps": steps}).to_yaml())
    del tree["parallel"]  # the devices decide
    (folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")


def last_step(run: Path) -> int:
    """Returns the newest step in the metrics of a run."""
    with contextlib.suppress(OSError, ValueError, IndexError), (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - 20_000, 0))
        return max(json.loads(line)["step"] for line in file.read().splitlines()[1:] if line.startswith(b'{"kind'))
    return 0


class Disturbed:
    """Disturbs a job while it runs.

    Args:
        job: of the launch script.
        run: its run folder.
        disk: the folder of the small file system; None where there is none.
        log: of all ranks.
        draw: random numbers.
    """

    def __init__(self, job: subprocess.Popen, run: Path, disk: Path | None, log: Path, draw: random.Random):
        self.job, self.run, self.disk, self.log, self.draw = job, run, disk, log, draw
        self.done: list[tuple[str, int]] = []

    def until(self, step: int) -> bool:
        """Waits for a step of the run; returns False where the job ends before it."""
        while self.job.poll() is None:
            if last_step(self.run) >= step:
                return True
            time.sleep(0.2)
        return False

    def disturb(self, events: list[tuple[int, str]], shown: Shown) -> None:
        """Does one event after the other, each at its step or, after a restart, as soon as the job trains again."""
        for step, event in events:
            if event == "full" and self.disk is None:
                continue
            if not self.until(max(step, last_step(self.run) + 1)):
                return
            time.sleep(self.draw.random() * 0.5)
            getattr(self, f"_{event}")()
            self.done.append((event, last_step(self.run)))
            shown.advance(f"({event} at step {self.done[-1][1]:,})")

    def _kill(self) -> None:
        worker_of(psutil.Process(self.job.pid), self.draw.randrange(2)).kill()
        time.sleep(2.0)  # until the launcher has seen it

    def _stop(self) -> None:
        worker_of(psutil.Process(self.job.pid), self.draw.randrange(2)).send_signal(signal.SIGSTOP)
        time.sleep(2.0)

    def _full(self) -> None:
        filler, before = self.disk / "filler", self._met()
        with contextlib.suppress(OSError), filler.open("wb") as file:  # a save at this moment may take the rest
            left = shutil.disk_usage(self.disk).free - LEFT
            file.write(b"\0" * left)
        while self.job.poll() is None and self._met() == before:
            time.sleep(0.1)
        filler.unlink()

    def _met(self) -> int:
        """Returns how often the ranks have said that the disk is full."""
        return self.log.read_text(encoding="utf-8", errors="replace").count("No space left on device")


def start_alone_in(folder: Path, steps: int, mixture: list[dict], batch: int, *options: str) -> subprocess.Popen:
    """Starts a run, folder/runs/run, with a batch whose loss is NaN."""
    (folder / "hook").mkdir(parents=True)
    (folder / "hook" / "sitecustomize.py").write_text(HOOK, encoding="utf-8")
    write_config(folder, steps, folder / "runs", mixture)
    path = os.pathsep.join([str(folder / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return start_alone(folder, "run", *options, environment={"PYTHONPATH": path, POISON: str(batch)})


def require_success(job: subprocess.Popen, log: Path) -> None:
    """Waits for a job, and says why it has failed (RuntimeError)."""
    if job.wait():
        raise RuntimeError(f"{job.stderr.read().decode(errors='replace')[-2000:]}; {log}")


def long_run(folder: Path, short: bool, draw: random.Random, steps: int = STEPS) -> list[dict]:
    """Trains both runs, and returns the row."""
    steps, events = (SHORT_STEPS, SHORT_EVENTS) if short else (steps, EVENTS)
    mixture = prepare(folder, draw)
    batch, shown = draw.randrange(steps // 4, steps), Shown("long_run", len(events) + 2)
    places = sorted(draw.sample(range(steps // 20, steps - steps // 10), len(events)))
    alone, log = start_alone_in(folder / "alone", steps, mixture, batch), folder / "hit" / "logs-run" / "all.log"
    with small_disk(folder / "hit" / "runs", DISK) as mounted:
        begun = time.monotonic()
        job = start_alone_in(folder / "hit", steps, mixture, batch, "--max-restarts", str(RESTARTS))
        disk = folder / "hit" / "runs"
        disturbed = Disturbed(job, disk / "run", disk if mounted else None, log, draw)
        disturbed.disturb(list(zip(places, draw.sample(events, len(events)))), shown)
        require_success(job, log)
        seconds = time.monotonic() - begun
        shown.advance("(the disturbed run has ended)")
        require_success(alone, folder / "alone" / "logs-run" / "all.log")
        shown.advance("(the undisturbed run has ended)")
        row = compared(disk / "run", folder / "alone" / "runs" / "run", steps)
    happened = Counter(event for event, _ in disturbed.done)
    merged = log.read_text(encoding="utf-8", errors="replace")
    row |= {"kills": happened["kill"], "stops": happened["stop"], "full_disks": happened["full"]}
    row |= {"restarts": merged.count("launcher | restart "), "events": disturbed.done}
    row["seconds"] = round(seconds)
    missed = len(events) - len(disturbed.done) - (0 if mounted else events.count("full"))
    return [row | {"missed": missed, "broken": row["broken"] + missed}]


def compared(hit: Path, alone: Path, steps: int) -> dict:
    """Returns the row of the comparison of two runs."""
    losses, others = losses_of(hit), losses_of(alone)
    skipped = [line["step"] for line in metrics_of(hit, "skipped")]
    torn, doubled = checked_lines(hit / "metrics.jsonl")
    row = {"steps": steps, "losses": len(losses), "processes": 2, "corpora": 3, "torn": torn, "doubled": doubled}
    row |= {"nan_batches": len(skipped), "lost_checkpoints": len(metrics_of(hit, "save_failed"))}
    row["losses_differing"] = sum(losses.get(step) != others.get(step) for step in losses.keys() | others.keys())
    evaluations = [[untimed(line) for line in metrics_of(run, "evaluation")] for run in (hit, alone)]
    row["evaluations_differing"] = int(evaluations[0] != evaluations[1])
    first, second = store.read(hit), store.read(alone)
    one, other = first.weights | first.optimizer, second.weights | second.optimizer
    row["tensors_differing"] = sum(not np.array_equal(array, other.get(name)) for name, array in one.items())
    results = [json.loads((run / "result.json").read_text())["validation_loss"] for run in (hit, alone)]
    row |= {"validation_loss": results[0], "validation_loss_undisturbed": results[1]}
    same_skipped = skipped == [line["step"] for line in metrics_of(alone, "skipped")]
    wrong = int(not losses or max(losses) != steps) + int(not same_skipped)
    wrong += int(not skipped) + int(results[0] != results[1]) + torn + doubled
    return row | {"broken": wrong + sum(value for name, value in row.items() if name.endswith("_differing"))}


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign."""
    return campaign.run_campaign("long_run", __doc__, long_run, arguments, steps=STEPS)


if __name__ == "__main__":
    sys.exit(main())
