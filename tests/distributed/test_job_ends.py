"""How a job of real processes ends: by a mistake, by a signal, by a killed process; and that it goes on."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from oracles.jobs import command_of, run, start
from oracles.tiny_run import losses_of, run_config, write_text

from switchyard.checkpoint import store as checkpoint

MANY = 1_000_000


def config_of(folder: Path, steps: int):
    """Conditional, cut over two processes, a checkpoint every 50 steps."""
    return run_config(
        folder,
        model={"dropout": 0.1},
        moe={"expert_num": 4},
        parallel={"data_parallel": 2, "expert_parallel": 2},
        schedule={"total_steps": 500},
        train={"steps": steps, "checkpoint_every": 50, "keep_checkpoints": 2},
    )


def test_a_mistake_is_said_once_and_ends_all(tmp_path):
    write_text(tmp_path)
    config = config_of(tmp_path, 5)
    done = run(config, tmp_path, "moe.groups=1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: moe.groups: 1; must be a multiple of parallel.data_parallel")
    assert not (tmp_path / "runs").exists()


def until(done, seconds: float = 300.0):
    """Waits for something to be true."""
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.2)
    return found


def newest(folder: Path) -> int:
    """Step of the newest checkpoint, 0 before the first."""
    found = checkpoint.listed(folder / "runs" / "tiny")
    return int(found[-1].name.split("-")[1]) if found else 0


def until_saved(job, folder: Path, after: int) -> None:
    """Waits until a job has saved a step beyond `after`; ends all that it has started where that does not come."""
    try:
        until(lambda: newest(folder) > after)
    except AssertionError:
        for process in [*tree_of(job), psutil.Process(job.pid)]:
            process.kill()
        raise


def tree_of(job) -> list[psutil.Process]:
    """All that a job has started."""
    return psutil.Process(job.pid).children(recursive=True)


def ended(job, tree, timeout: float = 60.0) -> str:
    """What a job said when it had ended, none of its processes left."""
    _, said = job.communicate(timeout=timeout)
    left = [process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, left
    return said


def stopped(folder: Path, command: list[str], after: int) -> int:
    """Sends SIGTERM to a job once it has saved a step beyond `after`; returns the step that the signal has saved."""
    job = start(command)
    until_saved(job, folder, after)
    tree = tree_of(job)
    os.kill(job.pid, signal.SIGTERM)
    said = ended(job, tree)
    saved = newest(folder)
    assert job.returncode == 75, said
    assert f"interrupted: saved step {saved} of " in said.splitlines()[-1]
    assert checkpoint.read(folder / "runs" / "tiny").step == saved
    return saved


def killed(folder: Path, command: list[str], after: int) -> tuple[dict[int, float], int]:
    """Kills a worker of a job once it has saved a step beyond `after`; returns the losses and the newest step saved."""
    job = start(command)
    until_saved(job, folder, after)
    tree = tree_of(job)
    worker = next(
        child for child in tree if child.environ().get("RANK_ID") == "1" and "train.py" in str(child.cmdline())
    )
    worker.kill()
    moment = time.monotonic()
    said = ended(job, tree)
    print(f"a killed process ended the job in {time.monotonic() - moment:.1f} s")
    log = folder / "logs" / "tiny" / "worker_1.log"
    assert job.returncode == 1 and f"error: rank 1 was killed by signal 9; its log {log}" in said, said
    losses, held = losses_of(folder / "runs" / "tiny"), newest(folder)
    assert min(losses) == 1 and len(losses) == max(losses) >= held > after
    return losses, held


@pytest.mark.long
def test_a_kill_loses_what_was_not_saved_and_the_run_repeats_it_until_a_signal_saves(tmp_path):
    """Two jobs: a worker is killed; the run is resumed, makes the lost steps again and is stopped by SIGTERM."""
    write_text(tmp_path)
    command = command_of(config_of(tmp_path, MANY), tmp_path)
    before, held = killed(tmp_path, command, after=0)
    saved = stopped(tmp_path, [*command, "--resume"], after=max(before))
    after = losses_of(tmp_path / "runs" / "tiny")
    assert len(after) == max(after) == saved > max(before) >= held
    assert max(abs(after[step] - before[step]) for step in before) <= 1e-6


@pytest.mark.long
@pytest.mark.slow
def test_a_signal_saves_a_kill_does_not_and_both_runs_go_on(tmp_path):
    """Three jobs: stopped by SIGTERM; resumed and killed; resumed to the end, which repeats what the kill has lost."""
    write_text(tmp_path)
    command = command_of(config_of(tmp_path, MANY), tmp_path)
    saved = stopped(tmp_path, command, after=0)
    before, held = killed(tmp_path, [*command, "--resume"], after=saved)
    done = run(config_of(tmp_path, max(before) + 1), tmp_path, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    after = losses_of(tmp_path / "runs" / "tiny")
    assert f"resumed after step {held}" in done.stdout and len(after) == len(before) + 1
    assert max(abs(after[step] - before[step]) for step in before) <= 1e-6
    assert json.loads((tmp_path / "runs" / "tiny" / "result.json").read_text())["steps"] == len(after)
