"""The terminal the app runs in: Textual's driver, made ready for terminals that send anything and go at any time.

It differs in four things. Bytes are read by `TerminalInput`. Each key is sent when the one before was obeyed, so that
what is typed ahead goes to where the focus has gone, and a signal never waits behind a long queue of keys. An input
thread that ends, and a terminal that is gone, end the app (`LocalDPOApp.lose_terminal`). Output to a terminal that
takes none does not hold up a signal.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Sequence
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from queue import Full
from typing import IO, TYPE_CHECKING, Any, cast

from textual.drivers.linux_driver import LinuxDriver
from textual.message import Message

from localdpo_tui.terminal_input import TerminalInput

if TYPE_CHECKING:
    from localdpo_tui.app import LocalDPOApp

__all__ = ["TerminalDriver"]

READ_BYTES = 1024
WAIT_SECONDS = 0.05
_TURNS = 200  # of the event loop, and no more: a task that never rests must not keep keys from being obeyed
_REFRESH_SECONDS = 0.3  # for what a key had put off until the screen is drawn, such as a move of the focus


class TerminalDriver(LinuxDriver):
    """Powers the app in a terminal."""

    def __init__(self, app: Any, **options: Any) -> None:
        super().__init__(app, **options)
        self._file = cast("Any", _Output(cast("IO[str]", self._file)))

    @property
    def _ui(self) -> LocalDPOApp:
        return cast("LocalDPOApp", self._app)

    def _query_in_band_window_resize(self) -> None:
        """Ask for no sizes in the input: the system tells them, and not whoever types."""

    def write(self, data: str) -> None:
        """Queue output; given up when a signal waits and the terminal takes nothing."""
        thread = self._writer_thread
        assert thread is not None, "the app is in application mode"
        while True:
            try:
                thread._queue.put(data, timeout=WAIT_SECONDS)
                return
            except Full:
                if self._ui.signalled:
                    return

    def _sigcont_application(self, *_: object) -> None:
        # A process that was stopped by SIGSTOP could not prepare, and would have two threads that read keys.
        if self._auto_restart:
            if self._key_thread is not None and self._key_thread.is_alive():
                self.suspend_application_mode()
                self._must_signal_resume = True
            self.resume_application_mode()

    def _run_input_thread(self) -> None:
        try:
            self.run_input_thread()
        except BaseException as error:
            with suppress(RuntimeError):  # the loop is closed: the app has ended already
                self._loop.call_soon_threadsafe(self._ui.lose_terminal, error)

    def run_input_thread(self) -> None:
        """Read the terminal until the app leaves it; raises `OSError` or `EOFError` when it is gone."""
        terminal = TerminalInput()
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                if selector.select(WAIT_SECONDS):
                    data = os.read(self.fileno, READ_BYTES)
                    if not data:
                        raise EOFError
                    events = terminal.feed(data)
                else:
                    events = terminal.tick()
                if events:
                    self._send(events)

    def _send(self, events: Sequence[Message]) -> None:
        sent = asyncio.run_coroutine_threadsafe(self._send_in_turn(events), self._loop)
        while not self.exit_event.is_set():
            with suppress(NotYet):
                sent.result(WAIT_SECONDS)
                return

    async def _send_in_turn(self, events: Sequence[Message]) -> None:
        for event in events:
            self.process_message(event)
            await self._obeyed()

    async def _obeyed(self) -> None:
        """Wait until nothing is left to do: a key makes messages, which make others."""
        loop: Any = asyncio.get_running_loop()
        for _ in range(_TURNS):
            await asyncio.sleep(0)
            if not loop._ready:
                break
        until = loop.time() + _REFRESH_SECONDS
        while self._awaits_refresh() and loop.time() < until:
            await asyncio.sleep(WAIT_SECONDS / 10)

    def _awaits_refresh(self) -> bool:
        stack = self._ui._screen_stack
        return bool(stack and stack[-1]._callbacks)


class _Output:
    """Standard error as the writer thread writes to it: a terminal that is gone must not end the thread."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.fileno = file.fileno
        self.isatty = file.isatty

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._file.flush()
