"""`localdpo doctor FOLDER`: each fault of a run or a workspace is planted, found and, where safe, mended."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import psutil
import pytest
from training import collect, recipe_for, workspace, write_rows
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.console.checkup import examine_folder, examine_run
from localdpo.console.finding import Finding
from localdpo.data.store import PairStore
from localdpo.errors import InputError
from localdpo.model.safety import check_adapter_folder
from localdpo.train.run import RunFolder, acquire


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints, in a workspace of its own."""
    root = workspace(tmp_path_factory.mktemp("doctor"))
    collect(recipe_for(root, train__max_steps=4, train__save_steps=2, train__eval_steps=None, data__eval=None))
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    shutil.copytree(trained / "runs" / "a", tmp_path / "a")
    return RunFolder(tmp_path / "a")


def wrong(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.level != "ok"}


def test_a_sound_run_has_nothing_wrong(run: RunFolder):
    found = examine_run(run)
    assert wrong(found) == {}
    assert {finding.name for finding in found} >= {"state", "recipe", "model", "data", "resume", "metrics", "adapter"}


def damage_newest(run: RunFolder) -> None:
    file = sorted(run.checkpoints.iterdir())[-1] / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")


def damage_all(run: RunFolder) -> None:
    for folder in run.checkpoints.iterdir():
        (folder / "manifest.json").unlink()


def interrupt(run: RunFolder) -> None:
    run.lock_file.touch()
    run.status_file.write_text(json.dumps({**json.loads(run.status_file.read_text()), "state": "training"}))


def change_original(run: RunFolder) -> None:
    interrupt(run)
    info = json.loads(run.info_file.read_text())
    info["files"]["data.train"]["path"] = str(run.path / "elsewhere.jsonl")
    run.info_file.write_text(json.dumps(info))


def set_rank(run: RunFolder) -> None:
    (run.adapter / "manifest.json").unlink()
    file = run.adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    config["lora_parameters"]["rank"] = 3
    file.write_text(json.dumps(config))


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


FAULTS: tuple[tuple[Callable[[RunFolder], object], str, str, str, str], ...] = (
    (lambda run: run.info_file.unlink(), "run", "broken", "run.json", "new run"),
    (lambda run: run.status_file.write_text("{"), "state", "advice", "status.json", "next attempt"),
    (interrupt, "state", "advice", "interrupted at step 4", "--resume"),
    (lambda run: run.recipe_file.write_text("model: [\n"), "recipe", "broken", "recipe.yaml", ""),
    (lambda run: append(run.pairs_file, b"\n"), "data", "broken", "pairs.jsonl", "Start a new run"),
    (change_original, "data", "advice", "elsewhere.jsonl has changed or gone", "--fork"),
    (damage_newest, "resume", "advice", "sha256 differs", "falls back to step-000002"),
    (damage_all, "resume", "broken", "no checkpoint is whole", "Start a new run"),
    (lambda run: append(run.metrics_file, b'{"event": "st'), "metrics", "advice", "cut off", "cuts it away"),
    (lambda run: append(run.metrics_file, b"not json\n"), "metrics", "advice", "1 lines that are no events", "gaps"),
    (lambda run: run.metrics_file.unlink(), "metrics", "advice", "no metrics.jsonl", "next attempt"),
    (lambda run: shutil.rmtree(run.adapter), "adapter", "broken", "has no adapter", "Resume"),
    (lambda run: append(run.adapter / "adapters.safetensors", b"\0"), "adapter", "broken", "bytes", "checkpoint"),
    (set_rank, "adapter", "broken", "not of rank 3", "checkpoint"),
)


@pytest.mark.parametrize(("plant", "name", "level", "value", "advice"), FAULTS)
def test_a_planted_fault_is_found_with_what_to_do(
    run: RunFolder, plant: Callable[[RunFolder], object], name: str, level: str, value: str, advice: str
):
    plant(run)
    found = examine_folder(run.path)
    hits = [finding for finding in found if finding.name == name and finding.level == level]
    assert any(value in finding.value and advice in finding.advice for finding in hits), found
    assert all(finding.advice for finding in found if finding.level == "advice")
    result = CliRunner().invoke(app, ["doctor", str(run.path), "--json"])
    assert result.exit_code == (2 if any(finding.level == "broken" for finding in found) else 0)
    assert [row["name"] for row in json.loads(result.stdout)] == [finding.name for finding in found]


def test_a_run_at_work_is_left_alone(run: RunFolder):
    interrupt(run)
    with acquire(run.path):
        state = next(finding for finding in examine_run(run, fix=True) if finding.name == "state")
    assert state.level == "ok"
    assert "at work on it" in state.value


def _dead_process() -> int:
    return next(pid for pid in range(99999, 1, -1) if not psutil.pid_exists(pid))


def test_fix_clears_what_writes_left_and_puts_back_what_they_moved(run: RunFolder):
    from localdpo.files import _temporary_sibling

    ours = _temporary_sibling(run.status_file)
    dead = ours.with_name(ours.name.replace(f"-{os.getpid()}-", f"-{_dead_process()}-"))
    ours.write_text("being written")
    dead.write_text("cut off")
    adapter = sorted(file.name for file in run.adapter.iterdir())
    run.adapter.rename(run.path / ".adapter.previous")
    found = wrong(examine_run(run))
    assert found["leftovers"].advice
    assert dead.exists()  # without --fix nothing is touched
    mended = examine_run(run, fix=True)
    assert not dead.exists()
    assert ours.exists()  # its process lives
    assert sorted(file.name for file in run.adapter.iterdir()) == adapter
    assert {finding.value for finding in mended if finding.name == "leftovers" and finding.level == "ok"} >= {
        "adapter: put back"
    }
    ours.unlink()
    assert wrong(examine_run(run)) == {}


def test_a_workspace_is_looked_at_as_a_whole(trained: Path, tmp_path: Path):
    for name in ("pairs", "recipes", "runs"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "pairs" / "good.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    (tmp_path / "pairs" / "bad.jsonl").write_text('{"prompt": "a"\n')
    (tmp_path / "recipes" / "good.yaml").write_text("model: m\ndata: {train: ../pairs/good.jsonl}\n")
    (tmp_path / "recipes" / "bad.yaml").write_text("modle: m\n")
    shutil.copytree(trained / "runs" / "a", tmp_path / "runs" / "a")
    damage_newest(RunFolder(tmp_path / "runs" / "a"))
    trash = tmp_path / ".localdpo" / "trash" / "runs" / "old-1"
    trash.mkdir(parents=True)
    (trash / "run.json").write_text("{}")
    with PairStore.open(tmp_path / "pairs" / "good.jsonl") as store:
        key = store.keys[0]
        store.update(key, replace(store.row(key).draft(), chosen="better"))
        found = examine_folder(tmp_path)
    text = {(finding.name, finding.level): finding.value for finding in found}
    assert ("pairs", "broken") in text
    assert "good.jsonl: 1 pairs" in text["pairs", "ok"]
    assert "bad.yaml" in text["recipes", "broken"]
    assert "good.yaml" in text["recipes", "ok"]
    assert "a: resume: step-000004" in text["runs", "advice"]
    assert "good.jsonl has edits that are not saved" in text["drafts", "advice"]
    assert "1 runs, 2 B" in text["trash", "ok"]
    result = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert result.exit_code == 2
    assert "BROKEN  pairs" in result.stdout


def test_what_is_no_folder_of_ours_is_bad_input(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError):
            examine_folder(folder)
    assert CliRunner().invoke(app, ["doctor", str(tmp_path)]).exit_code == 2


def test_looking_at_a_folder_changes_nothing_in_it(run: RunFolder):
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    examine_folder(run.path)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.0])
def test_values_that_are_not_finite_are_found_without_the_base(tmp_path: Path, dtype: mx.Dtype, value: float):
    weights = {"l.lora_a": mx.zeros((6, 2), dtype=dtype), "l.lora_b": mx.zeros((2, 5), dtype=dtype)}
    weights["l.lora_b"][1, 4] = value
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 2}}))
    assert [problem.message for problem in check_adapter_folder(tmp_path)] == (
        [] if np.isfinite(value) else ["'l.lora_b' holds values that are not finite"]
    )


def test_a_terminal_of_another_encoding_is_named(monkeypatch: pytest.MonkeyPatch):
    from localdpo.console import doctor

    monkeypatch.setattr("locale.getpreferredencoding", lambda _set=True: "ISO-8859-1")
    (finding,) = doctor._terminal()
    assert finding.level == "advice"
    assert "UTF-8" in finding.advice
