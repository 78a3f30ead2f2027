"""Ctrl-C and SIGTERM during training: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class TrainingInterrupted(Exception):
    """Training was stopped by the user or the scheduler; the message says how to go on.

    No KeyboardInterrupt, because it comes between two steps, in order, with everything saved.
    """


class StopSignal:
    """While active, the first SIGINT or SIGTERM only sets ``received``.

    The loop looks at it between two steps, where networks, optimisers and log agree. A second
    signal stops at once (KeyboardInterrupt), and only the periodic checkpoints remain. Outside
    the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
