"""Is anything lost when processes are killed? 200 random `kill -9`, then the command again.

    python benchmarks/reliability/kills.py [--short] [--seed 1] [--folder DIR] [--json FILE]

- training, saving, evaluation: train.py is killed some steps after it began, while a checkpoint is being written, and
  at an evaluation; in one process, and in two (a rank, and after a moment the others, as the launcher does). Each time
  `train.py --restarted` goes on. Runs take turns: plain, with moe.record, and with train.async_checkpoint.
- eval.py: the run folder must stay as it is, byte by byte.
- preparing: data.prepare is killed and called again until the folder is there; it must be that of an undisturbed call.
- exporting: export.py is killed with and without an earlier export in place; what is there must be whole.

A folder is unusable where a checkpoint in it cannot be read, or where the command that goes on fails. A finished run
must have the losses, the evaluations and the recorded choices of an undisturbed one.
"""

import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import campaign
from campaign import Shown, checked_lines, damaged
from forked import POLL, Forked, Job
from kills_elsewhere import Preparing, kill_evaluation, kill_exporting
from oracles.tiny_run import losses_of, metrics_of, run_config, untimed, write_text

SAVE_EVERY, EVAL_EVERY = 4, 12
VARIANTS = ("plain", "record", "async")
WHOLE = {
    ("training", 1): 40,
    ("saving", 1): 40,
    ("evaluation", 1): 20,
    ("training", 2): 20,
    ("saving", 2): 20,
    ("evaluation", 2): 10,
    ("eval.py", 1): 10,
    ("preparing", 1): 20,
    ("exporting", 1): 20,
}
SHORT = {("training", 1): 1, ("saving", 1): 2, ("evaluation", 1): 1, ("preparing", 1): 2}


class Runs:
    """Trains runs that are killed, and undisturbed runs to compare with.

    Args:
        folder: to work in.
        processes: 1 or 2.
        steps: of a run.
        draw: random numbers.
    """

    def __init__(self, folder: Path, processes: int, steps: int, draw: random.Random):
        self.folder, self.processes, self.draw = folder / f"on-{processes}", processes, draw
        self.found: dict[str, Counter] = {}
        self.faults: list[str] = []
        self.folder.mkdir()
        write_text(self.folder)
        for variant in VARIANTS:
            keys = {"steps": steps, "checkpoint_every": SAVE_EVERY, "eval_every": EVAL_EVERY, "eval_batches": 2}
            keys |= {"keep_checkpoints": 2, "async_checkpoint": variant == "async"}
            degrees = {"data_parallel": processes, "expert_parallel": processes}
            sections = {"moe": {"expert_num": 4}, "train": keys, "parallel": degrees, "context": {"mode": "pynative"}}
            config = run_config(self.folder, **sections)
            (self.folder / f"{variant}.yaml").write_text(config.to_yaml(), encoding="utf-8")

    def start(self, variant: str, name: str, *more: str, before: Callable[[], object] = lambda: None):
        """Starts train.py, which goes on where the run has a checkpoint; `before` is called in each process."""
        from switchyard.commands import train_main

        words = ["--config", str(self.folder / f"{variant}.yaml"), "--restarted", f"train.name={name}"]
        if variant == "record":
            words.append(f"moe.record={self.folder / name}.safetensors")
        kind, log = Forked if self.processes == 1 else Job, self.folder / f"{name}.log"
        return kind(train_main, [*words, *more], log, before=before)

    def run(self, name: str) -> Path:
        """Returns the folder of a run."""
        return self.folder / "runs" / name

    def undisturbed(self, variant: str) -> str:
        """Returns the name of a run that nobody has killed, trained where it is asked for first."""
        name = f"alone-{variant}"
        if not self.run(name).exists():
            job = self.start(variant, name)
            if job.wait() != 0:
                raise RuntimeError(f"{name}: {job.said}")
        return name

    def kill_all(self, kills: Counter, shown: Shown) -> None:
        """Kills until `kills` (phase -> number) are done, then lets the last run end."""
        left, number, name = +kills, 0, ""
        while left or name:
            if shown.over:
                left = Counter()
            if not name:
                if not left:
                    break
                variant = VARIANTS[number % len(VARIANTS)]
                name, number = f"hit-{number}", number + 1
            phase = self.draw.choice(sorted(left)) if left else ""
            job, run = self.start(variant, name), self.run(name)
            if phase and self._reach(phase, job, run):
                self._kill(job)
                self._check(phase, run)
                left[phase] -= 1
                left = +left
                shown.advance(f"({phase}, {self.processes} process(es))")
            elif job.wait() == 0:
                self._compare(variant, name)
                name = ""
            else:
                self._note(phase or "the end", "unusable", f"{name}: {job.said[-2000:]}")
                name = ""

    def _reach(self, phase: str, job, run: Path) -> bool:
        """Returns True at a moment of a phase; False where the job has ended before it."""
        steps, saves, delay = self.draw.randrange(10), self.draw.randrange(1, 3), self.draw.random()
        if phase == "training" and steps == 0:
            return self._sleep(job, 2 * delay)  # before its first step
        seen, was_there = 0, False
        before = count_of(job, phase)
        while job.poll() is None:
            if phase == "saving":
                there = any((run / "checkpoints").glob(".tmp-*"))
                seen += there and not was_there
                was_there = there
                if seen >= saves:
                    return self._sleep(job, 0.03 * delay)
            elif count_of(job, phase) - before >= (steps if phase == "training" else 1):
                return self._sleep(job, 0.3 * delay)
            time.sleep(POLL / 4 if phase == "saving" else POLL)
        return False

    def _sleep(self, job, seconds: float) -> bool:
        time.sleep(seconds)
        return job.poll() is None

    def _kill(self, job) -> None:
        if self.processes == 1:
            job.kill()
        else:
            job.kill(self.draw.randrange(2), self.draw.random() * 0.5)

    def _check(self, phase: str, run: Path) -> None:
        """Looks at the folder that a kill has left."""
        self._note(phase, "kills")
        if any((run / "checkpoints").glob(".tmp-*")):
            self._note(phase, "half_written")
        for line in damaged(run):
            self._note(phase, "unusable", line)
        torn, doubled = checked_lines(run / "metrics.jsonl")
        self.found[phase] += Counter(torn=torn, doubled=doubled)

    def _compare(self, variant: str, name: str) -> None:
        """Compares a run that was killed with an undisturbed one."""
        other = self.undisturbed(variant)
        self._note("finished", "runs")
        torn, doubled = checked_lines(self.run(name) / "metrics.jsonl")
        self.found["finished"] += Counter(torn=torn, doubled=doubled)
        if self.figures(variant, name) != self.figures(variant, other):
            self._note("finished", "differing", f"{name}: other figures than {other}")
        shutil.rmtree(self.run(name))

    def figures(self, variant: str, name: str) -> tuple:
        """Returns all that a run must have in common with an undisturbed one."""
        run, choices = self.run(name), {}
        if variant == "record":
            from safetensors.numpy import load_file

            arrays = load_file(f"{self.folder / name}.safetensors")
            choices = {key: array.tobytes() for key, array in arrays.items()}
        return losses_of(run), [untimed(line) for line in metrics_of(run, "evaluation")], choices

    def _note(self, phase: str, what: str, fault: str = "") -> None:
        self.found.setdefault(phase, Counter())[what] += 1
        if fault:
            self.faults.append(fault)
            print(f"BROKEN: {fault}", flush=True)


def count_of(job, phase: str) -> int:
    """Returns how many steps a job has printed; of an evaluation, how many of those that one follows."""
    steps = [line.split()[1].split("/")[0] for line in job.said.splitlines() if line.startswith("step ")]
    wanted = EVAL_EVERY if phase == "evaluation" else 1
    return len({step for step in steps if step.isdigit() and int(step) % wanted == 0})


def row_of(phase: str, processes: int, found: Counter) -> dict:
    """Returns the row of a phase; `broken` counts what must be 0."""
    names = ("kills", "half_written", "unusable", "torn", "doubled", "runs", "differing")
    row = {"phase": phase, "processes": processes} | {name: found[name] for name in names}
    return row | {"broken": sum(found[name] for name in ("unusable", "torn", "doubled", "differing"))}


def kill_everything(folder: Path, short: bool, draw: random.Random) -> list[dict]:
    """Kills what WHOLE or SHORT says, and returns the rows."""
    plan = SHORT if short else WHOLE
    shown, rows = Shown("kills", sum(plan.values())), []
    steps = 16 if short else 60
    ones, forms = Runs(folder, 1, steps, draw), [("tokens",)] if short else []
    others = {
        "eval.py": lambda *more: kill_evaluation(folder, ones.run(ones.undisturbed("plain")), *more),
        "preparing": lambda count, draw, shown: Preparing(folder, draw, *forms).kill_all(count, shown),
        "exporting": lambda *more: kill_exporting(folder, *more),
    }
    for phase, kill in others.items():
        if count := plan.get((phase, 1), 0):
            rows.append(row_of(phase, 1, kill(count, draw, shown)))
    for processes in (1, 2):
        phases = ("training", "saving", "evaluation")
        kills = Counter({phase: plan.get((phase, processes), 0) for phase in phases})
        if not +kills:
            continue
        runs = ones if processes == 1 else Runs(folder, processes, steps, draw)
        runs.kill_all(kills, shown)
        rows += [row_of(phase, processes, runs.found.get(phase, Counter())) for phase in (*kills, "finished")]
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign."""
    return campaign.run_campaign("kills", __doc__, kill_everything, arguments)


if __name__ == "__main__":
    sys.exit(main())
