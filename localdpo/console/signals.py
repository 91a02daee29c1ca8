"""Signals while a run trains: the first asks for an orderly stop, the second leaves at once.

A thread reads the signals from Python's wake-up file descriptor, because handlers run only between bytecodes
and one evaluated step may keep the main thread inside the array library for many seconds.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FROM_HANDLER = 128  # marks a byte that the Python handler wrote


class StopSignals:
    """Context manager: within it, SIGINT, SIGTERM and SIGHUP call ``on_stop(number)`` once.

    The next of them calls ``on_leave()`` and ends the process with 128 + number; what is being saved at that
    moment is under a temporary name, so the last checkpoint stays whole. A signal that was ignored before
    (nohup, a background job of a script) stays ignored. Both functions are called on another thread.
    """

    def __init__(self, on_stop: Callable[[int], None], on_leave: Callable[[], None] = lambda: None) -> None:
        self._on_stop = on_stop
        self._on_leave = on_leave
        self.received: int | None = None
        self._before: dict[int, object] = {}
        self._read_end = self._write_end = self._old_wakeup = -1
        self._watcher = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> StopSignals:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        for number in WATCHED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        os.close(self._write_end)
        self._watcher.join()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        # Python's C code has told the watcher already, unless a library has taken the wake-up descriptor.
        os.write(self._write_end, bytes([number | _FROM_HANDLER]))

    def _watch(self) -> None:
        told = {0: 0, _FROM_HANDLER: 0}
        acted = 0
        with os.fdopen(self._read_end, "rb", buffering=0) as numbers:
            while byte := numbers.read(1):
                number, source = byte[0] & ~_FROM_HANDLER, byte[0] & _FROM_HANDLER
                if number not in self._before:
                    continue
                told[source] += 1
                if max(told.values()) > acted:
                    acted += 1
                    self._act(number)

    def _act(self, number: int) -> None:
        if self.received is not None:
            self._on_leave()
            os._exit(128 + number)
        self.received = number
        self._on_stop(number)
