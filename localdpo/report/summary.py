"""The top of a page: the verdict in words with the figures behind each word, and the run in a few numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from localdpo.report.markup import Child, Markup, tag
from localdpo.report.parts import chip, code, percent, plain, sentence
from localdpo.report.record import Record
from localdpo.report.svg import interval_svg
from localdpo.report.values import Figure, figure, items, number, object_at, text
from localdpo.series import number_text
from localdpo.train.run import ACTIVE_STATES

__all__ = ["VERDICTS", "badges", "count_bytes", "duration", "headline", "state_chip", "tiles", "verdict"]

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

_STATES = {
    "finished": "good",
    "stopped": "fair",
    "interrupted": "fair",
    "diverged": "bad",
    "failed": "bad",
}


def duration(seconds: float) -> str:
    """Seconds as 45 s, 2 min 05 s or 3 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def count_bytes(count: float | None) -> str:
    """Bytes in decimal units, empty for None."""
    for unit in ("B", "kB", "MB", "GB"):
        if count is None or count < 999.5:
            return "" if count is None else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def headline(record: Record) -> str:
    """The verdict in one line of plain text."""
    found = record.verdict
    words = [VERDICTS[key][text(found.get(key))][1] for key in VERDICTS if text(found.get(key)) in VERDICTS[key]]
    if words:
        said = ", ".join([words[0], *(word[0].lower() + word[1:] for word in words[1:])])
        return f"{said} (not evaluated)" if record.provisional else said
    return "Not evaluated yet"


def badges(record: Record) -> list[Markup]:
    """The words of the verdict, each with its sign."""
    return [
        tag("span", tag("span", sign, aria_hidden="true"), " ", words, class_=f"word {kind}")
        for key, names in VERDICTS.items()
        if (name := text(record.verdict.get(key))) in names
        for sign, words, kind in [names[name]]
    ]


def verdict(record: Record) -> Markup:
    """What the run comes to; without an evaluation, what training alone says and how to get one."""
    found = badges(record)
    if not found:
        return tag("section", tag("h2", "Not evaluated yet"), _unknown(record), id="verdict", class_="verdict")
    words = text(record.verdict.get("words"))
    return tag(
        "section",
        tag("h2", "Verdict", class_="unseen"),
        tag("p", found, class_="words"),
        tag("p", sentence(words), class_="lead"),
        _reservation(record),
        _reasons(items(record.verdict.get("reasons"))),
        id="verdict",
        class_="verdict",
    )


def _reservation(record: Record) -> Markup | None:
    """What to know about the verdict before it is believed."""
    command = code(f"localdpo eval {record.argument}")
    if record.provisional:
        return tag("p", "This is from training's own figures. ", command, " measures it.", class_="missing")
    if record.outdated:
        return tag("p", "The evaluation is of an earlier adapter of this run. ", command, " does it again.",
                   class_="missing")  # fmt: skip
    return None


def _unknown(record: Record) -> list[Child]:
    if record.state in ACTIVE_STATES:
        return [tag("p", "Training is at work; this page shows the run as it is now. Make it again when it is done.")]
    if not record.has_adapter:
        return [tag("p", "There is no adapter: nothing to judge. ", record.status.message if record.status else "")]
    lines = record.end.figures.get("lines") if record.end else None
    shown = [tag("li", line) for line in lines if isinstance(line, str)] if isinstance(lines, list) else []
    return [
        tag("p", "A falling loss alone proves nothing. ", code(f"localdpo eval {record.argument}"),
            " measures what was learned, what was kept, and says whether to keep this run.", class_="lead"),
        [tag("p", "What the closing probes say so far:"), tag("ul", shown)] if shown else None,
    ]  # fmt: skip


def _reasons(reasons: list[dict[str, Any]]) -> Markup | None:
    if not reasons:
        return None
    return tag("ul", [_reason(reason) for reason in reasons], class_="reasons")


def _reason(reason: Mapping[str, Any]) -> Markup:
    kind, word = "", text(reason.get("word"))
    for names in VERDICTS.values():
        kind = names[word][2] if word in names else kind
    value, threshold = number(reason.get("value")), number(reason.get("threshold"))
    low, high = number(reason.get("low")), number(reason.get("high"))
    name = text(reason.get("figure"))
    return tag(
        "li",
        chip(word, kind) if word else None,
        tag(
            "span",
            tag("strong", name[:1].upper() + name[1:]),
            " ",
            tag("span", sentence(text(reason.get("text")))),
            class_="why",
        ),
        interval_svg(value, low, high, threshold) if value is not None else None,
        tag("span", _bounds(value, low, high, threshold), class_="quiet bounds"),
    )


def _bounds(value: float | None, low: float | None, high: float | None, threshold: float | None) -> str:
    if value is None:
        return ""
    said = number_text(value)
    said += f" ({number_text(low)} to {number_text(high)})" if low is not None and high is not None else ""
    return said + (f", bound {number_text(threshold)}" if threshold is not None else "")


def tiles(record: Record) -> Markup:
    """The run in a few numbers; those that are not known are left out."""
    held, plan = object_at(record.evaluation, "held_out"), record.plan
    accuracy = figure(held.get("accuracy")) or _last(record, "eval_rewards/accuracies")
    margin = figure(held.get("margin")) or _last(record, "eval_rewards/margins")
    drift = object_at(record.evaluation, "drift")
    kept = figure(object_at(drift, "probes").get("facts_kept")) or figure(object_at(drift, "retain").get("facts_kept"))
    kl = figure(object_at(drift, "retain").get("kl_per_token"))
    status = record.status
    seconds = record.end.seconds if record.end else 0.0
    shown: list[tuple[str, str]] = [
        ("Held-out accuracy", percent(accuracy) if accuracy else ""),
        ("Held-out margin", plain(margin) if margin else ""),
        ("Right answers kept", percent(kept) if kept else ""),
        ("KL to the base, retained", plain(kl) if kl else ""),
        ("Pairs", f"{n:,.0f}" if (n := number(plan.get("train_pairs"))) is not None else ""),
        ("Steps", f"{status.step:,} of {status.total_steps:,}" if status and status.total_steps else ""),
        ("Time", duration(seconds) if seconds else ""),
        ("Peak memory", count_bytes(record.peak_memory_bytes or None)),
    ]
    return tag(
        "ul",
        [tag("li", tag("span", label, class_="label"), _tile_value(value)) for label, value in shown if value],
        class_="tiles",
        aria_label="The run in numbers",
    )


def _tile_value(value: str) -> Markup:
    """The value large, its interval small beneath it."""
    main, bracket, rest = value.partition(" (")
    return tag("span", main, tag("small", rest.rstrip(")")) if bracket else None, class_="value")


def _last(record: Record, metric: str) -> Figure | None:
    series = record.curves.get(metric)
    return Figure(series.buckets[-1].mean) if series and series.buckets else None


def state_chip(record: Record) -> Markup:
    """The state of the run."""
    return chip(record.state, _STATES.get(record.state, ""))
