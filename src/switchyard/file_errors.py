"""Errors of files that are written: one line with the file and the remedy, whichever library wrote it.

`write` and `fsync` fail without a file name, and MindSpore's and safetensors' compiled sides say in words of their own
that a disk is full. `writing` turns both into one UserError.
"""

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from switchyard.errors import EXIT_DISK, UserError

REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EFBIG: "raise the largest size of a file (ulimit -f)",
    errno.EROFS: "write elsewhere",
    errno.EIO: "check the disk, or write to another one",
}
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # may be over when the command is repeated
FULL = {  # what compiled code says -> what the system would have said
    "no space left on device": errno.ENOSPC,
    "disk is full": errno.ENOSPC,
    "no free disk": errno.ENOSPC,
    "disk quota exceeded": errno.EDQUOT,
    "file too large": errno.EFBIG,
}


class FileError(UserError):
    """Reports a file that could not be written, or read.

    Args:
        text: the line.
        passing: whether the same command may succeed later, because a disk was full or failed; a launcher starts such
            a job again.
    """

    def __init__(self, text: str, passing: bool = False):
        super().__init__(text)
        if passing:
            self.exit_code = EXIT_DISK


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an error of the system, while `path` is written, into a line that names the file (FileError)."""
    try:
        yield
    except (UserError, BrokenPipeError):
        raise
    except Exception as error:
        line = line_of(error, path)
        if line is None:
            raise
        raise FileError(line, number_of(error) in PASSING) from error


def line_of(error: BaseException, path: str | Path | None = None) -> str | None:
    """Returns the message for a file error; None where the error is about something else.

    Args:
        error: an OSError, or what a library raised that met a full disk.
        path: the file, where the error does not name one.
    """
    number = number_of(error)
    if number is None:
        return None
    name = getattr(error, "filename", None) or path
    where = f"'{os.fsdecode(name)}'" if isinstance(name, str | bytes | os.PathLike) else "a file without a name"
    remedy = REMEDIES.get(number)
    return f"{where}: {os.strerror(number)}" + (f"; {remedy}" if remedy else "")


def number_of(error: BaseException) -> int | None:
    """Returns the system's number of a file error; None where the error is about something else."""
    return error.errno if isinstance(error, OSError) else _number_in(str(error))


def _number_in(text: str) -> int | None:
    """Returns the system's error number that the message of a library means."""
    text = text.lower()
    return next((number for words, number in FULL.items() if words in text), None)


def check_room(path: Path, size: int) -> None:
    """Refuses to begin a file that would not fit (UserError): compiled code may crash where the room ends.

    Args:
        path: the file; its folder exists.
        size: bytes that it will have.
    """
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and size > limit:
        raise FileError(f"'{path}': needs {size:,} bytes, a file may have {limit:,}; {REMEDIES[errno.EFBIG]}")
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise FileError(f"'{path}': needs {size:,} bytes, the disk has {free:,}; {REMEDIES[errno.ENOSPC]}")


def append(file, line: str) -> None:
    """Appends a line to an unbuffered file, all of it or nothing."""
    size, rest = os.fstat(file.fileno()).st_size, memoryview(line.encode("utf-8"))
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise
