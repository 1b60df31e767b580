"""Takes SIGINT, SIGTERM and SIGHUP as a wish to stop, which a run grants after its step."""

import signal
from typing import Any

from switchyard.streams import hangs_up


class StopSignals:
    """Notes SIGINT, SIGTERM and SIGHUP instead of dying of them; a second SIGINT or SIGTERM has its usual effect.

    SIGHUP never has: a terminal that closes sends it twice, once from its shell and once from the system.
    Which of them it was is not kept: once a graph has run, MindSpore turns SIGINT into SIGTERM.
    """

    def __init__(self):
        self.came = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up() else [])):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(self._before)

    def _note(self, number: int, _frame: object) -> None:
        self.came = True
        if number in (signal.SIGINT, signal.SIGTERM):
            self._restore((signal.SIGINT, signal.SIGTERM))

    def _restore(self, numbers) -> None:
        for number in numbers:
            signal.signal(number, self._before[number])
