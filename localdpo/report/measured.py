"""The measured parts of a page: held-out pairs, drift, tasks, fairness and blind comparison, out of eval.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from localdpo.report.markup import Child, Markup, tag
from localdpo.report.parts import cut, figure_cell, fold, missing, note, percent, plain, section, table
from localdpo.report.record import Record
from localdpo.report.values import Figure, figure, items, number, object_at, text
from localdpo.series import number_text

__all__ = [
    "blind_section",
    "drift_section",
    "fairness_section",
    "held_out_section",
    "task_section",
    "unmeasured_section",
]

HARDEST, MAX_TAGS, MAX_EXAMPLES = 12, 40, 8


def _command(record: Record) -> str:
    return f"localdpo eval {record.argument}" if record.has_adapter else ""


def _whole(value: object) -> str:
    found = number(value)
    return "–" if found is None else f"{found:,.0f}"


_HELD_OUT = (
    ("Pairs preferred more than by the base", "accuracy", "", True),
    ("Pairs whose chosen answer is likelier, a token", "", "preference_accuracy", True),
    ("Margin of rewards", "margin", "", False),
    ("Odds of chosen against rejected grew by, nats", "nats", "", False),
    ("Chosen reward", "chosen_reward", "", False),
    ("Rejected reward", "rejected_reward", "", False),
    ("Loss", "loss", "loss", False),
)
"""What is measured on held-out pairs: its name, its key, its key under "base" and "tuned", whether it is a share."""


def _held_out_row(held: Mapping[str, Any], name: str, key: str, own: str, share: bool) -> list[Child] | None:
    before = figure(object_at(held, "base").get(own)) if own else None
    after = figure(held.get(key)) if key else figure(object_at(held, "tuned").get(own))
    if before is None and after is None:
        return None
    threshold = {"accuracy": 0.5, "margin": 0.0}.get(key)
    said = (percent(before) if share else plain(before)) if own else ""
    return [name, said, figure_cell(after, share=share, threshold=threshold)]


def _against(runs: list[dict[str, Any]]) -> Markup | None:
    """Earlier runs on the same pairs."""
    rows: list[list[Child]] = [
        [
            text(row.get("run")),
            percent(figure(row.get("accuracy"))),
            plain(figure(row.get("margin"))),
            figure_cell(figure(row.get("larger")), share=True, threshold=0.5),
        ]
        for row in runs
    ]
    if not rows:
        return None
    header = ("Run", "Its accuracy", "Its margin", "Pairs this run separates further")
    return tag("div", tag("h3", "Against earlier runs"), table("Other runs on the same pairs", header, rows))


def held_out_section(record: Record) -> Markup:
    """Pairs that were not trained on: overall, per tag, and those that went worst."""
    title = "Held-out pairs"
    held = object_at(record.evaluation, "held_out")
    if not held:
        # An evaluation that has none was of a run that held none out: they have to be named.
        command = _command(record) + (" --pairs FILE" if record.evaluation and record.has_adapter else "")
        return section(
            "held-out", title, _last_evaluation(record), missing("Held-out pairs were not evaluated.", command)
        )
    rows = [row for spec in _HELD_OUT if (row := _held_out_row(held, *spec)) is not None]
    said = f"{_whole(held.get('pairs'))} pairs that were not trained on"
    skipped = number(held.get("skipped"))
    said += f", {skipped:,.0f} skipped" if skipped else ""
    return section(
        "held-out",
        title,
        note(f"{said}. Intervals are 95 %."),
        table("Held-out figures", ("", "Base", "Tuned"), rows),
        _against(items(held.get("against"))),
        _tags(object_at(held, "tags")),
        _hardest(held),
    )


def _last_evaluation(record: Record) -> Markup | None:
    if record.last_eval is None:
        return None
    metrics = record.last_eval.metrics
    parts = [
        f"{label} {number_text(metrics[key]) if key != 'eval_rewards/accuracies' else format(metrics[key], '.0%')}"
        for label, key in (("loss", "eval_loss"), ("accuracy", "eval_rewards/accuracies"),
                           ("margin", "eval_rewards/margins"))
        if key in metrics
    ]  # fmt: skip
    return note(f"While training, at step {record.last_eval.step:,}: {', '.join(parts)}.")


def _tags(tags: Mapping[str, Any]) -> Markup | None:
    rows = [
        [
            name,
            _whole(row.get("pairs")),
            figure_cell(figure(row.get("accuracy")), share=True, threshold=0.5),
            plain(figure(row.get("margin"))),
        ]
        for name, row in tags.items()
        if isinstance(row, Mapping)
    ][:MAX_TAGS]
    if not rows:
        return None
    return tag("div", tag("h3", "By tag"), table("Held-out figures by tag", ("Tag", "Pairs", "Accuracy", "Margin"),
               rows, right=(1,)))  # fmt: skip


def _hardest(held: Mapping[str, Any]) -> Markup | None:
    pairs = [pair for pair in items(held.get("per_pair")) if number(pair.get("margin")) is not None]
    pairs.sort(key=lambda pair: number(pair.get("margin")) or 0.0)
    if not pairs:
        return None
    rows: list[list[Child]] = [
        [
            cut(text(pair.get("prompt")), 300),
            plain(figure(pair.get("margin"))),
            f"{_whole(pair.get('chosen_words'))} / {_whole(pair.get('rejected_words'))}",
            _place(text(pair.get("source"))),
        ]
        for pair in pairs[:HARDEST]
    ]
    wrong = sum((number(pair.get("margin")) or 0.0) <= 0 for pair in pairs)
    return tag(
        "div",
        tag("h3", "Hardest pairs"),
        note(f"{wrong:,} of {len(pairs):,} have a margin of 0 or below: the rejected answer is still preferred. "
             "Look at these first."),
        table("Pairs with the lowest margins", ("Prompt", "Margin", "Words chosen / rejected", "Where"), rows,
              right=(1, 2)),
    )  # fmt: skip


def _place(source: str) -> str:
    """A file and its line without the folders before it."""
    return source.replace("\\", "/").rpartition("/")[2]


_SETS = (
    ("Prompts to retain", "retain"),
    ("Probes of other things", "probes"),
    ("Probes of what was taught", "taught"),
)
_DRIFT = (
    ("KL to the base, nats a token", "kl_per_token", False),
    ("Answers unchanged", "unchanged", True),
    ("Right answers kept", "facts_kept", True),
)
_STYLE = (
    ("Distinct words (distinct-1)", "distinct_1"),
    ("Distinct word pairs (distinct-2)", "distinct_2"),
    ("Repetition", "repetition"),
    ("Words an answer", "words"),
)


def drift_section(record: Record) -> Markup:
    """What moved that was to stay."""
    title = "What else changed"
    drift = object_at(record.evaluation, "drift")
    lines = record.end.figures.get("lines") if record.end else None
    probes = [tag("li", line) for line in lines if isinstance(line, str)] if isinstance(lines, list) else []
    after = tag("ul", probes, class_="lines") if probes else None
    if not drift:
        return section("drift", title, after, missing("Drift was not measured.", _command(record)))
    parts = [(name, object_at(drift, key)) for name, key in _SETS]
    groups = [(name, group) for name, found in parts for name, group in _drift_groups(name, found)]
    whole = [
        (label, figure(drift.get(key)))
        for label, key in (
            ("Trained phrases in unrelated answers", "leakage"),
            ("Same answer to a reworded prompt", "robustness"),
            ("The same of the base", "robustness_base"),
        )
    ]
    return section(
        "drift",
        title,
        after,
        tag("div", [_drift_table(name, group) for name, group in groups], class_="pair"),
        table("Leakage and robustness", ("", "Share"),
              [[label, figure_cell(found, share=True)] for label, found in whole if found])
        if any(found for _, found in whole) else None,
    )  # fmt: skip


def _drift_groups(name: str, found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A set of prompts measured as one, or by its groups."""
    if "prompts" in found:
        yield name, found
        return
    for group, values in found.items():
        if isinstance(values, Mapping):
            yield f"{name}: {group}", values


def _drift_table(name: str, group: Mapping[str, Any]) -> Markup:
    rows: list[list[Child]] = [
        [label, "", figure_cell(found, share=share)]
        for label, key, share in _DRIFT
        if (found := figure(group.get(key))) is not None
    ]
    right = object_at(group, "right")
    base, tuned = figure(right.get("base")), figure(right.get("tuned"))
    if base or tuned:
        rows.append(["Right answers", percent(base), percent(tuned)])
    for label, key in _STYLE:
        sides = object_at(group, key)
        base, tuned = figure(sides.get("base")), figure(sides.get("tuned"))
        if base or tuned:
            rows.append([label, plain(base), plain(tuned)])
    heading = tag("h3", name, " ", tag("small", f"{_whole(group.get('prompts'))} prompts"))
    return tag("div", heading, table(name, ("", "Base", "Tuned"), rows))


def task_section(record: Record) -> Markup | None:
    """Tasks, the base beside the tuned model; None when none were asked for."""
    tasks = items(record.evaluation.get("tasks"))
    if not tasks:
        return None
    rows: list[list[Child]] = []
    for task in tasks:
        for metric, sides in object_at(task, "metrics").items():
            base, tuned = (figure(object_at(sides).get(side)) for side in ("base", "tuned"))
            rows.append(
                [text(task.get("name")), metric, _whole(task.get("examples")), plain(base), plain(tuned),
                 _change(base, tuned)]
            )  # fmt: skip
    header = ("Task", "Metric", "Examples", "Base", "Tuned", "Change")
    examples = [found for task in tasks if (found := _task_answers(task)) is not None]
    return section("tasks", "Tasks", table("Task metrics", header, rows, right=(2,)), examples)


def _change(base: Figure | None, tuned: Figure | None) -> str:
    if base is None or tuned is None:
        return ""
    change = tuned.value - base.value
    return f"{'+' if change >= 0 else '−'}{number_text(abs(change))}"


def _task_answers(task: Mapping[str, Any]) -> Markup | None:
    rows: list[list[Child]] = [
        [cut(text(row.get("prompt")), 400), *(cut(text(row.get(key)), 400) for key in ("expected", "base", "tuned"))]
        for row in items(task.get("answers"))
    ]
    if not rows:
        return None
    name = text(task.get("name"))
    shown = table(f"Answers of {name}", ("Prompt", "Expected", "Base", "Tuned"), rows[:MAX_EXAMPLES])
    return fold(f"{name}: {min(len(rows), MAX_EXAMPLES)} of {len(rows):,} answers", shown)


def fairness_section(record: Record) -> Markup | None:
    """Gaps between groups of people, before and after; None when they were not asked for."""
    found = items(record.evaluation.get("fairness"))
    if not found:
        return None
    rows: list[list[Child]] = []
    for row in found:
        groups = row.get("groups")
        names = ", ".join(str(group) for group in groups) if isinstance(groups, list) else ""
        for label, key in (("log-prob", "gap_logp"), ("answers", "gap_answers")):
            sides = object_at(row, key)
            base, tuned = figure(sides.get("base")), figure(sides.get("tuned"))
            if base or tuned:
                rows.append([text(row.get("name")), names, text(row.get("language")), label, plain(base), plain(tuned),
                             _gap(base, tuned)])  # fmt: skip
    return section(
        "fairness",
        "Fairness",
        note("The same prompt with another group of people in it. A gap of 0 means that the group makes no difference; "
             "smaller is better."),
        table("Gaps between groups", ("Prompts", "Groups", "Language", "Gap in", "Base", "Tuned", ""), rows),
        [_leans(row) for row in found],
    )  # fmt: skip


def _leans(row: Mapping[str, Any]) -> Markup | None:
    """By how much each group is favoured over the mean of all."""
    cells: list[list[Child]] = [
        [group, plain(figure(object_at(sides).get("base"))), plain(figure(object_at(sides).get("tuned")))]
        for group, sides in list(object_at(row, "lean").items())[:MAX_TAGS]
    ]
    if not cells:
        return None
    name = text(row.get("name"))
    shown = table(f"{name}: advantage of each group", ("Group", "Base", "Tuned"), cells)
    return fold(f"{name}: advantage of each group over the mean, nats a token", shown)


def _gap(base: Figure | None, tuned: Figure | None) -> str:
    if base is None or tuned is None:
        return ""
    change = abs(tuned.value) - abs(base.value)
    apart = tuned.low is not None and not (tuned.low <= base.value <= (tuned.high or tuned.low))
    return "no clear change" if not apart else ("wider" if change > 0 else "narrower")


def unmeasured_section(record: Record) -> Markup | None:
    """What an evaluation could have measured and did not, with the command; None where all is there."""
    found, run = record.evaluation, record.argument
    if not record.has_adapter:
        return None
    rows = [
        (found.get("tasks"), "Tasks, the base beside the tuned model", f"localdpo eval {run} --tasks all"),
        (found.get("fairness"), "Gaps between groups of people", f"localdpo eval {run} --fairness all"),
    ]
    wanted = [missing(f"{what}: not measured.", command) for value, what, command in rows if not items(value)]
    if not items(found.get("blind")):
        wanted.append(missing("Blind comparison: nobody has judged. Mark a run, or two, in the terminal UI's Runs."))
    notes = found.get("notes")
    said = [missing(cut(line, 400)) for line in notes if isinstance(line, str)] if isinstance(notes, list) else []
    return section("unmeasured", "Not measured", said[:MAX_EXAMPLES], wanted) if wanted or said else None


def blind_section(record: Record) -> Markup | None:
    """Blind comparisons; None when there were none."""
    found = items(record.evaluation.get("blind"))
    if not found:
        return None
    rows: list[list[Child]] = [
        [
            f"{text(row.get('a'))} against {text(row.get('b'))}",
            *(_whole(row.get(key)) for key in ("wins", "losses", "ties")),
            figure_cell(figure(row.get("rate")), share=True, threshold=0.5),
            text(row.get("judge")),
        ]
        for row in found
    ]
    header = ("", "Wins", "Losses", "Ties", "Win rate", "Judge")
    return section("blind", "Blind comparison", table("Blind comparisons", header, rows, right=(1, 2, 3)))
