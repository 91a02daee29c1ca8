"""A pair as one row of texts, for CSV, and back; and cells that a spreadsheet would run made harmless.

Columns: `prompt`, `system`, `chosen`, `rejected`, `messages`, `id`, `tags`, `weight`, `kind`, `tools`, `extra`. A
prompt of more than a system and a user turn is JSON in `messages`, and `prompt` then only shows its last turn.
`tags` are separated by commas where that is unambiguous; `tools` and `extra` are JSON. Empty cells are absent.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from localdpo.data.pairs import PreferencePair, pair_to_json

__all__ = ["COLUMNS", "flat_row", "harmless_cell", "original_cell", "row_of"]

COLUMNS = ("prompt", "system", "chosen", "rejected", "messages", "id", "tags", "weight", "kind", "tools", "extra")

# What spreadsheets take for the start of a formula, full-width forms included, and white space they pass over.
_RUN = "=+\\-@\t\r\n＝＋－＠"
_QUOTE = re.compile(f"'*[{_RUN}]")
_QUOTED = re.compile(f"'+[{_RUN}]")
_JSON_COLUMNS = {"messages": list, "tools": list, "extra": dict}


def harmless_cell(text: str) -> str:
    """`text` with an apostrophe before it when a spreadsheet would take it for a formula."""
    return f"'{text}" if _QUOTE.match(text) else text


def original_cell(cell: str) -> str:
    """What `harmless_cell` was given."""
    return cell[1:] if _QUOTED.match(cell) else cell


def flat_row(pair: PreferencePair) -> dict[str, str]:
    """The pair as texts by column; `row_of` gives back the row that `pair_to_json` writes."""
    row = pair_to_json(pair)
    plain = isinstance(row["prompt"], str)
    cells = dict.fromkeys(COLUMNS, "")
    cells |= {"prompt": pair.prompt[-1]["content"], "chosen": pair.chosen, "rejected": pair.rejected}
    cells["system"] = row.get("system", "") if plain else ""
    cells["messages"] = "" if plain else _json(row["prompt"])
    cells["id"] = pair.id or ""
    cells["tags"] = _tags_cell(pair.tags)
    cells["weight"] = "" if pair.weight == 1.0 else repr(pair.weight)
    cells["kind"] = "" if pair.kind == "preference" else pair.kind
    cells["tools"] = _json(list(pair.tools)) if pair.tools else ""
    cells["extra"] = _json(pair.extra) if pair.extra else ""
    return cells


def row_of(cells: Mapping[str, Any]) -> dict[str, Any]:
    """A row from columns whose values may be texts: the inverse of `flat_row`, and kind to tables by others.

    Only our columns are looked into, and only where they hold text; empty texts other than answers are absent.
    Raises ValueError for a column of JSON that holds something else.
    """
    row = {key: value for key, value in cells.items() if value not in ("", None) or key in ("chosen", "rejected")}
    ours = isinstance(row.get("messages"), str)
    for key, kind in _JSON_COLUMNS.items():
        if isinstance(row.get(key), str) and (key != "extra" or row[key].lstrip().startswith("{")):
            row[key] = _from_json(row[key], key, kind)
    if isinstance(row.get("tags"), str):
        row["tags"] = _tags(row["tags"])
    if isinstance(row.get("weight"), str):
        row["weight"] = _number(row["weight"])
    if ours and {"chosen", "rejected"} <= set(row):
        row["prompt"] = row.pop("messages")
        row |= {key: [{"role": "assistant", "content": row[key]}] for key in ("chosen", "rejected") if _text(row, key)}
    extra = row.get("extra")
    if isinstance(extra, dict) and not set(extra) & (set(row) - {"extra"}):
        row = {key: value for key, value in row.items() if key != "extra"} | extra
    return row


def _text(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row[key], str)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _from_json(text: str, key: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f'the column "{key}" is not JSON') from None
    if not isinstance(value, kind):
        raise ValueError(f'the column "{key}" must hold a JSON {"list" if kind is list else "object"}')
    return value


def _tags_cell(tags: tuple[str, ...]) -> str:
    joined = ", ".join(tags)
    return joined if _tags(joined) == list(tags) else _json(list(tags))


def _tags(text: str) -> Any:
    if text.startswith("["):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            pass
    return [tag for tag in (part.strip() for part in text.split(",")) if tag]


def _number(text: str) -> float:
    try:
        number = float(text.strip().replace(",", "."))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f'the column "weight" holds {text[:40]!r}, which is not a number')
    return number
