"""Files and folders: read only what is a regular file of the expected size, replace in one step, clear what was left.

Imports nothing heavy, so that commands that run no model can use it.
"""

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from switchyard.errors import UserError
from switchyard.file_errors import writing

TEMPORARY = ".tmp-"
OLD = ".tmp-replaced-"  # before the name of what makes way where two folders cannot change places in one step
PLAIN = re.compile(r"[0-9a-zA-Z@_\-.:/]+")  # paths that MindSpore's export accepts
RENAME_EXCHANGE, AT_FDCWD = 2, -100
NO_EXCHANGE = (
    errno.ENOSYS,
    errno.EINVAL,
    errno.EOPNOTSUPP,
    errno.EPERM,
    errno.EXDEV,
)  # this kernel or file system cannot
BLOCK = 1 << 20
LONGEST_NAME = 120  # bytes that leave room for process and host in a name of 255


class UnfitError(ValueError):
    """Reports a file that must not be read: not a regular file, of another size, or outside its folder. The message
    says which.
    """


def open_regular(path: Path, most: int | None = None, folder: Path | None = None) -> BinaryIO:
    """Opens a regular file for reading; never waits for one that is something else.

    Args:
        path: the file.
        most: bytes that it may have.
        folder: the file must be in here after links are followed.

    Raises:
        UnfitError: a device, pipe, socket or folder; too large; a link that leads out of `folder`.
        OSError: it cannot be opened.
    """
    if folder is not None and not _is_inside(path, folder):
        raise UnfitError("is a link that leads out of its folder")
    _require_regular(os.stat(path))  # some devices act when they are opened
    file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: SIM115 (the caller closes)
    try:
        found = os.fstat(file.fileno())
        _require_regular(found)  # another may have taken its place
        if most is not None and found.st_size > most:
            raise UnfitError(f"has more than {most:,} bytes")
        return file
    except UnfitError:
        file.close()
        raise


def _require_regular(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UnfitError(
            "is a directory, not a regular file" if stat.S_ISDIR(found.st_mode) else "is not a regular file"
        )


def _is_inside(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except RuntimeError:  # links that lead to each other
        return False


def read_regular(path: Path, most: int, folder: Path | None = None) -> bytes:
    """Reads a regular file of at most `most` bytes; raises as `open_regular`."""
    with open_regular(path, most, folder) as file:
        return file.read(os.fstat(file.fileno()).st_size)  # a larger number would be taken as memory at once


def sha256_of(file: BinaryIO) -> str:
    """Computes the checksum of the rest of an open file, one block at a time."""
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def require_text(path: Path, field: str) -> None:
    """Refuses a path whose bytes are no UTF-8, which MindSpore cannot open (UserError names `field`)."""
    try:
        str(path.absolute()).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(
            f"{field}: {str(path)!r}; the path is not UTF-8, and MindSpore cannot open it; rename it"
        ) from None


def flush(path: Path) -> None:
    """Asks the system to have a file or directory on the disk before it goes on (UserError: it cannot)."""
    with writing(path):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def flush_tree(folder: Path) -> None:
    """Asks the system to have everything under a folder, and the folder, on the disk."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def remove(path: Path) -> None:
    """Removes a file, link or directory, as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace(new: Path, place: Path, old: Path | None = None) -> None:
    """Brings a finished file or folder to its place; what stands there makes way in the same step.

    Where the system cannot exchange two names, the old one is renamed to `old` first; `present` finds it there if the
    process dies before the second rename.

    Args:
        new: on the same file system as `place`.
        place: may hold a file, a folder or nothing.
        old: a name beside `place`; None = OLD and its name.
    """
    old = old or place.with_name(OLD + place.name)
    if not os.path.lexists(place):  # a link that leads nowhere makes way, too
        os.replace(new, place)
    elif exchange(new, place):
        flush(place.parent)
        remove(new)
    else:
        remove(old)
        os.replace(place, old)
        os.replace(new, place)
        flush(place.parent)
        remove(old)
    flush(place.parent)


def present(place: Path) -> Path:
    """Returns the complete version of `place`: there, or under the name of a replacement that was killed half-way."""
    old = place.with_name(OLD + place.name) if place.name else place
    return old if not os.path.lexists(place) and old.exists() else place


def settle(place: Path) -> None:
    """Ends a replacement of `place` that was killed half-way: what is whole stays, at its place."""
    found = present(place)
    if found != place:
        os.replace(found, place)
    if place.name:
        remove(place.with_name(OLD + place.name))


def exchange(one: Path, other: Path) -> bool:
    """Lets two names change places in one step; False where the system cannot (OSError where it may not)."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextlib.contextmanager
def unfinished(place: Path) -> Iterator[Path]:
    """Makes a new folder beside `place` to write into and removes it at the end; removes those of dead processes
    first."""
    name = place.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    with _owned(place.parent, f"{TEMPORARY}{name}-") as folder:
        yield folder


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """Makes a new folder among the system's temporary ones, for this user alone; see `unfinished`."""
    with _owned(Path(tempfile.gettempdir()), f"switchyard-{purpose}-", 0o700) as folder:
        yield folder


@contextlib.contextmanager
def _owned(parent: Path, prefix: str, mode: int = 0o777) -> Iterator[Path]:
    """Makes a folder whose name says which process of which host made it."""
    parent.mkdir(parents=True, exist_ok=True)
    clear_left(parent, prefix)
    name = f"{prefix}{os.getpid()}.{socket.gethostname()}"
    numbered = (parent / f"{name}.{number}" for number in itertools.count())
    folder = next(path for path in itertools.chain([parent / name], numbered) if not os.path.lexists(path))
    folder.mkdir(mode)
    try:
        yield folder
    finally:
        remove(folder)


def clear_left(parent: Path, prefix: str) -> None:
    """Removes what dead processes of this host and user left under names with `prefix`."""
    own = re.compile(re.escape(prefix) + r"(\d{1,9})\." + re.escape(socket.gethostname()) + r"(\.\d+)?")
    for path in parent.iterdir():
        match = own.fullmatch(path.name)
        if match and not is_alive(int(match[1])) and path.lstat().st_uid == os.getuid():
            remove(path)


def is_alive(process: int) -> bool:
    """Returns whether a process of this host runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def follow_umask(folder: Path) -> None:
    """Gives everything under a folder the modes of files that this process makes: those of the folder itself."""
    allowed = stat.S_IMODE(folder.stat().st_mode)
    for path in folder.rglob("*"):
        path.chmod(allowed if path.is_dir() else allowed & 0o666)


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[str]:
    """Gives a path to a folder with only the letters that MindSpore's export accepts.

    MindSpore checks the text and then follows links, so a name of the open folder will do; where the system has none, a
    link in a temporary folder does.
    """
    if PLAIN.fullmatch(str(folder.absolute())):
        yield str(folder.absolute())
    elif os.path.isdir("/proc/self/fd"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield f"/proc/self/fd/{handle}"
        finally:
            os.close(handle)
    else:
        parents = [name for name in (tempfile.gettempdir(), "/tmp", "/var/tmp") if PLAIN.fullmatch(name)]
        with tempfile.TemporaryDirectory(prefix="switchyard-export-", dir=parents[0]) as name:
            link = Path(name, "out")
            link.symlink_to(folder.absolute(), target_is_directory=True)
            yield str(link)
