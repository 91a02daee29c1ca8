"""The chats of a workspace: one JSON file each in `.localdpo/chats`, found again by time or by what was said.

Every function touches the disk: call them on a thread. It knows no screens and no models.
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from localdpo.data.drafts import HIDDEN, make_hidden
from localdpo.files import environment_faults, write_json
from localdpo_tui.services.conversation import Chat

__all__ = ["ChatHistory", "matching"]

MAX_BYTES = 20_000_000


class ChatHistory:
    """The chats under `folder`."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._hidden = self._folder / HIDDEN
        self._chats = self._hidden / "chats"

    def _file(self, identity: str) -> Path:
        return self._chats / f"{Path(identity).name}.json"

    def save(self, chat: Chat) -> None:
        """Write a chat, whole or not at all. Raises EnvironmentFault."""
        with environment_faults(self._chats):
            make_hidden(self._hidden)
            self._chats.mkdir(exist_ok=True, mode=0o700)
        write_json(self._file(chat.id), chat.to_json())

    def get(self, identity: str) -> Chat | None:
        """The chat with this id, None when there is none that can be read."""
        return _read(self._file(identity))

    def all(self) -> list[Chat]:
        """Every chat, the latest first. Files that cannot be read are passed over."""
        return [chat for path in self._files() if (chat := _read(path)) is not None]

    def latest(self) -> Chat | None:
        """The chat that was written last."""
        return next((chat for path in self._files() if (chat := _read(path)) is not None), None)

    def _files(self) -> list[Path]:
        found = []
        with suppress(OSError):
            for entry in os.scandir(self._chats):
                if entry.name.endswith(".json") and not entry.name.startswith("."):
                    with suppress(OSError):
                        found.append((entry.stat().st_mtime, Path(entry.path)))
        return [path for _, path in sorted(found, reverse=True)]

    def remove(self, identity: str) -> None:
        """Move a chat to `.localdpo/trash`. Raises EnvironmentFault."""
        trash = self._hidden / "trash"
        with environment_faults(self._file(identity)):
            trash.mkdir(parents=True, exist_ok=True)
            if self._file(identity).exists():
                shutil.move(self._file(identity), trash / f"chat-{self._file(identity).name}")


def _read(path: Path) -> Chat | None:
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        return Chat.from_json(json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError, TypeError):
        return None


def matching(chats: list[Chat], query: str) -> list[Chat]:
    """The chats in which every word of `query` was said, whatever its case."""
    words = query.casefold().split()
    return [chat for chat in chats if all(word in chat.text().casefold() for word in words)]
