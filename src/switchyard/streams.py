"""Standard output and error that may be gone: a closed terminal, a reader that has ended, a log on a full disk.

A training keeps its record in metrics.jsonl, so it goes on without them (`survive`). The other command lines exist
for what they print: there a failed write is an error with a name.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

STDOUT, STDERR = "standard output", "standard error"


class Stream:
    """Wraps a text stream; everything but writing is the stream's own.

    Args:
        stream: sys.stdout, for one.
        name: of the stream in messages.
        survives: a failed write silences the stream for good instead of raising.
    """

    def __init__(self, stream: Any, name: str, survives: bool = False):
        self._stream, self._name, self.survives = stream, name, survives

    def write(self, text: str) -> int:
        """Writes a text, as a file does."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Writes what is buffered."""
        self._try(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Callable, *arguments: str) -> None:
        try:
            call(*arguments)
        except BrokenPipeError:
            if not self.survives:
                raise
            self.silence()
        except OSError as error:
            if not self.survives:
                raise OSError(error.errno, error.strerror, self._name) from None
            self.silence()
        except ValueError:
            if not (self.survives and self._stream.closed):
                raise

    def silence(self) -> None:
        """Sends what is still to come to nowhere, what is buffered and what compiled code prints too."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def hangs_up() -> bool:
    """Returns whether closing the terminal ends this process: under nohup SIGHUP is ignored, and some systems have
    none.
    """
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Wraps both streams meanwhile."""
    _open_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout = Stream(before[0], STDOUT)
    sys.stderr = Stream(before[1], STDERR, survives=True)  # what a program is for goes to stdout
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def survive() -> None:
    """Lets the program continue where nobody reads what it prints (within `guarded`)."""
    if isinstance(sys.stdout, Stream):
        sys.stdout.survives = True


def _open_descriptors() -> None:
    """Opens what was closed at the start (`>&-`): or the next file would get the number that programs print to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115
