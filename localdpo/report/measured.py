"""What the tables of a page show of eval.json: held-out pairs, drift, gaps between groups, and what is not measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from localdpo.report.formats import count, percent, plain
from localdpo.report.record import Record
from localdpo.report.values import Figure, figure, items, number, object_at
from localdpo.series import number_text

__all__ = [
    "drift_groups",
    "drift_rows",
    "eval_command",
    "gap",
    "hardest_pairs",
    "held_out_rows",
    "last_evaluation",
    "length_bins",
    "not_measured",
    "sides",
    "whole_drift",
]

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

_THRESHOLDS = {"accuracy": 0.5, "margin": 0.0}


def held_out_rows(held: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure | None, bool, float | None]]:
    """What was measured on held-out pairs: its name, the base's in words, the tuned model's, whether it is a share,
    and what it is held against.
    """
    for name, key, own, share in _HELD_OUT:
        before = figure(object_at(held, "base").get(own)) if own else None
        after = figure(held.get(key)) if key else figure(object_at(held, "tuned").get(own))
        if before is not None or after is not None:
            said = (percent(before) if share else plain(before)) if own else ""
            yield name, said, after, share, _THRESHOLDS.get(key)


def last_evaluation(record: Record) -> str:
    """The figures of the last evaluation while training, in words; empty without one."""
    if record.last_eval is None:
        return ""
    metrics = record.last_eval.metrics
    parts = [
        f"{label} {number_text(metrics[key]) if key != 'eval_rewards/accuracies' else format(metrics[key], '.0%')}"
        for label, key in (("loss", "eval_loss"), ("accuracy", "eval_rewards/accuracies"),
                           ("margin", "eval_rewards/margins"))
        if key in metrics
    ]  # fmt: skip
    return f"While training, at step {record.last_eval.step:,}: {', '.join(parts)}."


def hardest_pairs(held: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Pairs with a margin, the lowest first, and how many have one of 0 or below."""
    pairs = [
        (margin, pair) for pair in items(held.get("per_pair")) if (margin := number(pair.get("margin"))) is not None
    ]
    pairs.sort(key=lambda found: found[0])
    return [pair for _, pair in pairs], sum(margin <= 0 for margin, _ in pairs)


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
    ("Right answers", "right", percent),
    ("Distinct words (distinct-1)", "distinct_1", plain),
    ("Distinct word pairs (distinct-2)", "distinct_2", plain),
    ("Repetition", "repetition", plain),
    ("Words an answer", "words", plain),
)


def drift_groups(drift: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The sets of prompts that drift was measured on, each as one or by its groups."""
    for name, key in _SETS:
        found = object_at(drift, key)
        if "prompts" in found:
            yield name, found
        else:
            yield from ((f"{name}: {group}", part) for group, part in found.items() if isinstance(part, Mapping))


def drift_rows(group: Mapping[str, Any]) -> Iterator[tuple[str, str, Figure | str, bool]]:
    """A set's figures: name, the base's in words, the tuned model's or that in words, whether it is a share."""
    for label, key, share in _DRIFT:
        if (found := figure(group.get(key))) is not None:
            yield label, "", found, share
    for label, key, words in _STYLE:
        base, tuned = sides(group.get(key))
        if base or tuned:
            yield label, words(base), words(tuned), False


def whole_drift(drift: Mapping[str, Any]) -> list[tuple[str, Figure]]:
    """The shares that are of all answers together."""
    named = (
        ("Trained phrases in unrelated answers", "leakage"),
        ("Same answer to a reworded prompt", "robustness"),
        ("The same of the base", "robustness_base"),
    )
    return [(label, found) for label, key in named if (found := figure(drift.get(key)))]


def sides(value: object) -> tuple[Figure | None, Figure | None]:
    """The figures of the base and of the tuned model."""
    found = object_at(value)
    return figure(found.get("base")), figure(found.get("tuned"))


def gap(base: Figure | None, tuned: Figure | None) -> str:
    """What became of a gap between groups."""
    if base is None or tuned is None:
        return ""
    grown = abs(tuned.value) - abs(base.value)
    apart = tuned.low is not None and not (tuned.low <= base.value <= (tuned.high or tuned.low))
    return "no clear change" if not apart else ("wider" if grown > 0 else "narrower")


def eval_command(record: Record) -> str:
    """What evaluates the run; empty where it has no adapter."""
    return f"localdpo eval {record.argument}" if record.has_adapter else ""


def not_measured(record: Record) -> list[tuple[str, str]]:
    """What an evaluation could have measured and did not, with the command that measures it."""
    found, run = record.evaluation, record.argument
    if not record.has_adapter:
        return []
    rows = [
        (found.get("tasks"), "Tasks, the base beside the tuned model: not measured.",
         f"localdpo eval {run} --tasks all"),
        (found.get("fairness"), "Gaps between groups of people: not measured.", f"localdpo eval {run} --fairness all"),
        (found.get("blind"), "Blind comparison: nobody has judged. Mark a run, or two, in the terminal UI's Runs.", ""),
    ]  # fmt: skip
    return [(what, command) for value, what, command in rows if not items(value)]


def length_bins(plan: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """How many rows have up to how many tokens, in words, and how long a bar that is, 0 to 100."""
    bins = plan.get("lengths")
    found = [
        (most, rows)
        for pair in (bins if isinstance(bins, list) else [])
        if isinstance(pair, list) and len(pair) == 2
        for most, rows in [(number(pair[0]), number(pair[1]))]
        if most is not None and rows is not None and rows >= 0
    ][:40]
    top = max((rows for _, rows in found), default=0) or 1
    return [(f"up to {count(most)}", count(rows), round(100 * rows / top, 1)) for most, rows in found]
