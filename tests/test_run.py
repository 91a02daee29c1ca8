"""The run folder: one trainer, any number of viewers, nothing lost, nothing resumed that changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from localdpo.errors import EnvironmentFault, InputError
from localdpo.recipe import Recipe, load_recipe
from localdpo.train.events import EndEvent, ProgressEvent, SampleEvent, StepEvent
from localdpo.train.run import Control, RunFolder, acquire, find_runs
from localdpo.train.snapshot import DataFile, copies, open_again, open_new

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return Recipe.model_validate(
        {"model": "tiny", "output_dir": tmp_path / "runs" / "a", "data": {"train": tmp_path / "pairs.jsonl"}}
    )


def _files(recipe):
    return {"data.train": DataFile.of("data.train", recipe.data.train)}


def _start(recipe):
    return open_new(recipe, _files(recipe))


def _changed(recipe, **train):
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


@contextmanager
def _other_process(code, *arguments):
    """A real second process that runs ``code`` and says "ready"; killed on leaving."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.communicate()


HOLD = """
import sys, pathlib
from localdpo.train.run import ActiveRun, acquire
path = pathlib.Path(sys.argv[1])
run = ActiveRun(path, acquire(path))
run.set_status(state="training", step=3)
print("ready", flush=True)
sys.stdin.read()
"""


def test_new_run_holds_its_recipe_and_data(recipe, tmp_path):
    with _start(recipe).run as run:
        assert run.pairs_file.read_bytes() == (tmp_path / "pairs.jsonl").read_bytes()
        assert load_recipe(run.recipe_file) == recipe
        assert run.info()["files"]["data.train"]["sha256"] == _files(recipe)["data.train"].sha256
        assert run.status().state == "starting"
        assert run.is_running()
        assert copies(run) == {"data.train": run.pairs_file}
    assert not RunFolder(recipe.output_dir).is_running()


def test_the_module_never_loads_mlx():
    code = "import sys, localdpo.train.run, localdpo.train.snapshot, localdpo.train.events as e; "
    code += "sys.exit(any(name.split('.')[0] == 'mlx' for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_second_trainer_is_told_who_is_there(recipe):
    _start(recipe).run.__exit__(None, None, None)
    with _other_process(HOLD, recipe.output_dir) as process:
        assert RunFolder(recipe.output_dir).status().state == "training"
        for again in (open_new, open_again):
            with pytest.raises(EnvironmentFault, match=f"another trainer .process {process.pid}"):
                again(recipe, _files(recipe))


def test_lock_of_a_killed_trainer_is_taken_over(recipe):
    _start(recipe).run.__exit__(None, None, None)
    with _other_process(HOLD, recipe.output_dir):
        pass
    folder = RunFolder(recipe.output_dir)
    assert folder.lock_file.exists()
    assert not folder.is_running()
    assert folder.status().state == "interrupted"
    with open_again(recipe, _files(recipe)).run as run:
        assert run.current.attempt == 1


@pytest.mark.parametrize("fault", [PermissionError(13, "denied"), OSError(95, "not supported")])
def test_a_lock_that_says_nothing_is_no_trainer(recipe, monkeypatch, fault):
    """That of another user, or on a file system without locks: then its process is looked for."""
    with _start(recipe).run as run:
        run.set_status(state="training")
        folder = RunFolder(recipe.output_dir)

        def refuse(*_):
            raise fault

        monkeypatch.setattr("localdpo.train.run.fcntl.flock", refuse)
        assert folder.is_running(), "this process is its trainer, and alive"
        status = json.loads(folder.status_file.read_text())
        with _other_process("print('ready', flush=True)") as gone:
            pass
        gone.wait()
        for change in ({"pid": gone.pid}, {"host": "another"}, {"state": "finished"}, {"pid": "x"}):
            folder.status_file.write_text(json.dumps(status | change))
            assert not folder.is_running(), change
        monkeypatch.undo()
        folder.status_file.write_text(json.dumps(status))
        assert folder.is_running()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users")
def test_the_lock_of_another_user_is_asked_for_its_process(recipe):
    """The lock is a real file of mode 0600, held by a trainer, and whoever looks may not open it."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        elsewhere = recipe.model_copy(update={"output_dir": place / "a"})
        with open_new(elsewhere, _files(recipe)).run as run:
            run.set_status(state="training")
            run.status_file.chmod(0o644)
            os.seteuid(65534)
            try:
                with pytest.raises(PermissionError):
                    run.lock_file.open("rb")
                assert RunFolder(place / "a").is_running()
                os.seteuid(0)
                run.finish("stopped")
                run.status_file.chmod(0o644)
                os.seteuid(65534)
                assert not RunFolder(place / "a").is_running()
            finally:
                os.seteuid(0)


def test_looking_neither_blocks_a_trainer_nor_writes(recipe):
    with _start(recipe).run:
        pass
    folder = RunFolder(recipe.output_dir)
    before = sorted((entry.name, entry.stat().st_mtime_ns) for entry in folder.path.iterdir())
    assert not folder.is_running()
    assert not folder.request("stop")
    assert sorted((entry.name, entry.stat().st_mtime_ns) for entry in folder.path.iterdir()) == before
    acquire(folder.path).release()


def test_an_earlier_run_is_set_aside_whole(recipe):
    for step in (1, 2, 3):
        opened = _start(recipe)
        with opened.run as run:
            run.log(StepEvent(step=step))
    names = [folder.path.name for folder in find_runs(recipe.output_dir.parent)]
    assert names == ["a", "a.1", "a.2"]
    assert opened.set_aside.name == "a.2"
    first = RunFolder(recipe.output_dir.with_name("a.1"))
    assert [event.step for event in first.events().events] == [1]
    assert first.info()["id"] != run.info()["id"]


def test_a_run_that_came_to_nothing_makes_room(recipe):
    with pytest.raises(RuntimeError), _start(recipe).run as run:
        raise RuntimeError("no model")
    assert run.status().state == "failed"
    assert run.status().message == "no model"
    opened = _start(recipe)
    with opened.run:
        assert opened.set_aside is None
    assert len(find_runs(recipe.output_dir.parent)) == 1


def test_a_folder_with_other_files_is_refused_and_untouched(recipe):
    recipe.output_dir.mkdir(parents=True)
    (recipe.output_dir / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"other files .thesis\.txt. and no run"):
        _start(recipe)
    assert [entry.name for entry in recipe.output_dir.iterdir()] == ["thesis.txt"]


def test_a_log_of_the_starting_process_is_no_stranger(recipe):
    recipe.output_dir.mkdir(parents=True)
    (recipe.output_dir / "train.log").write_text("starting\n")
    with _start(recipe).run as run:
        assert (run.path / "train.log").read_text() == "starting\n"


def test_read_only_output_folder_is_an_environment_fault(recipe, monkeypatch):
    real = os.mkdir

    def refuse(path, *args, **kwargs):
        if "runs" in str(path):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(EnvironmentFault, match=r"Read-only file system.*choose another folder"):
        _start(recipe)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_output_folder_without_permission(recipe, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(EnvironmentFault):
        _start(recipe.model_copy(update={"output_dir": locked / "a"}))


def test_too_little_space_is_said_before_anything_is_made(recipe, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(EnvironmentFault, match="MB are needed"):
        _start(recipe)
    assert not recipe.output_dir.exists()


def test_resume_needs_a_run(recipe):
    with pytest.raises(InputError, match="no run here to resume"):
        open_again(recipe, _files(recipe))


def test_resume_names_every_difference(recipe, tmp_path):
    _start(recipe).run.__exit__(None, None, None)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    other = _changed(recipe, learning_rate=3e-4, max_steps=5).model_copy(update={"seed": 4})
    with pytest.raises(InputError) as info:
        open_again(other, _files(other))
    text = str(info.value)
    assert [problem.where for problem in info.value.problems] == ["seed", "train.learning_rate", "data.train"]
    assert "train.learning_rate: is 0.0003, and was 0.0001 when this run was started" in text
    assert "pairs.jsonl" in text


def test_resume_may_be_longer_and_leaner_but_not_shorter(recipe):
    _start(_changed(recipe, max_steps=10)).run.__exit__(None, None, None)
    with open_again(_changed(recipe, max_steps=12, memory="lean", save_steps=1), _files(recipe)).run:
        pass
    with pytest.raises(
        InputError, match=r"train\.max_steps: is 8, and this run was started with 12\. A resume can only raise"
    ):
        open_again(_changed(recipe, max_steps=8), _files(recipe))


def test_settings_that_came_with_a_later_version_are_no_difference(recipe):
    with _start(recipe).run as run:
        pass
    info = run.info()
    del info["recipe"]["dpo"]["simpo_gamma"]
    info["recipe"]["dpo"]["forgotten"] = 3
    run.info_file.write_text(json.dumps(info))
    with open_again(recipe, _files(recipe)).run:
        pass


def test_resume_notices_a_damaged_copy(recipe):
    with _start(recipe).run as run:
        pass
    run.pairs_file.write_text("{}")
    with pytest.raises(InputError, match="own copy of its data is missing or changed"):
        open_again(recipe, _files(recipe))


def test_another_model_is_refused_on_resume(recipe):
    with _start(recipe).run as run:
        run.bind_model("tiny", "a" * 64)
        run.bind_model("tiny", "a" * 64)
        with pytest.raises(InputError, match="not the model this run was started with"):
            run.bind_model("tiny", "b" * 64)


def test_metrics_are_appended_and_cut_back(recipe):
    with _start(recipe).run as run:
        run.log(StepEvent(step=1))
        mark = run.metrics_bytes
        run.log(StepEvent(step=2))
        run.log(SampleEvent(step=2, tuned="hi"))
        assert run.cut_metrics(mark)
        run.log(EndEvent(step=1, reason="stopped"))
        assert not run.cut_metrics(10**9)
        assert [event.kind for event in run.events().events] == ["step", "end"]
        assert [sample.tuned for sample in run.samples()] == ["hi"]


def test_progress_is_in_the_status_alone(recipe):
    with _start(recipe).run as run:
        run.log(ProgressEvent(stage="load", fraction=0.5))
        run.finish("finished", step=4)
        status = run.status()
        assert (status.state, status.stage, status.fraction, status.step) == ("finished", "load", 0.5, 4)
        assert run.events().events == []


def test_status_is_replaced_at_most_twice_a_second_unless_the_state_changes(recipe):
    with _start(recipe).run as run:
        run.set_status(state="training", step=1)
        for step in range(2, 50):
            run.set_status(step=step)
        assert run.status().step < 49
        assert run.current.step == 49
        run.set_status(state="paused")
        assert run.status().step == 49


def test_requests_reach_the_trainer_once(recipe):
    control = Control()
    with _start(recipe).run as run:
        viewer = RunFolder(run.path)
        assert run.poll(control) == "resume"
        assert viewer.request("pause")
        assert run.poll(control) == "pause"
        assert run.poll(control) == "pause"
        assert viewer.request("resume")
        assert run.poll(control) == "resume"
        run.control_file.write_bytes(b"dance\xff")
        assert run.poll(control) == "resume"
        control.stop()
        assert viewer.request("resume")
        assert run.poll(control) == "stop"


def test_requests_of_an_earlier_attempt_are_forgotten(recipe):
    with _start(recipe).run as run:
        run.control_file.write_text("stop\n")
    with open_again(recipe, _files(recipe)).run as run:
        assert run.poll(Control()) == "resume"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"state": 7, "step": "x", "best_loss": true}', "[" * 9999])
def test_any_status_file_can_be_read(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    status = RunFolder(tmp_path).status()
    assert status is None or status.step == 0


def test_half_written_info_is_no_run(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(json.dumps({"id": 1})[:5])
    assert RunFolder(tmp_path / "x").info() == {}
    assert find_runs(tmp_path / "nowhere") == []


def test_leaving_by_an_interrupt_is_recorded(recipe):
    run = _start(recipe).run
    run.set_status(state="training")
    run.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert run.status().state == "interrupted"
