"""What happens when the machine fails? Full and read-only disks, lost and slow ranks, two writers, limits, hang-ups.

    python benchmarks/reliability/faults.py [--short] [--seed 1] [--folder DIR] [--json FILE]

Each fault has a rule (RULES), which each try must keep. A try that does not meet its fault (a limit that is large
enough, a run that ends before it) is not counted. After a fault that ends a run the same command goes on, and the run
must have the figures of an undisturbed one. Small and read-only disks are file systems in memory, which need root:
without it those tries are left out. The short form has no ranks, which tests/distributed has, and few tries.
"""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import campaign
import psutil
import yaml
from campaign import Shown, damaged, fault_of, mount, small_disk
from forked import POLL, Forked, limited, own_size
from kills import Runs, count_of
from long_run import last_step
from oracles.jobs import start_alone, worker_of
from oracles.tiny_run import metrics_of

RULES = {
    "full disk": "one line names the file; checkpoints are whole; --restarted goes on when there is space",
    "file size limit": "one line names the file; checkpoints are whole; --restarted goes on without the limit",
    "read-only folder": "one line names the folder before a step is made; nothing is written",
    "lost rank": "the job ends, the rank and the signal are named; --max-restarts goes on from the newest checkpoint",
    "stopped rank": "the job ends after train.stall_seconds, the rank is named; --max-restarts goes on",
    "slow rank": "the job goes on; metrics name the rank and the time that a step waits for it",
    "two writers": "the second training says which process holds the folder, and changes nothing",
    "low memory": "one line says that memory is short; checkpoints are whole; --restarted goes on without the limit",
    "few open files": "one line says so, or that MindSpore cannot read how much memory there is; then as above",
    "closed terminal": "the step is saved, exit code 75; --restarted goes on",
}
TRIES = {
    "full disk": 10,
    "file size limit": 6,
    "read-only folder": 3,
    "two writers": 5,
    "low memory": 10,
    "few open files": 8,
    "closed terminal": 10,
}
SHORT_TRIES = {"full disk": 1, "file size limit": 1, "read-only folder": 1, "two writers": 1, "closed terminal": 1}
MOST = 3  # tries for each try that meets its fault
STALL = 15.0
RANK_STEPS = 600


class Faults:
    """Lets runs meet faults, and counts what became of them.

    Args:
        folder: to work in.
        steps: of a run.
        draw: random numbers.
    """

    def __init__(self, folder: Path, steps: int, draw: random.Random):
        self.runs, self.draw = Runs(folder, 1, steps, draw), draw
        self.said: dict[str, Counter] = {}
        self.number = 0

    def try_all(self, tries: dict[str, int], shown: Shown) -> list[dict]:
        """Returns a row for each kind of fault."""
        rows = []
        for fault, count in tries.items():
            work, found = getattr(self, f"_{fault.replace(' ', '_').replace('-', '_')}"), Counter()
            for _ in range(MOST * count):
                if found["tries"] == count or shown.over:
                    break
                self.number += 1
                outcome = work(f"hit-{self.number}")
                if outcome is None:
                    continue
                found["tries"] += 1
                found["kept"] += outcome == ""
                if outcome:
                    print(f"BROKEN: {fault}: {outcome}", flush=True)
                shown.advance(f"({fault})")
            rows.append(row_of(fault, found["tries"], found["kept"]))
        return rows

    # ---- disks
    def _full_disk(self, name: str) -> str | None:
        with small_disk(self.runs.run(name), self.draw.randrange(50_000, 700_000)) as mounted:
            if not mounted:
                return None
            return self._ended(name, "No space left on device", repair=lambda: self._remount(name, "size=64M"))

    def _file_size_limit(self, name: str) -> str | None:
        size = self.draw.randrange(4_000, 80_000)
        return self._ended(name, "File too large", before=limited(resource.RLIMIT_FSIZE, size))

    def _read_only_folder(self, name: str) -> str | None:
        with small_disk(self.runs.run(name), 1 << 20) as mounted:
            if not mounted or not self._remount(name, "ro"):
                return None
            job = self.runs.start("plain", name)
            code = job.wait()
            wrong = complaint(code, job.said, (os.strerror(errno.EROFS),)) or ""
            return wrong or ("" if count_of(job, "training") == 0 else "steps were made")

    def _remount(self, name: str, option: str) -> bool:
        return mount("-o", f"remount,{option}", str(self.runs.run(name)))

    # ---- processes
    def _two_writers(self, name: str) -> str | None:
        job = self._until_steps(name, self.draw.randrange(1, 8))
        if job.poll() is not None:
            return None
        log = job.log.rename(job.log.with_suffix(".first"))
        second = self.runs.start("plain", name)
        code = second.wait()
        if job.poll() is not None:
            return None if code == 0 else ""
        job.log = log
        wrong = complaint(code, second.said, (f"is being trained by process {job.pid}",))
        return wrong or self._compared(job.wait(), job.said, name)

    def _closed_terminal(self, name: str) -> str | None:
        job = self._until_steps(name, self.draw.randrange(1, 12), hear_hang_ups)
        for _ in range(2):  # the shell and the system send one each
            job.send(signal.SIGHUP)
        code = job.wait()
        if code == 0:
            return None
        if code != 75 or "interrupted: saved step" not in job.said:
            return f"code {code}: {job.said[-600:]}"
        return self._go_on(name)

    # ---- limits
    def _low_memory(self, name: str) -> str | None:
        limit = own_size() + self.draw.randrange(10 << 20, 400 << 20)
        return self._ended(name, "memory: ", before=limited(resource.RLIMIT_AS, limit))

    def _few_open_files(self, name: str) -> str | None:
        own = len(os.listdir("/proc/self/fd"))
        before = limited(resource.RLIMIT_NOFILE, own + self.draw.randrange(0, 12))
        return self._ended(name, "Too many open files", "memory: ", before=before)

    # ---- what all have in common
    def _until_steps(self, name: str, steps: int, before: Callable = lambda: None) -> Forked:
        job = self.runs.start("plain", name, before=before)
        while job.poll() is None and count_of(job, "training") < steps:
            time.sleep(POLL)
        return job

    def _ended(
        self, name: str, *words: str, repair: Callable = lambda: None, before: Callable = lambda: None
    ) -> str | None:
        """Trains until the fault ends the run with a line that has one of the words; None where it does not."""
        job = self.runs.start("plain", name, before=before)
        code = job.wait()
        if code == 0:
            return None
        wrong = complaint(code, job.said, words)
        repair()
        return wrong or self._go_on(name)

    def _go_on(self, name: str) -> str:
        """Returns what is wrong with a run that goes on after its fault; '' where it ends as the undisturbed one."""
        run = self.runs.run(name)
        if lines := damaged(run):
            return lines[0]
        job = self.runs.start("plain", name)
        return self._compared(job.wait(), job.said, name)

    def _compared(self, code: int, said: str, name: str) -> str:
        if code:
            return f"does not go on: code {code}: {said[-600:]}"
        other = self.runs.undisturbed("plain")
        same = self.runs.figures("plain", name) == self.runs.figures("plain", other)
        return "" if same else "other figures than the undisturbed run"


def complaint(code: int, said: str, words: tuple[str, ...]) -> str | None:
    """Returns what is wrong with how a command has ended: with code 2, or 74 of a full disk, and one line of words."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    if code in (2, 74) and len(lines) == 1 and fault_of(said) is None and any(word in lines[0] for word in words):
        return None
    return f"code {code}: {said[-600:]}"


def hear_hang_ups() -> None:
    """Has SIGHUP its effect, which nohup takes away from a campaign and all that it starts."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def try_ranks(folder: Path, draw: random.Random, steps: int = RANK_STEPS) -> list[dict]:
    """Loses, stops and slows a rank of a job of the launch script, and returns the rows."""
    runs = Runs(folder, 2, steps, draw)
    tree = yaml.safe_load((runs.folder / "plain.yaml").read_text(encoding="utf-8"))
    tree["train"] |= {"stall_seconds": STALL, "checkpoint_every": steps // 20, "eval_every": steps // 4}
    tree["context"]["mode"] = "graph"  # in PyNative mode a step of two processes takes seconds where cores are shared
    (runs.folder / "config.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    job, run = start_alone(runs.folder, "hit", "--max-restarts", "2"), runs.run("hit")
    disturb_ranks(job, run, steps)
    log, found = runs.folder / "logs-hit" / "all.log", Counter()
    code, said = job.wait(), log.read_text(encoding="utf-8", errors="replace")
    same = code == start_alone(runs.folder, "alone").wait() == 0
    same = same and runs.figures("plain", "hit") == runs.figures("plain", "alone")
    found["lost rank"] = "rank 1 was killed by signal 9" in said
    found["stopped rank"] = "rank 0 was stopped by a signal" in said
    waits = [line for line in metrics_of(run, "train") if line.get("wait_seconds", 0) > 0.1]
    found["slow rank"] = any(line.get("slowest_rank") == 1 for line in waits)
    if not (same and all(found.values())):
        print(f"BROKEN: code {code}, same {same}, {dict(found)}: {said[-2000:]}", flush=True)
    return [row_of(fault, 1, int(kept and same)) for fault, kept in found.items()]


def disturb_ranks(job: subprocess.Popen, run: Path, steps: int) -> None:
    """Kills a rank after a quarter of the steps, stops one after half of them, and slows one at the end."""
    root = psutil.Process(job.pid)

    def worker(rank: int, step: int) -> psutil.Process:
        while job.poll() is None and last_step(run) < step:
            time.sleep(0.05)
        return worker_of(root, rank)

    worker(1, steps // 4).kill()
    worker(0, steps // 2).send_signal(signal.SIGSTOP)
    slow = worker(1, steps * 3 // 5)
    with contextlib.suppress(psutil.NoSuchProcess):  # the job may end meanwhile
        for _ in range(20):  # half of the time it stands still
            slow.send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            slow.send_signal(signal.SIGCONT)
            time.sleep(0.2)


def row_of(fault: str, tries: int, kept: int) -> dict:
    """Returns the row of a fault."""
    return {"fault": fault, "rule": RULES[fault], "tries": tries, "kept": kept, "broken": tries - kept}


def try_everything(folder: Path, short: bool, draw: random.Random) -> list[dict]:
    """Tries all faults, and returns the rows."""
    tries = SHORT_TRIES if short else TRIES
    shown = Shown("faults", sum(tries.values()))
    rows = [] if short else try_ranks(folder, draw)
    return rows + Faults(folder, 8 if short else 16, draw).try_all(tries, shown)


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign."""
    return campaign.run_campaign("faults", __doc__, try_everything, arguments)


if __name__ == "__main__":
    sys.exit(main())
