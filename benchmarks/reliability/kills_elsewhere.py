"""Kills what is no training: eval.py, data.prepare and export.py. For kills.py."""

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from campaign import Shown, contents
from forked import Forked


def kill_evaluation(folder: Path, run: Path, count: int, draw: random.Random, shown: Shown) -> Counter:
    """Kills eval.py, and returns the counts."""
    from switchyard.commands import eval_main

    words, found = ["--checkpoint", str(run), "context.mode=pynative"], Counter()
    before, begun = contents(run), time.monotonic()
    usual = Forked(eval_main, words, folder / "eval.log")
    found["unusable"] += usual.wait() != 0
    seconds = time.monotonic() - begun
    while found["kills"] < count and not shown.over:
        job = Forked(eval_main, words, folder / "eval.log")
        time.sleep(draw.random() * seconds)
        found["kills"] += job.poll() is None
        job.kill()
        found["unusable"] += contents(run) != before
        shown.advance("(eval.py)")
    return found


class Preparing:
    """Prepares one text in both forms, and kills that.

    Args:
        folder: to work in.
        draw: random numbers.
        forms: of the folders, in turn; mindrecord takes 100 MB.
    """

    def __init__(self, folder: Path, draw: random.Random, forms: tuple[str, ...] = ("tokens", "tokens", "mindrecord")):
        self.forms = forms
        self.folder, self.draw, self.text = folder, draw, folder / "texts"
        self.seconds: dict[str, float] = {}  # of an undisturbed call
        self.whole: dict[str, dict[str, bytes]] = {}  # what it has made
        self.text.mkdir()
        for number in range(6):
            words = (f"document {draw.randrange(10**6)} of file {number}\n" for _ in range(8000))
            (self.text / f"{number}.txt").write_text("".join(words), encoding="utf-8")
        for form in set(self.forms):
            begun = time.monotonic()
            job = self.start(form, folder / form)
            if job.wait() != 0:
                raise RuntimeError(job.said)
            self.seconds[form], self.whole[form] = time.monotonic() - begun, contents(folder / form)

    def start(self, form: str, out: Path) -> Forked:
        """Starts the command, which goes on where an earlier one was killed."""
        from switchyard.data.prepare import main

        words = ["--input", str(self.text), "--out", str(out), "--tokenizer", "byte", "--seq-length", "32"]
        more = ["--shard-tokens", "60000", "--workers", "1"] if form == "tokens" else ["--format", form]
        return Forked(main, [*words, *more], self.folder / f"{out.name}.log")

    def kill_all(self, count: int, shown: Shown) -> Counter:
        """Kills `count` times in all, one folder after the other, and returns the counts."""
        found, number = Counter(), 0
        while found["kills"] < count and not shown.over:
            form, number = self.forms[number % len(self.forms)], number + 1
            out = self.folder / f"{form}-{number}"
            while found["kills"] < count and self._kill(form, out, found):
                shown.advance("(preparing)")
            found["unusable"] += not out.exists() and self.start(form, out).wait() != 0
            found["runs"] += 1
            found["differing"] += contents(out) != self.whole[form]
        return found

    def _kill(self, form: str, out: Path, found: Counter) -> bool:
        """Starts the command and kills it; returns False where it has ended before that."""
        job = self.start(form, out)
        time.sleep(self.draw.random() * self.seconds[form])
        ended = job.poll() is not None
        job.kill()
        if ended:
            return False
        found["kills"] += 1
        found["half_written"] += (self.folder / f".{out.name}.preparing").exists()
        found["unusable"] += out.exists() and contents(out) != self.whole[form]
        return True


def kill_exporting(folder: Path, count: int, draw: random.Random, shown: Shown) -> Counter:
    """Kills export.py with and without an earlier export in place, and returns the counts."""
    from oracles.tiny_export import save_run

    from switchyard.commands import export_main

    run_to_end(lambda words: save_run(folder, model={"num_layers": 1}) and 0, [], folder / "save.log")
    words = ["--checkpoint", str(folder / "runs" / "tiny"), "--out", str(folder / "out"), "export.max_length=24"]
    begun, found = time.monotonic(), Counter()
    run_to_end(export_main, words, folder / "export.log")
    seconds = time.monotonic() - begun
    shutil.copytree(folder / "out", folder / "earlier")
    while found["kills"] < count and not shown.over:
        shutil.rmtree(folder / "out", ignore_errors=True)
        if in_place := draw.random() < 0.5:
            shutil.copytree(folder / "earlier", folder / "out")
        job = Forked(export_main, words, folder / "export.log")
        time.sleep(draw.random() * seconds)
        if job.poll() is not None:
            continue
        job.kill()
        found["kills"] += 1
        found["half_written"] += any(folder.glob(".tmp-*"))
        found["unusable"] += (in_place or (folder / "out").exists()) and not is_export(folder / "out")
        shown.advance("(exporting)")
    found["unusable"] += Forked(export_main, words, folder / "export.log").wait() != 0
    found["unusable"] += any(folder.glob(".tmp-*"))
    return found


def run_to_end(main: Callable, arguments: list[str], log: Path) -> None:
    """Runs a command that nobody disturbs (RuntimeError: it fails)."""
    job = Forked(main, arguments, log)
    if job.wait() != 0:
        raise RuntimeError(job.said)


def is_export(folder: Path) -> bool:
    """Returns whether a folder holds a whole export."""
    from switchyard.errors import UserError
    from switchyard.inference import manifest

    try:
        manifest.verify(folder, manifest.read(folder))
    except UserError as error:
        print(f"BROKEN: {error}", flush=True)
        return False
    return True
