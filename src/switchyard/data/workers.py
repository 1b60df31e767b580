"""Encodes units in parallel processes, in the order of the input and with a bounded number of units in memory."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from switchyard.data.encoding import Encoded, Encoder
from switchyard.data.inputs import Unit
from switchyard.data.tokenizer import Tokenizer
from switchyard.errors import UserError

Place = TypeVar("Place")
AHEAD = 2  # units for each worker that are read before their turn
_encoder: Encoder | None = None  # of a worker process


def cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def encode_in_order(
    units: Iterable[tuple[Place, Unit]], tokenizer: Tokenizer, text_field: str | None, fraction: float, workers: int
) -> Iterator[tuple[Place, Encoded]]:
    """Yields each unit encoded, with its place in the input, in the order of the input.

    Args:
        units: (place, unit).
        tokenizer, text_field, fraction: of Encoder.
        workers: processes; 1 encodes in this process.

    Raises:
        UserError: a worker process died.
    """
    if workers == 1:
        encoder = Encoder(tokenizer, text_field, fraction)
        yield from ((place, encoder(unit)) for place, unit in units)
        return
    arguments = (tokenizer.to_json(), text_field, fraction)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, arguments)
    waiting: deque[tuple[Place, Any]] = deque()
    try:
        for place, unit in units:
            waiting.append((place, pool.submit(_encode, unit)))
            if len(waiting) > AHEAD * workers:
                yield _first(waiting)
        while waiting:
            yield _first(waiting)
    except BrokenProcessPool:
        raise UserError(
            f"--workers: {workers}; a worker process died, perhaps for lack of memory; repeat the command with fewer, "
            "finished shards are kept"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _first(waiting: deque) -> tuple[Any, Encoded]:
    place, future = waiting.popleft()
    return place, future.result()


def _start(tokenizer_json: str, text_field: str | None, fraction: float) -> None:
    """Prepares a worker process, which ends when the process that started it is killed."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_follow_parent, daemon=True).start()
    _encoder = Encoder(Tokenizer.from_json(tokenizer_json), text_field, fraction)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    with contextlib.suppress(OSError):
        parent.join()
    os._exit(1)


def _encode(unit: Unit) -> Encoded:
    return _encoder(unit)
