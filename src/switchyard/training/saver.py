"""Writes the checkpoints of a run: while the training waits, or in the background from a copy in host memory.

In the background a thread of each rank writes that rank's shards; the thread of the first rank then waits for the
shards of all ranks and makes them a checkpoint. At most one checkpoint is in flight. Threads talk to no other rank:
whatever the ranks must agree on is agreed in `wait`, which all of them call at the same step.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from switchyard.checkpoint import store
from switchyard.checkpoint.finite import first_not_finite
from switchyard.checkpoint.health import Healthy
from switchyard.config import Config
from switchyard.distributed.placement import ParallelDims
from switchyard.distributed.processes import SINGLE, Processes
from switchyard.errors import UserError
from switchyard.file_errors import FileError, line_of

IDLE, WRITING, WRITTEN, FAILED = range(4)  # states of a Saver
POLL = 0.05  # seconds between two looks for the shards of other ranks
LAST_WAIT = 30.0  # seconds that a run which ends by an error gives the other ranks to end their shards
NONE, DISK, OTHER = range(3)  # kinds of errors
Arrays = dict[str, np.ndarray]


class Content(NamedTuple):
    """Holds what a checkpoint is made of, see `checkpoint.store.save`; the arrays are those of this rank."""

    tokenizer_json: str
    weights: Arrays
    optimizer: Arrays
    state: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]] | None = None


class Saver:
    """Writes the checkpoints of a run, and knows whether the last one has failed.

    Args:
        run: the run folder.
        config: `train.async_checkpoint` and `train.on_save_error` are read.
        healthy: knows the good checkpoints of the run.
        processes: all of them have a Saver, and call `save` and `wait` at the same steps.
        warn: is told, on each rank, (step, line) of a checkpoint that was lost although the run goes on.

    Attributes:
        lost: the step of the newest checkpoint that could not be written; None where the last attempt was good.
        seconds: that the training has waited for checkpoints.

    Examples:
        >>> saver = Saver(run, config, Healthy())  # doctest: +SKIP
        >>> saver.save(Content(tokenizer, weights, optimizer, {"step": 100}))  # doctest: +SKIP
        >>> saver.wait()  # doctest: +SKIP
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        healthy: Healthy,
        processes: Processes = SINGLE,
        warn: Callable[[int, str], object] = lambda step, line: None,
    ):
        self._run, self._config, self._healthy, self._processes, self._warn = run, config, healthy, processes, warn
        self.lost: int | None = None
        self.seconds = 0.0
        self._degrees = ParallelDims.of(config.parallel) if processes.size > 1 else ParallelDims()
        self._thread: threading.Thread | None = None
        self._step, self._error = -1, None
        self._shard_ended, self._aborted = threading.Event(), threading.Event()
        self._copies: dict[tuple[str, str], np.ndarray] = {}

    def prepare(self, weights: Arrays, optimizer: Arrays) -> None:
        """Takes the memory of the copies before the training begins: fresh memory would make the first pause long."""
        if self._config.train.async_checkpoint:
            self._copied("weights", weights), self._copied("optimizer", optimizer)

    @property
    def state(self) -> int:
        """Returns IDLE; or of the checkpoint in flight WRITING, WRITTEN or FAILED, as this rank sees it."""
        if self._thread is None:
            return IDLE
        if self._error is not None:
            return FAILED
        return WRITING if self._thread.is_alive() else WRITTEN

    def collect(self, states: np.ndarray) -> None:
        """Ends a checkpoint in flight where that makes nobody wait; `states` are those of all ranks."""
        if (states == FAILED).any() or (states == WRITTEN).all():
            self.wait()

    def save(self, content: Content, must: bool = False) -> None:
        """Writes a checkpoint, after the one in flight has ended.

        Args:
            content: what to write; the arrays may change once this has returned.
            must: an error ends the run, whatever train.on_save_error says, and the checkpoint is there on return.

        Raises:
            UserError: the checkpoint, or the one in flight, could not be written.
        """
        self.wait()
        started = time.perf_counter()
        try:
            if self._config.train.async_checkpoint and not must:
                self._begin(content)
            else:
                self._write_now(content, must)
        finally:
            self.seconds += time.perf_counter() - started

    def wait(self) -> None:
        """Returns when no checkpoint is in flight (UserError: it could not be written, and the run is to end)."""
        if self._thread is None:
            return
        started = time.perf_counter()
        self._shard_ended.wait()
        if self._worst() != NONE:
            self._aborted.set()  # the first rank waits for shards that do not come
        self._thread.join()
        self._thread = None
        worst, error, self._error = self._worst(), self._error, None
        self.seconds += time.perf_counter() - started
        self._judge(worst, error, must=False)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets a checkpoint in flight come to its end where the run ends by an error, and says what fails.

        A second Ctrl-C does not wait: what is half written is no checkpoint.
        """
        if self._thread is None or (kind is not None and not issubclass(kind, Exception)):
            return
        self._shard_ended.wait()
        self._thread.join(LAST_WAIT if self._processes.size > 1 else None)
        self._aborted.set()
        self._thread.join()
        self._thread = None
        if self._error is not None:
            self._fail(self._error)

    # ---- at once
    def _write_now(self, content: Content, must: bool) -> None:
        parts = (content.tokenizer_json, content.weights, content.optimizer, content.state, self._healthy)
        self._step = content.state["step"]
        error = None
        try:
            store.save(self._run, self._config, *parts, content.shapes, processes=self._processes)
        except (UserError, OSError) as caught:
            error = caught
        worst = kind_of(error) if must or self._config.train.on_save_error == "stop" else self._worst(error)
        self._judge(worst, error, must)

    # ---- in the background
    def _begin(self, content: Content) -> None:
        step = self._step = content.state["step"]
        error = store.error_of(store.begin, self._run, step) if self._processes.is_first else None
        worst = self._worst(error)
        if worst != NONE:
            return self._judge(worst, error, must=False)
        content = content._replace(
            weights=self._copied("weights", content.weights), optimizer=self._copied("optimizer", content.optimizer)
        )
        self._error = None
        self._shard_ended.clear(), self._aborted.clear()
        self._thread = threading.Thread(target=self._write, args=(content,), name="checkpoint", daemon=True)
        self._thread.start()

    def _copied(self, kind: str, arrays: Arrays) -> Arrays:
        """Returns copies of arrays, in memory that all checkpoints of the run share: fresh memory is slow."""
        for name, array in arrays.items():
            held = self._copies.get((kind, name))
            if held is None or held.shape != array.shape or held.dtype != array.dtype:
                held = self._copies[kind, name] = np.empty(array.shape, array.dtype)
            np.copyto(held, array)
        return {name: self._copies[kind, name] for name in arrays}

    def _write(self, content: Content) -> None:
        """Does the work of the thread; an error is kept for `wait`."""
        try:
            try:
                self._write_shard(content)
            finally:
                self._shard_ended.set()
            if self._processes.is_first:
                self._publish(content)
        except Exception as error:
            self._error = error

    def _write_shard(self, content: Content) -> None:
        name = first_not_finite(content.weights) or first_not_finite(content.optimizer)
        if name is not None:
            self._error = store.not_finite(self._run, self._step, name, self._healthy)
            raise self._error
        try:
            store.save_shard(
                self._run, self._config, self._step, self._processes.rank, content.weights, content.optimizer,
                content.shapes, self._degrees,
            )  # fmt: skip
        except Exception as error:
            self._error = error  # before anybody is told that the shard has ended
            raise

    def _publish(self, content: Content) -> None:
        end = time.monotonic() + self._config.train.checkpoint_wait_seconds
        while store.absent_shards(self._run, self._step, self._degrees) and time.monotonic() < end:
            if self._aborted.wait(POLL):
                return
        parts = (content.tokenizer_json, content.state)
        store.finish(self._run, self._config, *parts, wait=0, healthy=self._healthy, degrees=self._degrees)

    # ---- what follows an error
    def _worst(self, error: Exception | None = None) -> int:
        """Returns the worst kind of error of all ranks."""
        kind = kind_of(self._error if error is None else error)
        return int(self._processes.gather(np.array([kind], np.int32)).max())

    def _judge(self, worst: int, error: Exception | None, must: bool) -> None:
        """Ends the run, or warns, where some rank has an error; all ranks come to the same end."""
        if worst == NONE:
            self.lost = None
            self._healthy.note(self._run / store.FOLDER / store.name_of(self._step))
            return
        if self._processes.is_first:
            store.clear(self._run, self._step)
        error = error or FileError(f"checkpoint of step {self._step}: {store.ELSEWHERE}", passing=True)
        if must or worst == OTHER or self._config.train.on_save_error == "stop":
            raise error
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.lost = self._step
        line = str(error) if isinstance(error, UserError) else line_of(error) or repr(error)
        self._warn(self._step, line)


def kind_of(error: BaseException | None) -> int:
    """Returns NONE, DISK (a file could not be written) or OTHER."""
    if error is None:
        return NONE
    return DISK if isinstance(error, FileError) or line_of(error) is not None else OTHER
