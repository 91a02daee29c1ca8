"""The workspace and the trainer under the UI: real folders, real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from localdpo_tui.services import trainer
from localdpo_tui.services.workspace import Workspace
from training import workspace as training_workspace

from localdpo.errors import InputError
from localdpo.recipe import load_recipe
from localdpo.train.run import RunFolder

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tui")])}


def wait_for(what: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# -- the workspace


def test_an_empty_folder_begins_with_the_example_or_blank(tmp_path):
    example, blank = Workspace(tmp_path / "example"), Workspace(tmp_path / "blank")
    for workspace in (example, blank):
        assert workspace.is_empty()
        workspace.check()
    made = example.create_example()
    assert made
    assert not example.is_empty()
    assert "athene.jsonl" in [path.name for path in example.pair_files()]
    assert example.create_example() == []
    pairs, recipe = blank.create_blank()
    assert blank.pair_files() == [pairs]
    assert blank.recipes() == [recipe]
    assert len(recipe.read_text().splitlines()) == 2
    assert load_recipe(recipe, check_files=False).data.train == pairs
    pairs.write_text("mine\n")
    blank.create_blank()
    assert pairs.read_text() == "mine\n"


def test_what_belongs_to_a_workspace(tmp_path):
    workspace = Workspace(tmp_path)
    for name in ("b.jsonl", "a.jsonl", ".a.jsonl.lock", ".hidden.jsonl", "note.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "c.jsonl").write_text("")
    (tmp_path / "pairs" / "folder.jsonl").mkdir()
    (tmp_path / "r.yml").write_text("")
    assert [workspace.relative(path) for path in workspace.pair_files()] == ["pairs/c.jsonl", "a.jsonl", "b.jsonl"]
    assert [path.name for path in workspace.recipes()] == ["r.yml"]
    assert workspace.runs() == []
    assert workspace.relative("/else/where") == "/else/where"
    with pytest.raises(InputError, match="this is a file"):
        Workspace(tmp_path / "a.jsonl").check()
    with pytest.raises(InputError, match="no such folder"):
        Workspace(tmp_path / "no" / "where").check()


def test_what_the_ui_remembers(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.state() == {}
    workspace.remember(place="chat", row=5)
    workspace.remember(row=6, file="pairs/a.jsonl")
    assert Workspace(tmp_path).state() == {"place": "chat", "row": 6, "file": "pairs/a.jsonl"}
    workspace.remember(file=None)
    assert workspace.state() == {"place": "chat", "row": 6}
    assert (tmp_path / ".localdpo" / ".gitignore").read_text() == "*\n"
    for broken in (b"{", b"[]", b"\xff", b'{"a": ' * 100_000, b" " * 2_000_000):
        (tmp_path / ".localdpo" / "ui.json").write_bytes(broken)
        assert workspace.state() == {}
    workspace.remember(place="pairs")
    assert workspace.state() == {"place": "pairs"}


# -- the trainer


@pytest.fixture
def recipe(tmp_path):
    training_workspace(tmp_path)
    path = tmp_path / "recipes" / "a.yaml"
    path.parent.mkdir()
    path.write_text(
        "model: ../model\noutput_dir: runs/a\ndata: {train: ../pairs.jsonl, max_length: 128}\n"
        "lora: {r: 2, num_layers: 1}\ntrain: {num_train_epochs: 5000, per_device_train_batch_size: 8}\n"
    )
    return path


START = """
import sys, time
from localdpo_tui.services.trainer import start
trainer = start(sys.argv[1], sys.argv[2])
print(trainer.pid, flush=True)
time.sleep(600)
"""


def test_training_goes_on_when_its_ui_is_gone_and_obeys_another(recipe, tmp_path):
    viewer = subprocess.Popen(
        [sys.executable, "-c", START, str(recipe), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    assert viewer.stdout is not None
    pid = int(viewer.stdout.readline())
    run = RunFolder(tmp_path / "runs" / "a")
    try:
        os.killpg(viewer.pid, signal.SIGHUP)  # what a terminal that closes does to all of its session
        viewer.communicate()
        wait_for(lambda: (status := run.status()) is not None and status.state == "training" and status.step > 0)
        assert run.request("pause")
        wait_for(lambda: run.status().state == "paused")
        assert run.request("resume")
        wait_for(lambda: run.status().state == "training")
        assert run.request("stop")
        wait_for(lambda: not run.is_running())
        assert run.status().state == "stopped"
        assert run.events().events[0].kind == "start"
        (log,) = (tmp_path / ".localdpo" / "logs").iterdir()
        assert log.name.startswith("train-a-")
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_recipe_that_cannot_be_trained_is_told_at_once(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "EARLY_SECONDS", 120)  # a busy machine takes its time to start a program
    recipe.write_text("model: ../model\ndata: {train: ../nosuch.jsonl}\n")
    with pytest.raises(InputError, match=r"nosuch\.jsonl"):
        trainer.start(recipe, tmp_path)
    with pytest.raises(InputError, match=r"train\.max_steps"):
        trainer.start(recipe, tmp_path, overrides=["train.max_steps=-5"])


def test_a_trainer_that_was_killed_says_so(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    child = trainer.Trainer(process, log)
    assert child.exit_code is None
    assert child.error() is None
    process.kill()
    process.wait()
    assert "signal 9" in str(child.error())


def test_old_logs_go(tmp_path):
    paths = []
    for _ in range(25):
        paths.append(trainer._new_log(tmp_path, Path("r.yaml")))
        paths[-1].write_text("")
    left = list((tmp_path / ".localdpo" / "logs").iterdir())
    assert len(left) == 20
    assert paths[-1] in left
