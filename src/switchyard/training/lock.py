"""Lets one job at a time train in a run folder: a lock file says which one.

The file holds host, pid and start of the process. It is made with its content in one move, taken over where its
process has ended (killed, its pid given to another, the machine started anew), and removed at the end.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from switchyard.errors import UserError
from switchyard.file_errors import writing

LOCK = ".lock"
BOOT, SPACE = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")  # of Linux; elsewhere the host decides
TOLERANCE = 2.0  # seconds by which two readings of a process's start may differ


@dataclass(frozen=True)
class Holder:
    """Identifies the process that trains a run: `boot` and `space` say with which pids it can be compared."""

    host: str
    pid: int
    started: float
    boot: str
    space: str

    @classmethod
    def own(cls) -> "Holder":
        """Returns the Holder of this process."""
        boot = BOOT.read_text().strip() if BOOT.exists() else ""
        space = os.readlink(SPACE) if SPACE.exists() else ""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), boot, space)

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Reads the process that a lock names; None where the lock names none (UserError: not a lock of this
        program)."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{field.name: field.type(content[field.name]) for field in fields(cls)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"'{path}': is not the lock of a training; remove it if no training uses the folder"
            ) from None

    def runs(self, own: "Holder", path: Path) -> bool | None:
        """Returns whether the process that holds the lock `path` still runs; None where `own` cannot know."""
        if self.boot != own.boot or (not self.boot and self.host != own.host):
            return False if self.host == own.host else None  # this machine was started anew, or it is another one
        if self.space != own.space:  # another container of this machine
            return _is_open(path)
        try:
            process = psutil.Process(self.pid)
            alive = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            return alive and abs(process.create_time() - self.started) < TOLERANCE
        except (psutil.NoSuchProcess, ValueError, OverflowError):
            return False


def _is_open(path: Path) -> bool | None:
    """Returns whether the process that made a lock has it open; None where the file system does not tell."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


@contextlib.contextmanager
def locked(run: Path, name: str, wanted: bool = True) -> Iterator[bool]:
    """Keeps other trainings out of a run folder meanwhile.

    Args:
        run: the folder; it is made, and removed again if nothing has come into it.
        name: train.name, for messages.
        wanted: False for the processes of a job that do not write.

    Yields:
        Whether the folder was there before, be it empty.

    Raises:
        UserError: another training holds it, or may hold it on a host that cannot be asked.
    """
    if not wanted or run.is_file():  # which `find_start` refuses
        yield True
        return
    missing = [folder for folder in (run, *run.parents) if not folder.exists()]
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    try:
        with _held(run, name):
            yield run not in missing
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # something is in it
                folder.rmdir()


@contextlib.contextmanager
def _held(run: Path, name: str) -> Iterator[None]:
    own, path = Holder.own(), run / LOCK
    with _turn(run):
        holder = Holder.read(path)
        if holder is not None:
            _refuse_unless_dead(holder, own, path, name)
        for stale in run.glob(f"{LOCK}*"):
            stale.unlink()
        _make(path, own, name)
        file = open(path, "rb")  # noqa: SIM115 (open as long as this process lives, see `_is_open`)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield
    finally:
        file.close()
        with contextlib.suppress(OSError, UserError):
            if Holder.read(path) == own:  # not removed by hand and taken by another
                path.unlink()


@contextlib.contextmanager
def _turn(run: Path) -> Iterator[None]:
    """Lets one process at a time inspect and replace a lock, where the file system can lock folders."""
    handle = os.open(run, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _refuse_unless_dead(holder: Holder, own: Holder, path: Path, name: str) -> None:
    runs = holder.runs(own, path)
    if runs is False:
        return
    who = f"process {holder.pid} on host '{holder.host}'"
    if runs:
        raise UserError(
            f"train.name: {name}; the run '{path.parent}' is being trained by {who}; wait until it ends, or choose "
            "another name"
        )
    raise UserError(
        f"train.name: {name}; the run '{path.parent}' is locked by {who}, whose state is unknown here; if "
        f"that process has ended, remove '{path}'"
    )


def _make(path: Path, own: Holder, name: str) -> None:
    """Makes the lock with its content in one move (UserError: another was faster)."""
    temporary = path.with_name(f"{LOCK}-{own.host}-{own.pid}-{time.time_ns()}")
    try:
        with writing(path):
            temporary.write_text(json.dumps(asdict(own), allow_nan=False), encoding="utf-8")
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise UserError(
                    f"train.name: {name}; another training has just started in '{path.parent}'; wait until it ends, or "
                    "choose another name"
                ) from None
            except OSError:  # a file system without links
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def contents(run: Path) -> list[Path]:
    """Returns the entries of a run folder except locks."""
    return [path for path in run.iterdir() if not path.name.startswith(LOCK)]
