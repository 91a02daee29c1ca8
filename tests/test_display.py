"""What a run looks like: on a terminal, in a pipe, and as JSON, from made-up events."""

from __future__ import annotations

import io
import json

import pytest

from localdpo.console import terminal
from localdpo.console.display import JsonDisplay, LiveDisplay, PlainDisplay, make_display
from localdpo.console.results import chosen_rows
from localdpo.train.events import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    Event,
    ProgressEvent,
    SampleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def step(number: int, total: int) -> StepEvent:
    metrics = {
        "loss": 0.7 / number,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.1 * number,
        "tokens_per_second": 412.3,
        "step_seconds": 1.25,
    }
    return StepEvent(step=number, total_steps=total, eta_seconds=float(total - number), metrics=metrics)


def sample(question: str, right: bool | None = True, tag: str = "identity", tuned: str = "Athene") -> SampleEvent:
    prompt = [{"role": "user", "content": question}]
    return SampleEvent(
        step=4, prompt=prompt, base="SmolLM", tuned=tuned, tags=[tag], base_right=False, tuned_right=right
    )


def a_run(total: int = 4) -> list[Event]:
    return [
        ProgressEvent(stage="load"),
        *(ProgressEvent(stage="reference", done=n, total=8, fraction=n / 8) for n in range(9)),
        StartEvent(total_steps=total, steps_per_epoch=2),
        *(step(n, total) for n in range(1, total + 1)),
        EvalEvent(step=total, best=True, metrics={"eval_loss": 0.25, "eval_rewards/accuracies": 1.0}),
        WarningEvent(step=total, message="two \x1b[31mrows", where="p.jsonl:3", fix="Look."),
        CheckpointEvent(step=total, path="checkpoints/step-000004"),
        sample("Who are you?"),
        EndEvent(step=total, reason="finished", adapter="runs/x/adapter", adapter_step=total, seconds=75),
    ]


def plain(events: list[Event]) -> list[str]:
    out = io.StringIO()
    with PlainDisplay(out) as display:
        for event in events:
            display.show(event)
    return out.getvalue().splitlines()


def test_a_pipe_gets_lines_without_escapes():
    lines = plain(a_run())
    assert not [line for line in lines if "\x1b" in line or "\r" in line]
    assert lines[:2] == ["loading the model", "scoring the answers with the reference (8)"]
    assert "step 1/4  loss 0.7000  accuracy 0.50  margin +0.10  412 tok/s  1.25 s/step  3 s left" in lines
    assert "step 4  held out: loss 0.2500  accuracy 1.00  (best so far)" in lines
    assert "warning: p.jsonl:3: two ␛[31mrows Look." in lines
    assert "adapter (step 4): runs/x/adapter" in lines


def test_a_long_run_does_not_flood_a_log():
    lines = [line for line in plain([step(n, 3000) for n in range(1, 3001)]) if line.startswith("step ")]
    assert 50 <= len(lines) <= 65
    assert lines[0].startswith("step 1/")
    assert lines[-1].startswith("step 3000/")


def test_json_is_one_event_a_line_and_nothing_else(capsys: pytest.CaptureFixture[str]):
    out = io.StringIO()
    with JsonDisplay(out) as display:
        for event in a_run():
            display.show(event)
        display.notice("stopping")
    rows = [json.loads(line) for line in out.getvalue().splitlines()]
    assert {"progress", "start", "step", "eval", "warning", "checkpoint", "sample", "end"} == {
        row["event"] for row in rows
    }
    assert capsys.readouterr() == ("", "stopping\n")


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_a_terminal_gets_it_all_at_any_width(columns: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    with make_display(False, out) as display:
        assert isinstance(display, LiveDisplay)
        for event in a_run():
            display.show(event)
    text = out.getvalue()
    for expected in ("held out", "Athene", "SmolLM", "finished", "1 min 15 s"):
        assert expected in text
    assert "\x1b[31mrows" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


@pytest.mark.parametrize(("term", "tty"), [("dumb", True), ("xterm", False)])
def test_no_live_display_without_a_capable_terminal(term: str, tty: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", term)
    assert isinstance(make_display(False, Terminal() if tty else io.StringIO()), PlainDisplay)


def test_leaving_abruptly_gives_the_cursor_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    LiveDisplay(out).leave("left")
    assert out.getvalue().endswith("\x1b[?25hleft\n")


def test_what_went_wrong_comes_first_and_the_rest_is_counted():
    samples = [sample(f"q{n}", right=n % 8 != 0) for n in range(40)]
    shown = [row.prompt[0]["content"] for row in chosen_rows(samples)]
    assert shown == ["q0", "q8", "q16", "q24", "q32", "q1", "q2", "q3", "q4", "q5", "q6"]
    lines = plain([*samples, EndEvent(reason="finished")])
    assert any("29 more in samples.jsonl" in line for line in lines)


def test_an_everyday_answer_that_was_wrong_before_has_not_gone_wrong():
    samples = [sample(f"q{n}", right=n != 3, tag="everyday") for n in range(5)]
    assert [row.prompt[0]["content"] for row in chosen_rows(samples)] == ["q0", "q1", "q2", "q3", "q4"]


def test_the_figures_stand_below_the_table_and_a_diverged_run_has_none():
    figures = {"lines": ["identity: 23 of 24 (96%) answers say Athene"]}
    assert plain([EndEvent(reason="finished", figures=figures)])[1] == figures["lines"][0]
    assert plain([EndEvent(reason="diverged", message="not finite")]) == []


def test_an_answer_cannot_break_the_table():
    lines = plain([sample("q\n\nq", tuned="a\nb\x9b31m" + "x" * 500), EndEvent(reason="finished")])
    tuned = next(line for line in lines if "tuned:" in line)
    assert "a b<U+009B>31m" in tuned
    assert tuned.endswith("…")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (25e9, "25.0 GB"), (3e12, "3.0 TB")],
)
def test_bytes(value: float, text: str):
    assert terminal.bytes_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(950, "950"), (4_884_480, "4.9M"), (134_515_008, "135M"), (8e9, "8.0B")])
def test_counts(value: int, text: str):
    assert terminal.count_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(45.4, "45 s"), (125, "2 min 05 s"), (11_400, "3 h 10 min")])
def test_durations(value: float, text: str):
    assert terminal.duration_text(value) == text


def test_columns_align():
    assert terminal.columns(("name", "size"), [("a", "10"), ("long", "5")], right=(1,)) == [
        "name  size",
        "a       10",
        "long     5",
    ]


def test_sparkline_scales_to_its_own_range():
    assert terminal.sparkline([0, 1, 2, 3]) == "▁▃▆█"
    assert terminal.sparkline([5, 5]) == "▁▁"
    assert terminal.sparkline([]) == ""
    assert len(terminal.sparkline(range(100), 24)) == 24
