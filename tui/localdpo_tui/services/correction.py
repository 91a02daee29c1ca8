"""What is to be corrected, and the text written so far, kept until a pair is made of it or it is given up."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from localdpo.data.drafts import HIDDEN
from localdpo.data.fields import Message
from localdpo.data.provenance import AnswerOrigin
from localdpo.files import atomic_write, environment_faults

__all__ = ["Correction", "CorrectionDraft"]


@dataclass(frozen=True, slots=True)
class Correction:
    """An answer and what it answers. `how` is for the pair's provenance: "correct" or "reply"."""

    prompt: tuple[Message, ...]
    answer: str
    origin: AnswerOrigin | None
    how: str = "correct"
    tags: tuple[str, ...] = ()


class CorrectionDraft:
    """The edited copy of one answer, in the workspace's hidden folder. Touches the disk: for a thread."""

    def __init__(self, folder: Path, correction: Correction) -> None:
        said = json.dumps([*correction.prompt, correction.answer]).encode()
        name = hashlib.blake2b(said, digest_size=12).hexdigest()
        self.path = folder / HIDDEN / "corrections" / f"{name}.txt"
        self._answer = correction.answer

    def read(self) -> str | None:
        """What was written when the program ended, None when there is nothing."""
        try:
            return self.path.read_bytes().decode("utf-8", "surrogatepass")
        except (OSError, UnicodeDecodeError):
            return None

    def write(self, text: str) -> None:
        """Keep the text; one that is the answer itself is nothing to keep. Raises EnvironmentFault."""
        if text == self._answer:
            self.drop()
            return
        with environment_faults(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        atomic_write(self.path, text.encode("utf-8", "surrogatepass"))

    def drop(self) -> None:
        """Forget it."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)
