"""The watcher over a stand-in for msrun, which starts `sleep` as its workers and speaks as msrun does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from switchyard.distributed.first_error import first_error
from switchyard.distributed.progress import standings
from switchyard.distributed.watch import audible

STAND_IN = """
import os, signal, subprocess, sys, time
log_dir, codes = sys.argv[1], sys.argv[2:]
workers = []
for rank, body in enumerate(codes):
    environment = os.environ | {"MS_ROLE": "MS_WORKER", "RANK_ID": str(rank)}
    with open(f"{log_dir}/worker_{rank}.log", "w") as log:
        workers.append(subprocess.Popen([sys.executable, "-c", body], env=environment, stdout=log, stderr=log,
                                        preexec_fn=os.setsid))
scheduler = subprocess.Popen(["sleep", "600"], env=os.environ | {"MS_ROLE": "MS_SCHED"})
failed = False
while not failed and not all(worker.poll() == 0 for worker in workers):
    for worker in workers:
        if worker.poll():
            print(f"[ERROR] ME: Worker process {worker.pid} exit with exception. Error code: {worker.poll()}.",
                  file=sys.stderr, flush=True)
            failed = True
            break
    time.sleep(0.05)
for worker in workers:
    if worker.poll() is None:
        os.killpg(os.getpgid(worker.pid), signal.SIGKILL)
if not failed:
    scheduler.kill()
scheduler.wait()
sys.exit(int(failed))
"""
SLEEP = "import time; print('working', flush=True); time.sleep(600)"
SAVE = """
import signal, sys, time
def save(number, frame):
    time.sleep(0.3)
    print("interrupted: saved step 7 of 'runs/x'; continue with --resume", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(600)
"""


def watch(folder: Path, *bodies: str) -> subprocess.Popen:
    """Starts the watcher over workers that run these lines of Python."""
    (folder / "logs").mkdir(exist_ok=True)
    stand_in = folder / "msrun.py"
    stand_in.write_text(STAND_IN)
    command = [sys.executable, "-m", "switchyard.distributed.watch", folder / "logs", sys.executable, stand_in]
    return subprocess.Popen([*command, folder / "logs", *bodies], stderr=subprocess.PIPE, text=True)


def until(done, seconds: float = 20.0):
    """Waits for something to be true."""
    end = time.monotonic() + seconds
    while not (found := done()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)
    return found


def workers_of(job: subprocess.Popen, count: int) -> dict[int, psutil.Process]:
    """rank -> process, once all have printed something."""

    def found():
        held = {}
        for child in psutil.Process(job.pid).children(recursive=True):
            environment = child.environ()
            if environment.get("MS_ROLE") == "MS_WORKER" and child.cmdline()[1:2] == ["-c"]:
                held[int(environment["RANK_ID"])] = child
        return held if len(held) == count else None

    return until(found)


def end_of(job: subprocess.Popen) -> tuple[int, str]:
    """(exit code, stderr); the watcher's whole tree must be gone."""
    tree = psutil.Process(job.pid).children(recursive=True) if job.poll() is None else []
    _, said = job.communicate(timeout=30)
    assert not [process for process in tree if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    return job.returncode, said


def test_a_job_that_ends_well(tmp_path):
    job = watch(tmp_path, "pass", "import time; time.sleep(0.5)")
    assert end_of(job) == (0, "")


def test_a_killed_worker_is_named_and_all_end(tmp_path):
    job = watch(tmp_path, SLEEP, SLEEP)
    workers = workers_of(job, 2)
    until(lambda: (tmp_path / "logs" / "worker_1.log").read_text())
    time.sleep(0.5)  # the watcher has seen them too
    workers[1].kill()
    started = time.monotonic()
    code, said = end_of(job)
    assert code == 1 and time.monotonic() - started < 10
    log = tmp_path / "logs" / "worker_1.log"
    assert said == f"error: rank 1 was killed by signal 9; its log {log} says:\nworking\n"


def test_a_mistake_in_the_input_keeps_its_line_and_code(tmp_path):
    body = "import sys; print('error: moe.groups: 3; must be less'); sys.exit(2)"
    code, said = end_of(watch(tmp_path, SLEEP, body))
    assert code == 2
    assert said == f"error: moe.groups: 3; must be less (rank 1, {tmp_path / 'logs' / 'worker_1.log'})\n"


def test_a_full_disk_keeps_its_code(tmp_path):
    body = "import sys; print(\"error: 'a': No space left on device\"); sys.exit(74)"
    code, said = end_of(watch(tmp_path, SLEEP, body))
    assert code == 74 and said.startswith("error: 'a': No space left on device (rank 1, ")


def test_a_traceback_is_shown(tmp_path):
    code, said = end_of(watch(tmp_path, "print('before'); 1 / 0", SLEEP))
    assert code == 1 and "before" not in said
    assert said.splitlines()[0].startswith("error: rank 0 ended with code 1; its log ")
    assert said.splitlines()[1].startswith("Traceback") and "ZeroDivisionError" in said.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_workers_save(tmp_path, number, usual_hangup):
    job = watch(tmp_path, SAVE, SAVE)
    workers_of(job, 2)
    for rank in range(2):
        until(lambda rank=rank: "ready" in (tmp_path / "logs" / f"worker_{rank}.log").read_text())
    time.sleep(0.5)  # the watcher has seen them too
    os.kill(job.pid, number)
    if number == signal.SIGHUP:  # a terminal that closes sends it twice
        time.sleep(0.05)
        os.kill(job.pid, number)
    code, said = end_of(job)
    assert code == 75 and said.startswith("interrupted: saved step 7 of 'runs/x'; continue with --resume (rank ")


def test_a_second_signal_ends_the_job(tmp_path):
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
    job = watch(tmp_path, stubborn, stubborn)
    workers_of(job, 2)
    until(lambda: (tmp_path / "logs" / "worker_1.log").read_text())
    time.sleep(0.5)
    os.kill(job.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert job.poll() is None
    os.kill(job.pid, signal.SIGTERM)
    assert end_of(job) == (130, "interrupted: the job was ended before it could save\n")


def test_a_worker_that_ends_at_once(tmp_path):
    """Before the watcher looks: its code is told, and its rank where its log gives it away."""
    code, said = end_of(watch(tmp_path, SLEEP, "import os; os._exit(3)"))
    assert code == 1 and "ended with code 3" in said


def test_the_end_of_a_log_that_says_nothing(tmp_path):
    log = tmp_path / "worker_0.log"
    assert first_error(log) == []
    log.write_text("".join(f"line {number}\n" for number in range(9)))
    assert first_error(log) == [f"line {number}" for number in range(4, 9)]


STALLED = """
import faulthandler, time
from switchyard.distributed.progress import DATA, STEP, Board, Standing
board = Board.of_job({rank})
board.write(Standing(7, {phase}, time.monotonic(), 0.5))
faulthandler.dump_traceback_later(0.6)
def hangs():
    time.sleep(600)
hangs()
"""


def test_a_job_that_stands_still_ends_with_the_stacks_of_all_and_the_rank_that_lags(tmp_path):
    job = watch(tmp_path, *(STALLED.format(rank=rank, phase=phase) for rank, phase in ((0, "STEP"), (1, "DATA"))))
    code, said = end_of(job)
    assert code == 1 and said.startswith("error: train.stall_seconds: 0.5; nothing has moved for ")
    assert "rank 1 lags in reading data after step 7; the others are in training step after step 7" in said
    for rank in range(2):
        assert "in hangs" in (tmp_path / "logs" / f"worker_{rank}.log").read_text()
        assert f" rank {rank} | " in (tmp_path / "logs" / "all.log").read_text()


def test_a_rank_that_was_stopped_is_named(tmp_path):
    """Both ranks are in the same phase; the one that was stopped writes no stack."""
    job = watch(tmp_path, *(STALLED.format(rank=rank, phase="STEP").replace("0.5)", "3.0)") for rank in (0, 1)))
    workers = workers_of(job, 2)
    until(lambda: len(standings(tmp_path / "logs")) == 2)
    workers[1].suspend()
    code, said = end_of(job)
    assert (
        code == 1 and "all ranks of this machine are in training step after step 7; rank 1 was stopped by a sig" in said
    )


def test_a_failed_job_is_started_again(tmp_path):
    """The first time it fails, the second time its command says that it was restarted."""
    once = f"""
import pathlib, sys
place = pathlib.Path({str(tmp_path)!r}) / "tried"
if not place.exists():
    place.touch()
    sys.exit("error: the node was lost")
print("goes on")
"""
    (tmp_path / "logs").mkdir()
    stand_in = tmp_path / "msrun.py"
    stand_in.write_text(STAND_IN.replace("sys.argv[2:]", "[code for code in sys.argv[2:] if code != '--restarted']"))
    options = ["--max-restarts", "2", "--restart-wait", "0.1"]
    command = [sys.executable, "-m", "switchyard.distributed.watch", *options, tmp_path / "logs", sys.executable]
    done = subprocess.run([*command, stand_in, tmp_path / "logs", once], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "restart 1 of 2 in 0.1 s" in done.stderr
    merged = (tmp_path / "logs" / "all.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in merged if " rank 0 " in line] == [
        "rank 0 | error: the node was lost", "rank 0 | goes on"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "level"), [(None, "3"), ("0", "0"), ("2", "2"), ("3", "3"), ("4", "3"), ("", "3"), ("x", "3")]
)
def test_msrun_is_never_too_quiet_to_name_the_worker_that_failed(asked, level):
    assert audible({} if asked is None else {"GLOG_v": asked}) == level
