"""`localdpo eval`: progress while a run is measured, then its figures in words, or as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from localdpo.console.fetch import fetch
from localdpo.console.terminal import columns, is_live, say, width
from localdpo.steps import Steps
from localdpo.text import sanitise

if TYPE_CHECKING:
    from localdpo.train.events import Event

__all__ = ["Request", "lines", "run"]

_STAGES = {
    "load": "loading the model",
    "evaluate": "scoring the held-out pairs",
    "answers": "answering",
    "divergence": "comparing with the base, token by token",
    "tasks": "tasks",
    "fairness": "fairness",
    "judge": "judging",
}
_JUDGED = 100  # prompts, where no limit is given
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line."""

    run: Path
    pairs: Path | None = None
    against: Sequence[Path] = ()
    tasks: Sequence[str] = ()
    fairness: Sequence[str] = ()
    drift: bool = True
    limit: int | None = None
    judge: str | None = None
    seed: int = 0
    json: bool = False


def run(request: Request) -> None:
    """Measure the run, write its eval.json and print. Raises LocalDPOError; Ctrl-C leaves the file as it was."""
    from localdpo.evaluate.evaluation import EvalOptions, evaluate
    from localdpo.evaluate.heldout import recipe_of
    from localdpo.train.run import RunFolder

    folder = RunFolder(request.run)
    fetch(recipe_of(folder).model)
    if request.judge is not None:
        _judge(request, request.judge)
    options = EvalOptions(
        request.pairs, request.against, request.drift, request.limit, request.tasks, request.fairness, request.seed
    )
    found = _watched(evaluate(folder, options), quiet=request.json)
    if request.json:
        print(json.dumps(found.to_json(), indent=2))
        return
    say(*lines(found.to_json()), f"written: {folder.path / 'eval.json'}")


def _judge(request: Request, judge: str) -> None:
    """Ask a model about the run and its base, then each earlier run, before any other model is in memory."""
    from localdpo.evaluate.judge import judge_run

    fetch(judge)
    for other in (None, *request.against):
        work = judge_run(
            request.run,
            judge,
            against=other,
            pairs_file=request.pairs,
            limit=request.limit or _JUDGED,
            seed=request.seed,
        )
        result = _watched(work, quiet=request.json)
        if not request.json:
            say(f"judged by {judge}: {result.sentence()}")


def _watched(work: Generator[Event, None, _Result], quiet: bool) -> _Result:
    """Run ``work``, with a line on standard error that says what it is at: one a stage where that is no terminal."""
    from localdpo.train.events import ProgressEvent

    live, before = is_live(sys.stderr), ""
    try:
        for event in (steps := Steps(work)):
            if quiet or not isinstance(event, ProgressEvent):
                continue
            text = _stage(event.stage, event.detail)
            if live:
                counted = (f"{text} ({event.done}/{event.total})" if event.total > 1 else text)[: width() - 1]
                print(f"\r\x1b[K{sanitise(counted)}", end="", file=sys.stderr, flush=True)
            elif text != before:
                before = text
                say(text, file=sys.stderr, flush=True)
        return steps.result
    finally:
        work.close()
        if live and not quiet:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _stage(stage: str, detail: str) -> str:
    name = _STAGES.get(stage, stage)
    return f"{name}: {detail}" if detail else name


def lines(found: Mapping[str, Any]) -> list[str]:
    """An eval.json in lines for people, sanitised; sections that it lacks are left out."""
    parts = [
        [f"{found['run']}, step {found['step']}, on {found['model']}"],
        _held_out(found["held_out"]),
        _drift(found["drift"]),
        _tasks(found["tasks"]),
        _fairness(found["fairness"]),
        [_blind(row) for row in found["blind"]],
        [f"not measured: {note}" for note in found["notes"]],
        list(_verdict(found["verdict"])),
    ]
    shown = [line for part in parts if part for line in (*part, "")]
    return [sanitise(line) for line in shown[:-1]]


def share_text(figure: Any) -> str:
    """A share and its interval: 83 % [64, 93]."""
    if figure is None:
        return "-"
    value, low, high = figure["value"], figure["low"], figure["high"]
    return f"{value:.0%}" if low is None else f"{value:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


def number_text(figure: Any, form: str = ".2f") -> str:
    """A number and its interval."""
    if figure is None:
        return "-"
    value, low, high = figure["value"], figure["low"], figure["high"]
    return f"{value:{form}}" if low is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _held_out(section: Mapping[str, Any] | None) -> list[str]:
    if section is None:
        return []
    base, tuned = section["base"], section["tuned"]
    rows = [
        ("loss", number_text(base["loss"], ".3f"), number_text(section["loss"], ".3f")),
        ("preferred more than before", "", share_text(section["accuracy"])),
        ("margin of rewards", "", number_text(section["margin"], "+.2f")),
        ("odds of chosen against rejected, nats", "", number_text(section["nats"], "+.1f")),
        (
            "prefers chosen, log-prob a token",
            share_text(base["preference_accuracy"]),
            share_text(tuned["preference_accuracy"]),
        ),
        (
            "prefers chosen, whole log-prob",
            share_text(base["preference_accuracy_summed"]),
            share_text(tuned["preference_accuracy_summed"]),
        ),
    ]
    for tag, figures in section["tags"].items():
        accuracy = f"{share_text(figures['accuracy'])}, margin {number_text(figures['margin'], '+.2f')}"
        rows.append((f"tag {tag} ({figures['pairs']})", "", accuracy))
    skipped = f", {section['skipped']} skipped" if section["skipped"] else ""
    found = columns((f"held-out pairs ({section['pairs']}{skipped})", "base", "tuned"), rows)
    for other in section["against"]:
        difference = other["difference"]
        found.append(
            f"against {other['run']}: accuracy {share_text(other['accuracy'])}, margin "
            f"{number_text(other['margin'], '+.2f')}; this run's margin is larger on {share_text(other['larger'])} of "
            f"the pairs, by {number_text(difference['margin'], '+.2f')}"
        )
    return found


def _drift(section: Mapping[str, Any] | None) -> list[str]:
    if section is None:
        return []
    sets = {name: section[name] for name in ("retain", "probes", "taught") if section[name] is not None}

    def row(title: str, cell: Any) -> tuple[str, ...]:
        return (title, *(cell(figures) for figures in sets.values()))

    def change(name: str, form: str) -> Any:
        return lambda figures: _change(figures[name], form)

    table = [
        row("KL to the base, nats a token", lambda f: number_text(f["kl_per_token"])),
        row("answers unchanged", lambda f: share_text(f["unchanged"])),
        row("facts kept", lambda f: f"{share_text(f['facts_kept'])} of {f['facts']}" if f["facts"] else "-"),
        row("right answers", change("right", ".0%")),
        row("distinct-1", change("distinct_1", ".2f")),
        row("distinct-2", change("distinct_2", ".2f")),
        row("repetition", change("repetition", ".1%")),
        row("words an answer", change("words", ".1f")),
    ]
    heads = [f"{name} ({figures['prompts']})" for name, figures in sets.items()]
    found = columns(("drift, base → tuned", *heads), table)
    if section["leakage"] is not None:
        said = ", ".join(section["phrases"][:5])
        found.append(
            f"leakage: {share_text(section['leakage'])} of {section['unrelated']} unrelated answers say {said}"
        )
    if section["robustness"] is not None:
        found.append(
            f"robustness: reworded prompts are answered as the prompt itself in {share_text(section['robustness'])} "
            f"(base {share_text(section['robustness_base'])})"
        )
    return found


def _change(both: Mapping[str, float | None], form: str) -> str:
    if both["base"] is None or both["tuned"] is None:
        return "-"
    return f"{both['base']:{form}} → {both['tuned']:{form}}"


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (f"{task['name']} ({task['examples']})" if first else "", name, *(number_text(measured[side], ".3f") for side in
         ("base", "tuned")))
        for task in tasks
        for first, (name, measured) in _firsts(task["metrics"])
    ]  # fmt: skip
    return columns(("task", "metric", "base", "tuned"), rows) if rows else []


def _fairness(sets: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [
        (one["name"] if first else "", title, *(number_text(one[key][side], ".3f") for side in ("base", "tuned")))
        for one in sets
        for first, (key, title) in _firsts({"gap_logp": "gap of log-probs", "gap_answers": "gap of answers"})
        if one.get(key)
    ]
    return columns(("fairness", "between groups", "base", "tuned"), rows) if rows else []


def _firsts(values: Mapping[str, Any]) -> Iterator[tuple[bool, tuple[str, Any]]]:
    return ((number == 0, item) for number, item in enumerate(values.items()))


def _blind(row: Mapping[str, Any]) -> str:
    counts = f"{row['wins']} won, {row['losses']} lost, {row['ties']} tied"
    return f"blind test, {row['b']} against {row['a']}: {share_text(row['rate'])} ({counts}; judge: {row['judge']})"


def _verdict(verdict: Mapping[str, Any]) -> Iterator[str]:
    for reason in verdict["reasons"]:
        yield f"  {reason['word']:8} {reason['text']}"
    yield f"verdict: {verdict['words']}"
