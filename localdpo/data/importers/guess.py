"""Which family the rows of a file belong to: named by the user, or the one that most of the first rows look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from localdpo.data.importers.alpaca import ALPACA
from localdpo.data.importers.argilla import ARGILLA
from localdpo.data.importers.columns import guess_columns, mapped_family
from localdpo.data.importers.family import Family
from localdpo.data.importers.hh import HH
from localdpo.data.importers.openai import OPENAI
from localdpo.data.importers.sharegpt import SHAREGPT
from localdpo.data.importers.trl import TRL
from localdpo.data.importers.ultrafeedback import ULTRAFEEDBACK
from localdpo.errors import InputError, Problem

__all__ = ["FAMILIES", "Chosen", "choose_family"]

# The more telling first: of two that match as many rows the earlier is taken.
FAMILIES: tuple[Family, ...] = (OPENAI, SHAREGPT, ARGILLA, ULTRAFEEDBACK, ALPACA, HH, TRL)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A family, whether it was guessed, and for a table with names of its own which column is what."""

    family: Family
    guessed: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)


def choose_family(
    rows: Sequence[Mapping[str, Any]], name: str | None, mapping: Mapping[str, str], where: str
) -> Chosen:
    """The family for a file that begins with `rows`. Raises InputError for an unknown name and when nothing fits."""
    if mapping:
        if name not in (None, "columns"):
            raise InputError(Problem("--map", f"is for tables, not for the format {name}", "Leave out --format"))
        return Chosen(mapped_family(mapping), False, mapping)
    named = {family.name: family for family in FAMILIES}
    if name is not None and name != "columns":
        if name not in named:
            raise InputError(
                Problem("--format", f"{name!r} is not a format", f"One of {', '.join([*named, 'columns'])}")
            )
        return Chosen(named[name])
    best = max(FAMILIES, key=lambda family: sum(family.matches(row) for row in rows))
    if name is None and sum(best.matches(row) for row in rows) * 2 > len(rows):
        return Chosen(best, guessed=True)
    columns = guess_columns(rows)
    if columns:
        return Chosen(mapped_family(columns), True, columns)
    keys = list(dict.fromkeys(key for row in rows for key in row))[:12]
    has = ", ".join(f'"{key[:40]}"' for key in keys) or "nothing that can be read"
    fix = "Say which column is which, as in --map prompt=… --map chosen=… --map rejected=…, or name a --format"
    raise InputError(Problem(where, f"is of no known format: its rows have {has}", fix))
