"""SIGINT and SIGTERM as a wish to stop, which a run grants after its step."""

import signal
from typing import Any


class StopSignals:
    """Notes SIGINT and SIGTERM instead of dying of them; a second one has its usual effect.

    Which of the two it was is not kept: once a graph has run, MindSpore turns SIGINT into SIGTERM.
    """

    def __init__(self):
        self.came = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, _number: int, _frame: object) -> None:
        self.came = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
