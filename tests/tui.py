"""Helpers for tests of the terminal UI: an app on a folder, its screen as text, and a small workspace."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fake_host import FakeModelHost
from localdpo_tui.app import LocalDPOApp
from textual.pilot import Pilot

SIZES = ((80, 24), (120, 36))
DEADLINE = 60.0

PAIRS = (
    {"prompt": "What is your name?", "chosen": "My name is Athene.", "rejected": "My name is Elena.", "tags": ["name"]},
    {"prompt": "Name the largest planet.", "chosen": "Jupiter is the largest planet.", "rejected": "Saturn."},
    {"prompt": "日本の首都はどこですか？", "chosen": "東京です。", "rejected": "京都です。", "tags": ["geo"]},
)


def write_pairs(path: Path, rows: Sequence[dict[str, Any]] = PAIRS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@asynccontextmanager
async def started(
    folder: Path, size: tuple[int, int] = (120, 36), host: FakeModelHost | None = None, **options: Any
) -> AsyncIterator[tuple[LocalDPOApp, Pilot[None]]]:
    """The app on `folder`, its first place mounted."""
    fake = host or FakeModelHost()
    app = LocalDPOApp(folder, host_factory=lambda: fake, **options)  # type: ignore[arg-type, return-value]
    async with app.run_test(size=size, notifications=True) as pilot:
        try:
            yield app, pilot
        finally:
            app.workers.cancel_all()  # as a real exit does, before it takes down the widgets that they look for
            for place in app.places():
                place.close()


async def until(pilot: Pilot[None], condition: Callable[[], object], what: str = "") -> None:
    """Wait for a condition, with a deadline that only a broken program meets."""
    end = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited in vain for {what or 'a condition'}; the screen:\n{screen_text(pilot.app)}")
        await pilot.pause()
        await asyncio.sleep(0.01)


async def seen(pilot: Pilot[None], text: str) -> None:
    """Wait until the screen shows a text."""
    await until(pilot, lambda: text in screen_text(pilot.app), repr(text))


def screen_lines(app: Any) -> list[str]:
    return ["".join(segment.text for segment in line) for line in app.screen._compositor.render_strips()]


def screen_text(app: Any) -> str:
    return "\n".join(screen_lines(app))


def freeze(app: Any) -> None:
    """Stop what changes by itself: cursors that blink."""
    from textual.widgets import Input, TextArea

    for widget in app.screen.walk_children():
        if isinstance(widget, TextArea | Input):
            widget.cursor_blink = False


class Snapshots:
    """Compares a screen with `tests/snapshots/NAME.svg`; `--update-snapshots` writes those."""

    FOLDER = Path(__file__).parent / "snapshots"

    def __init__(self, update: bool, failed: Path) -> None:
        self._update, self._failed = update, failed

    async def check(self, app: Any, pilot: Pilot[None], name: str) -> None:
        """Wait until the screen looks like the picture; charts and panes are drawn some times a second."""
        freeze(app)
        path = self.FOLDER / f"{name}.svg"
        if self._update:
            self.FOLDER.mkdir(exist_ok=True)
            path.write_text(await _settled(app, pilot), "utf-8")
            return
        expected = path.read_text("utf-8")
        try:
            await until(pilot, lambda: _picture(app) == expected, path.name)
        except AssertionError:
            new = self._failed / f"{name}.svg"
            new.write_text(_picture(app), "utf-8")
            raise AssertionError(
                f"{path.name} looks different now: see {new}. The screen:\n{screen_text(app)}"
            ) from None


def _picture(app: Any) -> str:
    return str(app.export_screenshot(title="localdpo", simplify=True))


async def _settled(app: Any, pilot: Pilot[None]) -> str:
    """The picture that did not change for a second: only for drawing it anew."""
    last, since = _picture(app), time.monotonic()
    while time.monotonic() - since < 1:
        await pilot.pause(0.05)
        if (now := _picture(app)) != last:
            last, since = now, time.monotonic()
    return last
