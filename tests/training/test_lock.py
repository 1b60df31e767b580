"""The lock of a run folder: who holds it, when it is taken over, and that nothing is left."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import psutil
import pytest

from switchyard.errors import UserError
from switchyard.training.lock import LOCK, Holder, contents, locked


def _write(run, **changes) -> None:
    """The lock of a process as this one, but for the changes."""
    run.mkdir(parents=True, exist_ok=True)
    (run / LOCK).write_text(json.dumps(dataclasses.asdict(Holder.own()) | changes))


@pytest.fixture
def ended() -> int:
    """The pid of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_held_folder_names_its_holder_and_stays_as_it_is(tmp_path):
    run = tmp_path / "runs" / "a"
    with locked(run, "a") as existed:
        assert not existed
        before = (run / LOCK).read_bytes()
        with (
            pytest.raises(
                UserError, match=rf"^train.name: a; the run '{run}' is being trained by process {os.getpid()} on host '"
            ),
            locked(run, "a"),
        ):
            pass
        assert (run / LOCK).read_bytes() == before and [path.name for path in run.iterdir()] == [LOCK]
        assert contents(run) == []
    assert not (tmp_path / "runs").exists()  # nothing came into it


def test_the_lock_goes_with_an_error_and_the_folder_stays_with_its_files(tmp_path):
    run = tmp_path / "a"
    with pytest.raises(ValueError, match="a defect"), locked(run, "a"):
        (run / "config.yaml").write_text("")
        raise ValueError("a defect")
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    with locked(run, "a") as existed:
        assert existed


def test_locks_of_the_dead_are_taken_over(tmp_path, ended):
    """Killed; its pid given to another process, this one; the machine started anew."""
    for changes in ({"pid": ended}, {"started": 1.0}, {"boot": "another", "pid": os.getppid()}, {"pid": -3}):
        _write(tmp_path, **changes)
        (tmp_path / f"{LOCK}-left-over").write_text("")
        with locked(tmp_path, "a"):
            assert Holder.read(tmp_path / LOCK) == Holder.own()
        assert list(tmp_path.iterdir()) == []


def test_a_process_that_nobody_has_waited_for_is_dead(tmp_path):
    process = subprocess.Popen(["sleep", "60"])
    _write(tmp_path, pid=process.pid, started=psutil.Process(process.pid).create_time())
    with pytest.raises(UserError, match=f"trained by process {process.pid} "), locked(tmp_path, "a"):
        pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet forgotten
    with locked(tmp_path, "a"):
        pass
    process.wait()


def test_another_host_cannot_be_asked(tmp_path):
    _write(tmp_path, host="elsewhere", boot="another", pid=17)
    before = (tmp_path / LOCK).read_bytes()
    with (
        pytest.raises(
            UserError,
            match=rf"by process 17 on host 'elsewhere', .*; if that process has ended, remove '{tmp_path}/\.lock'$",
        ),
        locked(tmp_path, "a"),
    ):
        pass
    assert (tmp_path / LOCK).read_bytes() == before
    (tmp_path / LOCK).unlink()
    with locked(tmp_path, "a"):
        pass


def test_another_container_of_this_machine_is_asked_by_its_open_file(tmp_path):
    """Its pids mean nothing here."""
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print('ready', flush=True); time.sleep(60)"
    )
    _write(tmp_path, space="pid:[1]", host="container")
    holder = subprocess.Popen([sys.executable, "-c", code, tmp_path / LOCK], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"ready\n"
    with pytest.raises(UserError, match=r"is being trained by .* on host 'container'"), locked(tmp_path, "a"):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path, "a"):
        pass


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"pid": null}', "\x00\x01"])
def test_a_file_that_is_no_lock_is_named(text, tmp_path):
    (tmp_path / LOCK).write_text(text)
    refused = pytest.raises(UserError, match=rf"^'{tmp_path}/\.lock': is not the lock of a training; remove it")
    with refused as caught, locked(tmp_path, "a"):
        pass
    assert "\n" not in str(caught.value)


def test_of_many_that_start_together_one_gets_it(tmp_path):
    """A stale lock is in the way as well."""
    _write(tmp_path / "run", started=1.0)
    code = (
        "import sys, time; from pathlib import Path; from switchyard.training.lock import locked\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "with locked(Path(sys.argv[1]), 'a'): print('got it'); time.sleep(2)\n"
    )
    moment = str(time.time() + 3)
    command = [sys.executable, "-c", code, tmp_path / "run", moment]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(4)]
    assert sorted(job.communicate()[0] for job in jobs) == ["", "", "", "got it\n"]


def test_a_process_that_does_not_write_takes_no_lock(tmp_path):
    with locked(tmp_path / "run", "a", wanted=False) as existed:
        assert existed and not (tmp_path / "run").exists()
