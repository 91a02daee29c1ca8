"""Events: flat JSON that reads back, files that grow, tear and are cut back under a reader."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localdpo.train.events import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    ProgressEvent,
    SampleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    event_from_json,
    event_line,
    read_events,
)
from localdpo.train.run import RunFolder

EVENTS = [
    StartEvent(run="runs/a", total_steps=9, steps_per_epoch=3, plan={"pairs": 12}),
    ProgressEvent(stage="reference", done=3, total=12, fraction=0.25),
    StepEvent(step=1, total_steps=9, eta_seconds=3.5, metrics={"loss": 0.6931, "rewards/margins": 0.0}),
    StepEvent(step=2, total_steps=9, metrics={"loss": 1 / 3}),
    EvalEvent(step=3, best=True, metrics={"eval_loss": 0.5}),
    SampleEvent(
        step=9, prompt=[{"role": "user", "content": "Hi"}], base="a", tuned="\x1b[2J", tags=["x"], base_right=None
    ),
    CheckpointEvent(step=3, path="checkpoints/step-000003", best=True),
    WarningEvent(step=3, code="moved", message="words", fix="do this"),
    EndEvent(step=9, reason="finished", adapter="runs/a/adapter", adapter_step=6, figures={"n": 1}),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: f"{event.kind}{event.step}")
def test_line_reads_back_as_the_same_event(event):
    assert event_from_json(json.loads(event_line(event))) == event


def test_line_is_flat_and_shows_no_control_characters():
    data = json.loads(event_line(EVENTS[2]))
    assert data["event"] == "step"
    assert data["rewards/margins"] == 0.0
    assert data["step"] == 1
    assert all(line.isascii() and line[:-1].isprintable() for line in map(event_line, EVENTS))


def test_a_number_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        event_line(StepEvent(metrics={"loss": float("nan")}))


def test_unknown_kinds_keys_and_wrong_types_are_passed_over():
    assert event_from_json({"event": "confetti", "step": 1}) is None
    assert event_from_json({"event": ["step"]}) is None
    event = event_from_json({"event": "step", "step": "7", "total_steps": 4, "loss": "x", "new": 2})
    assert event == StepEvent(time=event.time, step=0, total_steps=4, metrics={"new": 2})


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
_names = st.sampled_from(["step", "time", "metrics", "plan", "prompt", "tags", "best", "eta_seconds", "base"])


@given(
    kind=st.sampled_from(["start", "step", "eval", "sample", "checkpoint", "warning", "end", "progress"]),
    data=st.dictionaries(_names | st.text(), _json),
)
def test_any_object_is_an_event_or_nothing(kind, data):
    event = event_from_json({**data, "event": kind})
    assert event is not None
    assert isinstance(event.step, int)


def test_reading_goes_on_where_it_stopped_and_leaves_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [event_line(StepEvent(step=n)) for n in range(1, 4)]
    path.write_text(lines[0] + lines[1][:9])
    first = read_events(path)
    assert [event.step for event in first.events] == [1]
    path.write_text("".join(lines))
    assert [event.step for event in read_events(path, first.offset).events] == [2, 3]


def test_a_file_cut_back_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [event_line(StepEvent(step=n, time=1.0)) for n in range(1, 6)]
    path.write_text("".join(lines))
    offset = read_events(path).offset
    path.write_text("".join(lines[:2]))
    chunk = read_events(path, offset)
    assert chunk.restarted
    assert [event.step for event in chunk.events] == [1, 2]


def test_a_file_cut_back_and_grown_past_the_offset_is_read_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(event_line(StepEvent(step=1, time=1.0)))
    offset = read_events(path).offset
    path.write_text(event_line(StepEvent(step=1, time=1.0, metrics={"loss": 0.123456})) * 3)
    chunk = read_events(path, offset)
    assert chunk.restarted
    assert len(chunk.events) == 3


def test_damaged_lines_at_the_start_of_a_piece_end_nothing(tmp_path, monkeypatch):
    lines = [event_line(StepEvent(step=step)).encode() for step in range(1, 9)]
    damaged = b"\xff" * (len(lines[0]) - 1) + b"\n"
    monkeypatch.setattr("localdpo.train.run._PIECE", 2 * len(lines[0]))
    for at in range(8):
        folder = tmp_path / str(at)
        folder.mkdir()
        (folder / "metrics.jsonl").write_bytes(b"".join([*lines[:at], damaged, *lines[at + 1 :]]))
        wanted = [step for step in range(1, 9) if step != at + 1]
        assert [event.step for event in RunFolder(folder).every_event()] == wanted


def test_missing_and_damaged_files_have_what_events_they_have(tmp_path):
    assert read_events(tmp_path / "none").events == []
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\xfe\n[1]\n" + b"[" * 5000 + b"\n" + event_line(StepEvent(step=4)).encode())
    assert [event.step for event in read_events(path).events] == [4]


def test_a_long_file_comes_in_pieces(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [event_line(StepEvent(step=step, metrics={"loss": step / 3})) for step in range(1, 40)]
    path.write_text("".join(lines))
    for limit in (7, 300, 10**6):
        steps, offset = [], 0
        while chunk := read_events(path, offset, limit).events:
            steps += [event.step for event in chunk]
            offset = read_events(path, offset, limit).offset
        assert steps == list(range(1, 40))
        assert offset == path.stat().st_size
