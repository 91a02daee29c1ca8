"""What the top of a page says: the verdict in words with the figures behind each word, and the run in a few numbers."""

from __future__ import annotations

from localdpo.report.formats import count, count_bytes, duration, percent, plain
from localdpo.report.record import Record
from localdpo.report.values import Figure, figure, object_at, text, texts
from localdpo.series import number_text

__all__ = ["STATE_KINDS", "VERDICTS", "badges", "bounds", "closing_lines", "headline", "last_of", "tiles", "word_kind"]

VERDICTS = {
    "learned": {
        "learned": ("✓", "Learned", "good"),
        "partly": ("~", "Partly learned", "fair"),
        "not": ("✗", "Not learned", "bad"),
    },
    "kept": {
        "kept": ("✓", "The rest kept", "good"),
        "drifted": ("~", "The rest drifted", "fair"),
        "broken": ("✗", "The rest broken", "bad"),
    },
}
"""How the words of a verdict are shown: a sign, a heading, a colour."""

STATE_KINDS = {"finished": "good", "stopped": "fair", "interrupted": "fair", "diverged": "bad", "failed": "bad"}


def badges(record: Record) -> list[tuple[str, str, str]]:
    """The words of the verdict, as in `VERDICTS`."""
    return [names[word] for key, names in VERDICTS.items() if (word := text(record.verdict.get(key))) in names]


def word_kind(word: str) -> str:
    """The colour of one word of a verdict."""
    return next((names[word][2] for names in VERDICTS.values() if word in names), "")


def headline(record: Record) -> str:
    """The verdict in one line of plain text."""
    words = [words for _, words, _ in badges(record)]
    if words:
        said = ", ".join([words[0], *(word[0].lower() + word[1:] for word in words[1:])])
        return f"{said} (not evaluated)" if record.provisional else said
    return "Not evaluated yet"


def closing_lines(record: Record) -> list[str]:
    """What the closing probes said, a line each."""
    return texts(record.end.figures.get("lines")) if record.end else []


def bounds(value: float | None, low: float | None, high: float | None, threshold: float | None) -> str:
    """A figure, its interval and what it is held against, in words."""
    if value is None:
        return ""
    said = plain(Figure(value, low, high))
    return said + (f", bound {number_text(threshold)}" if threshold is not None else "")


def tiles(record: Record) -> list[tuple[str, str]]:
    """The run in a few numbers, each with its name; those that are not known are left out."""
    held, status = object_at(record.evaluation, "held_out"), record.status
    accuracy = figure(held.get("accuracy")) or last_of(record, "eval_rewards/accuracies")
    margin = figure(held.get("margin")) or last_of(record, "eval_rewards/margins")
    drift = object_at(record.evaluation, "drift")
    kept = figure(object_at(drift, "probes").get("facts_kept")) or figure(object_at(drift, "retain").get("facts_kept"))
    kl = figure(object_at(drift, "retain").get("kl_per_token"))
    seconds = record.end.seconds if record.end else 0.0
    shown = [
        ("Held-out accuracy", percent(accuracy) if accuracy else ""),
        ("Held-out margin", plain(margin) if margin else ""),
        ("Right answers kept", percent(kept) if kept else ""),
        ("KL to the base, retained", plain(kl) if kl else ""),
        ("Pairs", count(record.plan.get("train_pairs"), "")),
        ("Steps", f"{status.step:,} of {status.total_steps:,}" if status and status.total_steps else ""),
        ("Time", duration(seconds) if seconds else ""),
        ("Peak memory", count_bytes(record.peak_memory_bytes or None)),
    ]
    return [(name, value) for name, value in shown if value]


def last_of(record: Record, metric: str) -> Figure | None:
    """The last value of a curve."""
    series = record.curves.get(metric)
    return Figure(series.buckets[-1].mean) if series and series.buckets else None
