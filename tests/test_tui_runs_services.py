"""Runs without a screen: what a table says of them, their curves, keeping one, the trash, and a live run's view."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from localdpo_tui.services import kept, run_list, viewer
from localdpo_tui.services.kept import Kept
from localdpo_tui.services.run_view import CHARTS, RunView, read_chunk, state_sign

from localdpo.errors import EnvironmentFault, InputError
from localdpo.evaluate.evidence import verdict_of_run
from localdpo.evaluate.verdict import Reason, Verdict
from localdpo.train.events import (
    CheckpointEvent,
    EndEvent,
    EvalEvent,
    SampleEvent,
    StartEvent,
    StepEvent,
    WarningEvent,
    event_line,
)
from localdpo.train.run import ActiveRun, RunFolder, acquire

FIGURES = {
    "groups": {
        "identity": {"probes": 4, "judged": 4, "base_right": 0, "tuned_right": 3, "kept": 0},
        "everyday": {"probes": 5, "judged": 5, "base_right": 4, "tuned_right": 4, "kept": 3},
    },
    "lines": ["identity: 3 of 4 (75%) answers say Athene"],
}


def metrics(step):
    return {
        "loss": 1 / step,
        "rewards/margins": step / 10,
        "rewards/accuracies": 1.0,
        "rewards/chosen": 0.1,
        "rewards/rejected": -0.1 * step,
        "learning_rate": 1e-4,
        "tokens_per_second": 100.0,
        "retain/drift": 0.01 * step,
    }


def make_run(path: Path, steps: int = 8, state: str = "finished", **info) -> RunFolder:
    """A run folder as a trainer leaves it, without a model."""
    path.mkdir(parents=True)
    recipe = {"model": "tiny", "dpo": {"beta": info.pop("beta", 0.1)}}
    (path / "run.json").write_text(
        json.dumps(
            {
                "created": 1.0,
                "recipe": recipe,
                "model": {"spec": "tiny", "fingerprint": "f"},
                "id": os.urandom(8).hex(),
                **info,
            }
        )
    )
    events = [StartEvent(total_steps=steps, plan={"train_pairs": 24}), EvalEvent(metrics={"eval_loss": 2.0})]
    for step in range(1, steps + 1):
        events.append(StepEvent(step=step, total_steps=steps, metrics=metrics(step)))
        if step % 4 == 0:
            accuracy = step / (steps + 1)
            events.append(EvalEvent(step=step, metrics={"eval_loss": 1 / step, "eval_rewards/accuracies": accuracy}))
    if state == "finished":
        events.append(EndEvent(step=steps, reason="finished", message="All done.", seconds=90.0, figures=FIGURES))
    (path / "metrics.jsonl").write_text("".join(map(event_line, events)))
    status = {"state": state, "step": steps, "total_steps": steps, "adapter_step": 4}
    (path / "status.json").write_text(json.dumps(status))
    (path / "adapter").mkdir()
    (path / "adapter" / "adapter_config.json").write_text("{}")
    return RunFolder(path)


def test_a_row_says_what_the_folder_holds(tmp_path):
    row = run_list.read_row(make_run(tmp_path / "a"))
    assert (row.name, row.state, row.step, row.pairs, row.model) == ("a", "finished", 8, 24, "tiny")
    assert row.accuracy == pytest.approx(4 / 9)  # that of the published step, not of the last
    assert row.held_out_loss == 0.25
    assert (row.retained, row.taught) == ((3, 4), (3, 4))
    assert row.retain_logp == pytest.approx(-0.08)
    assert row.seconds == 90.0
    assert row.lines == ("identity: 3 of 4 (75%) answers say Athene",)
    assert row.adapter
    assert not row.resumable
    assert row.bytes == sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file())


def test_a_row_has_the_verdict_on_the_run_as_it_is_now(tmp_path):
    run = make_run(tmp_path / "a")
    assert run_list.read_row(run).verdict == verdict_of_run(run)
    assert run_list.read_row(run).verdict.short == "not, kept"
    run.status_file.write_text('{"state": "diverged", "step": 8, "total_steps": 8}')
    assert run_list.read_row(run).verdict.words.startswith("not learned: training diverged")
    run.status_file.write_text('{"state": "training", "step": 8, "total_steps": 8}')
    lock = acquire(run.path)
    assert run_list.read_row(run).verdict is None
    lock.release()


@pytest.mark.parametrize("damage", ["metrics.jsonl", "status.json", "adapter/adapter_config.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe{", b"[" * 5000, b'{"state": 3, "event": "end", "figures": 7}\n'])
def test_a_damaged_folder_gives_a_row_all_the_same(tmp_path, damage, content):
    run = make_run(tmp_path / "a")
    (run.path / damage).write_bytes(content)
    row = run_list.read_row(run)
    assert row.name == "a"
    assert row.model == "tiny"


def test_a_run_that_was_killed_is_interrupted_and_can_go_on(tmp_path):
    run = make_run(tmp_path / "a", state="training")
    (run.path / "status.json").write_text(json.dumps({"state": "training", "step": 3, "total_steps": 8}))
    row = run_list.read_row(run)
    assert row.state == "interrupted"
    assert row.resumable
    assert row.retained is None
    assert row.accuracy == pytest.approx(8 / 9)


def test_the_end_of_a_long_file_is_enough(tmp_path):
    run = make_run(tmp_path / "a", steps=3000)
    assert run.metrics_file.stat().st_size > 3 * run_list._TAIL_BYTES
    row = run_list.read_row(run)
    assert row.retain_logp == pytest.approx(-30.0)
    assert row.retained == (3, 4)
    assert row.pairs == 24


def test_rows_are_the_newest_first(tmp_path):
    for name, created in (("old", 1.0), ("new", 3.0), ("middle", 2.0)):
        make_run(tmp_path / name, created=created)
    (tmp_path / "notes").mkdir()
    assert [row.name for row in run_list.read_rows(tmp_path)] == ["new", "middle", "old"]
    assert run_list.read_rows(tmp_path / "nowhere") == []


def test_two_runs_meet_in_each_chart(tmp_path):
    first = run_list.curves(make_run(tmp_path / "a", steps=8))
    second = run_list.curves(make_run(tmp_path / "b", steps=6))
    models = run_list.compared([first, second])
    assert [model.title for model in models] == [spec.title for spec in CHARTS]
    loss = models[0]
    assert [line.label for line in loss.lines] == ["A a", "B b", "A held out", "B held out"]
    assert [line.series.count for line in loss.lines] == [8, 6, 3, 2]
    assert loss.readout() == "step 8: A a 0.125  B b 0.167  A held out 0.125  B held out 0.25"
    rewards = models[3]
    assert [line.label for line in rewards.lines] == ["A chosen", "A rejected", "B chosen", "B rejected"]


def test_figures_are_compared_by_name(tmp_path):
    first = run_list.read_row(make_run(tmp_path / "a"))
    second = run_list.read_row(make_run(tmp_path / "b", state="stopped"))
    rows = {name: (left, right) for name, left, right in run_list.compared_figures(first, second)}
    assert rows["held-out accuracy"] == ("44%", "44%")
    assert rows["right answers kept"] == ("3/4", "")
    assert rows["time"] == ("1 min 30 s", "")


def test_differences_name_key_and_both_values():
    before = {"model": "m", "dpo": {"beta": 0.1}, "train": {"max_steps": 3}}
    after = {"model": "m", "dpo": {"beta": 0.2}, "train": {"max_steps": 3, "seed": 1}}
    assert run_list.recipe_differences(before, after) == [("dpo.beta", 0.1, 0.2), ("train.seed", None, 1)]


def test_keeping_and_rolling_back(tmp_path):
    for name in "abc":
        make_run(tmp_path / name)
    assert kept.read_kept(tmp_path) == Kept()
    with pytest.raises(InputError, match="No earlier run was kept"):
        kept.roll_back(tmp_path)
    for name in "abcb":
        kept.keep_run(tmp_path, name)
    assert kept.read_kept(tmp_path) == Kept("b", ("a", "c"))
    assert kept.keep_run(tmp_path, "b") == Kept("b", ("a", "c"))
    run_list.delete_run(RunFolder(tmp_path / "c"), tmp_path / "trash")
    assert kept.roll_back(tmp_path) == Kept("a", ())


def test_a_kept_run_that_is_set_aside_stays_the_kept_one(tmp_path):
    make_run(tmp_path / "a")
    kept.keep_run(tmp_path, "a")
    os.rename(tmp_path / "a", tmp_path / "a.1")
    make_run(tmp_path / "a")
    assert kept.read_kept(tmp_path).current == "a.1"


def test_a_run_without_an_adapter_cannot_be_kept(tmp_path):
    (make_run(tmp_path / "a").adapter / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="has no adapter to keep"):
        kept.keep_run(tmp_path, "a")


@pytest.mark.parametrize("text", ["", "[]", '{"current": 3, "before": "x"}', '{"before": [1, "a"]}'])
def test_any_choice_file_can_be_read(tmp_path, text):
    (tmp_path / "current.json").write_text(text)
    assert kept.read_kept(tmp_path).current is None


def test_a_deleted_run_comes_back_whole_under_a_free_name(tmp_path):
    run = make_run(tmp_path / "a")
    before = {path.relative_to(run.path): path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    trashed = run_list.delete_run(run, tmp_path / "trash")
    assert run_list.read_rows(tmp_path) == []
    assert run_list.folder_size(tmp_path / "trash") > 0
    make_run(tmp_path / "a")
    restored = run_list.restore_run(trashed, tmp_path)
    assert restored == tmp_path / "a.1"
    assert {p.relative_to(restored): p.read_bytes() for p in restored.rglob("*") if p.is_file()} == before
    run_list.empty_trash(tmp_path / "trash")
    assert run_list.folder_size(tmp_path / "trash") == 0


def test_a_run_that_trains_is_not_deleted(tmp_path):
    run = make_run(tmp_path / "a")
    with ActiveRun(run.path, acquire(run.path)), pytest.raises(EnvironmentFault, match="Stop it first"):
        run_list.delete_run(run, tmp_path / "trash")
    assert run.path.is_dir()


def take_all(view):
    while True:
        chunk, status = read_chunk(view.run, view.offset)
        view.take(chunk, status)
        if not chunk.events:
            return


def test_a_view_gathers_charts_notes_and_answers(tmp_path):
    run = make_run(tmp_path / "a")
    said = [
        WarningEvent(step=8, code="loss-zero", message="Learned by heart.", fix="Lower it."),
        CheckpointEvent(step=4, path="checkpoints/step-000004"),
        CheckpointEvent(step=8, path="checkpoints/step-000008"),
        SampleEvent(step=8, prompt=[{"role": "user", "content": "hi"}], base="b", tuned="t\x1b]52;c;x\x07"),
    ]
    with run.metrics_file.open("a") as file:
        file.writelines(map(event_line, said))
    view = RunView(run)
    take_all(view)
    counts = {model.title: [line.series.count for line in model.lines] for model in view.charts}
    assert counts["Loss"] == [8, 3]
    assert counts["Accuracy"] == [8, 2]
    assert counts["Rewards"] == [8, 8]
    assert [note.text for note in view.notes if note.kind == "warning"] == ["Learned by heart. Lower it."]
    assert [note.step for note in view.notes if note.kind == "checkpoint"] == [8]
    assert view.samples[-1].tuned.startswith("t")
    assert view.headline() == "✓ finished, step 8 of 8"
    assert view.figures().startswith("loss 0.125  margin +0.80  accuracy 100%")


def test_a_view_of_a_run_cut_back_shows_no_step_twice(tmp_path):
    run = make_run(tmp_path / "a")
    view = RunView(run)
    take_all(view)
    view.charts[0].cursor = 3
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text("".join(lines[:6]))
    take_all(view)
    assert view.charts[0].lines[0].series.bounds().high == 4
    assert view.charts[0].cursor == 3
    assert view.end is None


def test_a_run_in_every_state_has_a_sign_and_a_headline(tmp_path):
    run = make_run(tmp_path / "a")
    states = ("starting", "training", "paused", "finishing", "finished", "stopped", "diverged", "failed")
    signs = {state: state_sign(state) for state in states}
    assert len(set(signs.values())) >= 6
    lock = acquire(run.path)
    try:
        for state in states:
            values = {"state": state, "stage": "load", "fraction": 0.5, "step": 3, "total_steps": 8, "message": "why"}
            run.status_file.write_text(json.dumps({**values, "eta_seconds": 70.0}))
            view = RunView(run)
            take_all(view)
            headline = view.headline()
            assert headline.startswith(f"{signs[state]} {state}")
            assert ("1 min 10 s left" in headline) == (state == "training")
            assert ("loading the model 50%" in headline) == (state in ("starting", "finishing"))
            assert ("why" in headline) == (state in ("diverged", "failed"))
            assert view.running == (state in states[:4])
    finally:
        lock.release()


def test_no_run_is_no_error(tmp_path):
    view = RunView(RunFolder(tmp_path / "nowhere"))
    take_all(view)
    assert (view.state, view.headline(), view.figures()) == ("new", "no run yet", "")


def test_a_report_is_opened_only_where_there_is_a_screen(tmp_path, monkeypatch):
    report = tmp_path / "report.html"
    with pytest.raises(InputError, match="no such file"):
        viewer.open_file(report)
    report.write_text("<p>hi")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    assert not viewer.open_file(report)
    opened = tmp_path / "opened"
    opener = tmp_path / "xdg-open"
    opener.write_text(f'#!/bin/sh\nprintf %s "$1" > {opened}.part && mv {opened}.part {opened}\n')
    opener.chmod(0o755)
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    started = []
    real = viewer.subprocess.Popen
    monkeypatch.setattr(viewer.subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)))
    assert viewer.open_file(report)
    assert started[0].wait(30) == 0
    assert opened.read_text() == str(report)


def test_a_divergence_is_named_so_and_a_change_of_log_probs_is_not_called_one(tmp_path):
    run = make_run(tmp_path / "a")
    reason = Reason("kept", "KL a token", 0.07, 0.05, 0.09, 0.3, "0.07 nats a token away from the base")
    row = replace(run_list.read_row(run), retain_logp=0.37, verdict=Verdict("learned", "kept", "", (reason,)))
    figures = {name: value for name, value, _ in run_list.compared_figures(row, row)}
    assert figures["KL (nats a token)"] == "0.07"
    assert figures["retained log-prob"] == "+0.37 nats a token"
    assert not [name for name in figures if "drift" in name]
    unmeasured = run_list.compared_figures(*(replace(row, verdict=None) for _ in range(2)))
    assert "KL (nats a token)" not in [name for name, *_ in unmeasured]
