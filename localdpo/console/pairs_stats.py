"""`localdpo pairs stats`: a file of pairs in words and as bars, or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from textwrap import wrap

from localdpo.console.pairs_check import exact_counter, settings_of
from localdpo.console.terminal import columns, progress_line, say, width
from localdpo.data.check.findings import counted
from localdpo.data.stats import FIELDS, Histogram, Stats, file_stats
from localdpo.text import sanitise

__all__ = ["bars", "lines", "run"]

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEAST_BAR, _MOST_BAR = 5, 50
_TAGS_SHOWN = 15


def run(file: Path | None, recipe: Path | None, model: str | None, json_lines: bool) -> None:
    """Print the figures of a file. Raises `InputError`."""
    settings = settings_of(file, recipe)
    counter, note = exact_counter(model or settings.model, 0, required=model is not None)
    with progress_line("reading", quiet=json_lines) as progress:
        stats = file_stats(settings.file, counter, progress)
    if json_lines:
        print(json.dumps(stats.to_json(), indent=2))
        return
    say(*lines(stats, width(), fine=_shows_blocks()))
    if note:
        print(f"\n{sanitise(note)}")


def _shows_blocks() -> bool:
    try:
        _EIGHTHS.encode(sys.stdout.encoding or "utf-8")
    except (LookupError, UnicodeEncodeError):
        return False
    return True


def lines(stats: Stats, wide: int, *, fine: bool = True) -> list[str]:
    """Return the figures in lines of at most `wide` columns where that can be; `fine` allows block characters."""
    shown = [sanitise(stats.file), *(line for text in _counts(stats) for line in wrap(text, max(20, wide)))]
    if not stats.tokens:
        return shown
    shown += ["", *_token_table(stats, wide)]
    for name in FIELDS:
        shown += ["", f"{name} tokens", *_histogram(stats.tokens[name].histogram, wide, fine)]
    if stats.tags:
        tags = dict(list(stats.tags.items())[:_TAGS_SHOWN])
        shown += ["", "tags", *bars(tags, wide, fine=fine)]
        if len(stats.tags) > len(tags):
            shown.append(f"… and {len(stats.tags) - len(tags):,} more tags")
        if stats.untagged:
            shown.append(counted(stats.untagged, "pair has no tag", "pairs have no tag"))
    if set(stats.languages) != {"unknown"}:
        shown += ["", "languages (guessed)", *bars(stats.languages, wide, fine=fine)]
    return shown


def _counts(stats: Stats) -> Iterator[str]:
    yield f"{counted(stats.pairs, 'pair', 'pairs')} of {counted(stats.prompts, 'prompt', 'prompts')}"
    extra = (
        (stats.skipped, "row that training skips", "rows that training skips"),
        (stats.broken, "broken row", "broken rows"),
        (stats.multi_turn, "pair with several turns", "pairs with several turns"),
        (stats.with_system, "pair with a system message", "pairs with a system message"),
        (stats.with_tools, "pair with tools", "pairs with tools"),
        (stats.weighted, "pair with a weight", "pairs with a weight"),
        (stats.retained, "pair to keep an answer", "pairs to keep an answer"),
    )
    yield from (counted(*what) for what in extra if what[0])
    if stats.skipped or stats.broken:
        yield "`localdpo pairs check` names them"
    if stats.pairs:
        even = stats.pairs - stats.chosen_longer - stats.rejected_longer
        yield (
            f"the longer answer is the chosen one in {stats.chosen_longer:,}, the rejected one in "
            f"{stats.rejected_longer:,}" + (f", neither in {even:,}" if even else "")
        )


def _token_table(stats: Stats, wide: int) -> list[str]:
    header = ["tokens (estimated)" if stats.estimated else "tokens", "median", "95 %", "longest", "in all"]
    rows = []
    for name, lengths in stats.tokens.items():
        figures = (lengths.median, lengths.p95, lengths.high, lengths.total)
        rows.append([name, *(f"{figure:,.0f}" for figure in figures)])
    table = columns(header, rows, right=(1, 2, 3, 4))
    if max(map(len, table)) <= wide:
        return table
    return [f"{name}: median {lengths.median:,.0f}, longest {lengths.high:,}" for name, lengths in stats.tokens.items()]


def _histogram(histogram: Histogram, wide: int, fine: bool) -> list[str]:
    spans = zip(histogram.edges, histogram.edges[1:], strict=False)
    names = [f"{low:,}" if high - low == 1 else f"{low:,}–{high - 1:,}" for low, high in spans]
    if not fine:
        names = [name.replace("–", "-") for name in names]
    return bars(dict(zip(names, histogram.counts, strict=True)), wide, fine=fine, right=True)


def bars(counts: Mapping[str, int], wide: int, *, fine: bool = True, right: bool = False) -> list[str]:
    """Return one line for each count: its name, a bar, the number. Without room for bars there are none.

    Any count above 0 shows. `fine` draws eighths of a column, otherwise `#`.
    """
    names = [" ".join(sanitise(name).split()) for name in counts]
    longest = max(8, wide // 3)
    names = [name if len(name) <= longest else name[: longest - 1] + ("…" if fine else "~") for name in names]
    label, number = max(map(len, names)), max(len(f"{count:,}") for count in counts.values())
    room = min(_MOST_BAR, wide - label - number - 4)
    most = max(counts.values()) or 1
    shown = []
    for name, count in zip(names, counts.values(), strict=True):
        bar = "" if room < _LEAST_BAR else _bar(count / most * room, fine) + " "
        shown.append(f"  {name.rjust(label) if right else name.ljust(label)} {bar}{count:,}")
    return shown


def _bar(length: float, fine: bool) -> str:
    if not fine:
        return "#" * max(1, round(length)) if length > 0 else ""
    eighths = max(1, round(length * 8)) if length > 0 else 0
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
