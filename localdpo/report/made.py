"""The other half of a page: what the data is like, the recipe, versions and machine, and how all this was made.

Nothing here names a person or a place: no host, no home folder. Files are called by their names and known by their
sums.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from localdpo import __version__
from localdpo.data.check.findings import KINDS, Finding, Severity
from localdpo.data.pairs import listed
from localdpo.report.differences import flat
from localdpo.report.markup import Child, Markup, escape, tag
from localdpo.report.parts import chip, code, cut, facts, fold, missing, note, section, sentence, table
from localdpo.report.record import Record
from localdpo.report.summary import count_bytes
from localdpo.report.values import number, object_at, text, tilde
from localdpo.series import number_text

__all__ = ["data_section", "made_section", "recipe_section", "value_text", "when"]

_SEVERITIES = {Severity.ERROR: "bad", Severity.WARNING: "fair", Severity.INFO: ""}
MAX_FINDINGS = 40


def when(seconds: float | None) -> str:
    """A moment in UTC, empty for None or what no calendar has."""
    if seconds is None or not 0 < seconds < 32_503_680_000:
        return ""
    return time.strftime("%-d %B %Y, %H:%M UTC", time.gmtime(seconds))


def data_section(record: Record) -> Markup:
    """What a check of the run's own pairs finds, and how long they are."""
    title, found = "The data", record.pairs.report
    if found is None:
        return section("data", title, missing(record.pairs.missing), _lengths(record.plan))
    findings = [_finding(finding) for finding in found.findings[:MAX_FINDINGS]]
    left = len(found.findings) - len(findings)
    said = f"{found.pairs:,} pairs" + (f", {found.skipped:,} rows skipped" if found.skipped else "")
    return section(
        "data",
        title,
        note(said + (": nothing was found that would spoil training." if not findings else
                     ". What was found in the run's own copy of them, the worst first:")),
        tag("ul", findings, class_="findings") if findings else None,
        note(f"{left:,} more findings: ", code("localdpo pairs check"), " shows them.") if left > 0 else None,
        [note(cut(said)) for said in found.notes],
        _lengths(record.plan),
    )  # fmt: skip


def _finding(finding: Finding) -> Markup:
    kind = KINDS.get(finding.kind)
    rows = sentence(listed(finding.rows)) + " " if finding.rows else ""
    return tag(
        "li",
        chip(finding.severity.value, _SEVERITIES[finding.severity]),
        tag(
            "div",
            tag("strong", kind.title if kind else finding.kind),
            tag("p", sentence(cut(finding.message, 1_000))),
            tag("p", rows, sentence(cut(finding.fix, 400)), class_="quiet"),
        ),
    )


def _lengths(plan: Mapping[str, Any]) -> Markup | None:
    """How many rows have how many tokens, as bars in a table."""
    bins = plan.get("lengths")
    rows = [
        (most, count)
        for pair in (bins if isinstance(bins, list) else [])
        if isinstance(pair, list) and len(pair) == 2
        for most, count in [(number(pair[0]), number(pair[1]))]
        if most is not None and count is not None and count >= 0
    ][:40]
    if not rows:
        return None
    top = max(count for _, count in rows) or 1
    cells: list[list[Child]] = [
        [f"up to {most:,.0f}", f"{count:,.0f}",
         tag("svg", tag("rect", width=round(100 * count / top, 1), height=8, class_="bar"), class_="bars",
             viewBox="0 0 100 8", preserveAspectRatio="none", aria_hidden="true")]
        for most, count in rows
    ]  # fmt: skip
    return tag("div", tag("h3", "Length of rows"), table("Tokens of a row", ("Tokens", "Rows", ""), cells, right=(1,)))


def value_text(value: object) -> str:
    """A setting as a recipe writes it; paths without the home they are in."""
    if isinstance(value, str):
        return tilde(value)
    if isinstance(value, float):
        return number_text(value, 4)
    return cut(json.dumps(value, ensure_ascii=False, default=str), 300)


def recipe_section(record: Record) -> Markup:
    """Every setting, as it was trained."""
    title, recipe = "Recipe", flat(object_at(record.info, "recipe"))
    if not recipe:
        return section("recipe", title, missing("run.json has no recipe."))
    if record.imported:
        return section("recipe", title, _origin(record.imported))
    shown = {key: value for key, value in recipe.items() if value is not None}
    return section(
        "recipe",
        title,
        facts([(key, value_text(recipe[key])) for key in _TOLD if recipe.get(key) is not None]),
        fold(
            f"All {len(shown):,} settings",
            table("Settings", ("Key", "Value"), [[code(key), value_text(value)] for key, value in shown.items()]),
        ),
    )


_TOLD = (
    "model",
    "data.retain",
    "lora.r",
    "lora.num_layers",
    "dpo.loss_type",
    "dpo.beta",
    "dpo.rpo_alpha",
    "train.learning_rate",
    "train.num_train_epochs",
    "train.per_device_train_batch_size",
    "seed",
)


def _origin(origin: Mapping[str, Any]) -> Markup:
    return tag(
        "div",
        note("This adapter was trained by another tool, so its recipe is not known."),
        facts([
            ("Imported from", tilde(text(origin.get("from")))),
            ("Format", text(origin.get("format"))),
            ("Base it names", text(origin.get("base"))),
            ("sha256", code(text(origin.get("sha256")))),
        ]),
    )  # fmt: skip


def made_section(record: Record, machine: Mapping[str, Any], now: float) -> Markup:
    """Versions, machine, files, what the run had to say, and the commands that make it all again."""
    plan, trained = record.plan, object_at(record.info, "machine")
    versions = object_at(trained, "versions") or {"localdpo": record.info.get("localdpo")}
    parts = [
        ("Device", text(plan.get("device"))),
        ("Processor", _processor(trained)),
        ("System", text(trained.get("system"))),
        ("Memory", count_bytes(number(trained.get("memory_bytes")))),
        ("Memory mode", text(plan.get("memory_mode"))),
        ("Weights trained", _share_of(plan)),
        ("Tokens an epoch", _whole(plan.get("tokens_per_epoch"))),
        ("Model fingerprint", _sum(object_at(record.info, "model").get("fingerprint"))),
        ("Run made", when(number(record.info.get("created")))),
        ("Evaluated", when(number(record.evaluation.get("created")))),
    ]
    return section(
        "made",
        "How this was made",
        facts([(name, value) for name, value in parts if value]),
        tag("h3", "Versions"),
        facts([(name, str(version)) for name, version in versions.items() if isinstance(version, str)]),
        _files(object_at(record.info, "files")),
        _said(record),
        tag("h3", "Again"),
        tag("pre", tag("code", _commands(record)), tabindex=0),
        note(f"This page was made by localdpo {__version__} on {when(now)}",
             f" ({text(machine.get('system'))})." if machine else ".",
             " It holds everything it shows and loads nothing."),
    )  # fmt: skip


def _processor(machine: Mapping[str, Any]) -> str:
    cores = number(machine.get("cores"))
    return text(machine.get("processor")) + (f", {cores:.0f} cores" if cores else "")


def _whole(value: object) -> str:
    found = number(value)
    return "" if found is None else f"{found:,.0f}"


def _share_of(plan: Mapping[str, Any]) -> str:
    trained, total = number(plan.get("trainable_parameters")), number(plan.get("parameters"))
    if not trained or not total:
        return ""
    return f"{trained:,.0f} of {total:,.0f} ({trained / total:.2%})"


def _sum(value: object) -> Markup | str:
    return tag("code", text(value)[:16]) if text(value) else ""


def _files(files: Mapping[str, Any]) -> Markup | None:
    rows: list[list[Child]] = [
        [code(key), text(file.get("path")).replace("\\", "/").rpartition("/")[2], _sum(file.get("sha256"))]
        for key, file in files.items()
        if isinstance(file, Mapping)
    ]
    if not rows:
        return None
    return tag("div", tag("h3", "Files"), table("Files the run was made from", ("What", "File", "sha256"), rows))


def _said(record: Record) -> Markup | None:
    """The warnings of the run, and how it ended."""
    warnings = [
        tag("li", tag("span", f"step {event.step:,}", class_="quiet"), " ", cut(event.message, 600), " ",
            tag("span", cut(event.fix, 300), class_="quiet"))
        for event in record.warnings
    ]  # fmt: skip
    if record.end:
        warnings.append(tag("li", tag("span", f"step {record.end.step:,}", class_="quiet"), " ",
                            tilde(cut(record.end.message or record.end.reason, 600))))  # fmt: skip
    if not warnings:
        return None
    left = record.num_warnings - len(record.warnings)
    more = note(f"{left:,} more warnings are in metrics.jsonl.") if left > 0 else None
    return tag("div", tag("h3", "What the run said"), tag("ul", warnings, class_="lines"), more)


def _commands(record: Record) -> Sequence[Child]:
    run = record.argument
    again = f"localdpo train {run}/recipe.yaml --set output_dir={run}-again"
    lines = [] if record.imported else [again]
    lines += [f"localdpo eval {run}", f"localdpo report {run}", f"localdpo chat {run} --compare"]
    return escape("\n".join(lines))
