"""Where pairs and answers come from, under one key of a row.

A row's `provenance` is an object that says how the pair was made (`how`), from what each answer came
(`chosen`, `rejected`) and, for an imported row, which file and line it was. `PreferencePair.extra` keeps it, no
trainer reads it. This module is the one home of the key and of its shape; it knows nothing about models or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

__all__ = ["PROVENANCE", "AnswerOrigin", "by_person", "now", "origin_of", "provenance_of", "with_provenance"]

PROVENANCE = "provenance"
"""The key of a row, and of `PreferencePair.extra`."""

By = Literal["model", "person", "substitution", "rewrite", "file"]


def now() -> str:
    """The time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True, slots=True)
class AnswerOrigin:
    """Where one answer comes from.

    `by` is who wrote it: a model as it is, a person, a substitution or a model's rewrite of an answer, or a file.
    `model` is the name the user gave and `fingerprint` the base's content; `adapter` is a folder and
    `adapter_sha256` its weights, both empty for a base. `sampling` holds the options that chose tokens, `seed` and
    `sample` (0-based) make the answer again. `finish` is "stop" or, for an answer cut off, "length". `time` is UTC.
    """

    by: By
    model: str = ""
    fingerprint: str = ""
    adapter: str = ""
    adapter_sha256: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    sample: int | None = None
    finish: str = ""
    time: str = field(default_factory=now)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; what says nothing is left out."""
        return {key: value for key, value in asdict(self).items() if value not in (None, "", {})}

    @classmethod
    def from_json(cls, value: Any) -> AnswerOrigin | None:
        """The origin that `to_json` described; None for anything else. Values of a wrong type count as absent."""
        if not isinstance(value, Mapping) or value.get("by") not in By.__args__:  # type: ignore[attr-defined]
            return None
        texts = ("model", "fingerprint", "adapter", "adapter_sha256", "finish", "time")
        kept: dict[str, Any] = {key: value[key] if isinstance(value.get(key), str) else "" for key in texts}
        kept |= {key: value[key] for key in ("seed", "sample") if type(value.get(key)) is int}
        sampling = value.get("sampling")
        return cls(by=value["by"], sampling=dict(sampling) if isinstance(sampling, Mapping) else {}, **kept)


def by_person() -> AnswerOrigin:
    """An answer that somebody wrote, now."""
    return AnswerOrigin("person")


def provenance_of(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's other keys say about where it comes from; empty when they say nothing."""
    value = extra.get(PROVENANCE)
    return dict(value) if isinstance(value, Mapping) else {}


def origin_of(extra: Mapping[str, Any], answer: Literal["chosen", "rejected"]) -> AnswerOrigin | None:
    """Where one answer of a pair comes from, None when its row does not say."""
    return AnswerOrigin.from_json(provenance_of(extra).get(answer))


def with_provenance(
    extra: Mapping[str, Any],
    how: str,
    *,
    chosen: AnswerOrigin | None = None,
    rejected: AnswerOrigin | None = None,
    **notes: Any,
) -> dict[str, Any]:
    """`extra` with a provenance: `how` the pair was made, the answers' origins, and JSON values by name.

    A provenance that was there, whatever its shape, is kept inside the new one under `before`.
    """
    entry: dict[str, Any] = {"how": how}
    entry |= {
        key: origin.to_json() for key, origin in (("chosen", chosen), ("rejected", rejected)) if origin is not None
    }
    entry |= notes
    if PROVENANCE in extra:
        entry["before"] = extra[PROVENANCE]
    return {**extra, PROVENANCE: entry}
