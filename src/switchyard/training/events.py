"""Writes TensorBoard's event file where the events are made.

tensorboardX's own writer has a thread. When a disk is full the thread ends with a traceback of its own, and the
training then waits for a queue that nobody empties.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from switchyard.file_errors import writing

BINS = "doane"  # the rule by which a histogram is divided


class EventFile:
    """Writes the TensorBoard events of a run folder.

    Args:
        run: the run folder.
        purge_step: TensorBoard hides what earlier files say of this step and later ones; None hides nothing.

    Raises:
        UserError: from any of its methods, where the file cannot be written.
    """

    def __init__(self, run: Path, purge_step: int | None = None):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._path = Event, run / "events.out.tfevents"
        with writing(self._path):
            self._writer = EventsWriter(str(run / "events"))
        if purge_step is not None:
            self._write(step=purge_step, file_version="brain.Event:2")
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def log(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Writes the figures of a step."""
        for tag, value in scalars.items():
            self.add_scalar(tag, value, step)
        for tag, values in histograms.items():
            self.add_histogram(tag, values, step)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Writes one figure of a step."""
        from tensorboardX.summary import scalar

        self._write(step=step, summary=scalar(tag, value))

    def add_histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Writes the distribution of some figures of a step."""
        from tensorboardX.summary import histogram

        self._write(step=step, summary=histogram(tag, values, BINS))

    def _write(self, **fields) -> None:
        with writing(self._path):
            self._writer.write_event(self._event(wall_time=time.time(), **fields))

    def flush(self) -> None:
        """Brings the events to the disk."""
        with writing(self._path):
            self._writer.flush()

    def close(self, completed: bool = True) -> None:
        """Ends the file, whether or not the run has made all of its steps."""
        with writing(self._path):
            self._writer.close()
