"""A headless Chromium for tests, driven over a pipe by the DevTools protocol: no driver, no port, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
DEADLINE = 60.0


def find_browser() -> str | None:
    """The browser's command, None where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    return found or (MAC if os.access(MAC, os.X_OK) else None)


class Browser:
    """One browser process; its pages are `Page`."""

    def __init__(self, command: str) -> None:
        self.profile = tempfile.mkdtemp(prefix="localdpo-browser-")
        ours, theirs = _pipe(), _pipe()  # commands to it, answers from it
        arguments = [
            command,
            "--headless",
            "--remote-debugging-pipe",
            f"--user-data-dir={self.profile}",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",  # containers have a small one
            "--disable-background-networking",
            "--disable-component-update",
            "--hide-scrollbars",
            "--no-sandbox",  # as root and in containers there is none to be had, and the pages are ours
            "about:blank",
        ]
        quiet = os.open(os.devnull, os.O_RDWR)
        self.pid = os.posix_spawn(
            command,
            arguments,
            dict(os.environ),
            file_actions=[
                (os.POSIX_SPAWN_DUP2, quiet, 0),
                (os.POSIX_SPAWN_DUP2, quiet, 1),
                (os.POSIX_SPAWN_DUP2, quiet, 2),
                (os.POSIX_SPAWN_DUP2, ours[0], 3),
                (os.POSIX_SPAWN_DUP2, theirs[1], 4),
            ],
            setpgroup=0,
        )
        for end in (quiet, ours[0], theirs[1]):
            os.close(end)
        self._write, self._read = ours[1], theirs[0]
        self._buffer = b""
        self._last = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer; events that come meanwhile are kept."""
        self._last += 1
        number = self._last
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        deadline = time.monotonic() + DEADLINE
        while True:
            answer = self.receive(deadline)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def receive(self, deadline: float) -> dict[str, Any]:
        """The next message; events are noted on the way."""
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                raise TimeoutError("the browser does not answer")
            piece = os.read(self._read, 1 << 16)
            if not piece:
                raise EOFError("the browser is gone")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return dict(message)

    def close(self) -> None:
        """End the browser and whatever it started."""
        try:
            self.call("Browser.close")
        except (OSError, EOFError, TimeoutError, RuntimeError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._write)
        os.close(self._read)
        shutil.rmtree(self.profile, ignore_errors=True)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are above the numbers that the browser's own are moved to."""
    low = os.pipe()
    ends = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    return ends[0], ends[1]


@dataclass
class Page:
    """A page of a file, as one look at it.

    `console` is what was written there, `requests` the addresses asked for, `refused` those that a policy kept back.
    """

    browser: Browser
    session: str
    console: list[str] = field(default_factory=list)
    sent: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    @property
    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        return list(self.sent.values())

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol to this page."""
        result = self.browser.call(method, self.session, **parameters)
        self._note()
        return result

    def _note(self) -> None:
        for event in self.browser.events:
            if event.get("sessionId") != self.session:
                continue
            values = event["params"]
            match event["method"]:
                case "Runtime.consoleAPICalled":
                    self.console.append(" ".join(str(argument.get("value")) for argument in values["args"]))
                case "Runtime.exceptionThrown":
                    self.console.append(str(values["exceptionDetails"]["text"]))
                case "Log.entryAdded":
                    self.console.append(str(values["entry"]["text"]))
                case "Page.javascriptDialogOpening":
                    self.console.append(f"dialog: {values['message']}")
                case "Network.requestWillBeSent":
                    self.sent[values["requestId"]] = str(values["request"]["url"])
                case "Network.loadingFailed" if values.get("blockedReason") == "csp":
                    self.refused.append(self.sent.pop(values["requestId"], ""))
        self.browser.events.clear()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def size(self, width: int, height: int = 900, scale: float = 1.0) -> None:
        """Set the size of the window."""
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **screen)

    def media(self, kind: str = "screen", scheme: str = "light") -> None:
        """Show it on a screen or on paper, in a light or a dark system."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=kind, features=features)

    def open(self, path: Path) -> None:
        """Load a file and wait until all of it is there."""
        self.call("Page.navigate", url=path.absolute().as_uri())
        deadline = time.monotonic() + DEADLINE
        while self.evaluate("document.readyState + ' ' + location.protocol") != "complete file:":
            if time.monotonic() > deadline:
                raise TimeoutError(f"{path} does not load")

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write what is seen as a PNG file."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def page_of(browser: Browser, *, javascript: bool = True) -> Iterator[Page]:
    """A new page that notes what it writes and asks for."""
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    page = Page(browser, session)
    for domain in ("Page", "Runtime", "Log", "Network"):
        page.call(f"{domain}.enable")
    if not javascript:
        page.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        yield page
    finally:
        browser.call("Target.closeTarget", targetId=target)
        browser.events.clear()
