from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from localdpo import files
from localdpo.errors import EnvironmentFault
from localdpo.files import (
    MANIFEST,
    atomic_folder,
    atomic_write,
    recover_folder,
    require_space,
    sha256_file,
    verify_folder,
    write_json,
)
from localdpo.paths import cache_dir, recipes_dir


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_writes_bytes_and_text(tmp_path: Path):
    atomic_write(tmp_path / "a", "grüße\n")
    atomic_write(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "a").read_bytes() == "grüße\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert names(tmp_path) == ["a", "b"]


def test_a_new_file_is_private_and_an_old_one_keeps_its_mode(tmp_path: Path):
    path = tmp_path / "a"
    atomic_write(path, "1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    atomic_write(path, "2")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("step", ["replace", "fsync", "open"])
def test_a_fault_at_any_step_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
):
    path = tmp_path / "a"
    atomic_write(path, "old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(files, "_sync", full)
        else:
            patch.setattr(os, step, full)
        with pytest.raises(EnvironmentFault, match=r"No space left on device\. Free some space"):
            atomic_write(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_what_reads_back_differently_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"flipped")
    with pytest.raises(EnvironmentFault, match="differs from what was written"):
        atomic_write(tmp_path / "a", "new")
    assert names(tmp_path) == []


def test_space_is_checked_first(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match="MB are needed"):
        require_space(tmp_path / "not" / "there", 1 << 60)
    require_space(tmp_path / "not" / "there", 1)


def test_a_missing_folder_is_a_fault_of_the_environment(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match="No such file or directory"):
        atomic_write(tmp_path / "missing" / "a", "x")


def test_write_json_refuses_nan(tmp_path: Path):
    write_json(tmp_path / "a.json", {"b": [1, "ü"]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"b": [1, "ü"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"b": float("nan")})
    assert names(tmp_path) == ["a.json"]


def test_atomic_folder_publishes_files_and_a_manifest(tmp_path: Path):
    target = tmp_path / "deep" / "run"
    with atomic_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "x.bin").write_bytes(b"abc")
        (folder / "y.txt").write_text("y")
        assert not target.exists()
    manifest = json.loads((target / MANIFEST).read_text())
    assert manifest["files"]["inner/x.bin"] == {"size": 3, "sha256": sha256_file(target / "inner" / "x.bin")}
    assert set(manifest["files"]) == {"inner/x.bin", "y.txt"}
    assert verify_folder(target) == []
    assert names(target.parent) == ["run"]


def test_atomic_folder_replaces_the_old_one_or_leaves_it(tmp_path: Path):
    target = tmp_path / "run"
    for content in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / "x").write_text(content)
    assert (target / "x").read_text() == "two"

    def broken() -> None:
        with atomic_folder(target) as folder:
            (folder / "x").write_text("three")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        broken()
    assert (target / "x").read_text() == "two"
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_rename_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int):
    target = tmp_path / "run"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("old")
    rename, calls = os.rename, []

    def flaky(source: Path, destination: Path) -> None:
        calls.append(source)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", flaky)
    with pytest.raises(EnvironmentFault, match="Input/output error"), atomic_folder(target) as folder:
        (folder / "x").write_text("new")
    assert (target / "x").read_text() == "old"
    assert names(tmp_path) == ["run"]


CRASH = """
import os, sys
from localdpo import files
rename, calls = os.rename, []
def crash(source, destination):
    if len(calls) == int(sys.argv[2]):
        os._exit(9)
    calls.append(source)
    rename(source, destination)
os.rename = crash
with files.atomic_folder(sys.argv[1]) as folder:
    (folder / "x").write_text("new")
"""


@pytest.mark.parametrize("renames", [0, 1])
def test_a_crash_between_renames_loses_nothing(tmp_path: Path, renames: int):
    target = tmp_path / "run"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("old")
    root = Path(files.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(target), str(renames)], env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 9
    assert recover_folder(target) == (renames == 1)
    assert (target / "x").read_text() == "old"
    assert verify_folder(target) == []
    # The next writer removes what the dead one left.
    with atomic_folder(target) as folder:
        (folder / "x").write_text("newer")
    assert names(tmp_path) == ["run"]
    assert (target / "x").read_text() == "newer"


def test_recover_folder_leaves_a_whole_folder_alone(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / ".run.previous").mkdir()
    assert not recover_folder(tmp_path / "run")
    assert not recover_folder(tmp_path / "other")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    with atomic_folder(tmp_path / "run") as folder:
        (folder / "x").write_text("abc")
    return tmp_path / "run"


def test_verify_folder_finds_every_kind_of_damage(whole: Path):
    file = whole / "x"
    file.write_text("abd")
    assert "sha256 differs" in verify_folder(whole)[0].message
    file.write_text("abcd")
    assert "has 4 bytes and should have 3" in verify_folder(whole)[0].message
    file.unlink()
    assert verify_folder(whole)[0].where == str(file)


def test_verify_folder_ignores_files_that_are_not_ours(whole: Path):
    (whole / ".DS_Store").write_text("finder")
    assert verify_folder(whole) == []


@pytest.mark.parametrize("content", ["", "[1]", '{"files": 3}', '{"files": {"x": 3}}', "[" * 100_000])
def test_verify_folder_of_a_broken_manifest(whole: Path, content: str):
    (whole / MANIFEST).write_text(content)
    assert [p.message for p in verify_folder(whole)] == ["is not a manifest"]


def test_a_manifest_cannot_point_outside(whole: Path):
    write_json(whole / MANIFEST, {"files": {"../../secret": {"size": 1, "sha256": "0"}}})
    assert "outside" in verify_folder(whole)[0].message


def test_verify_folder_without_a_manifest(tmp_path: Path):
    assert "cannot be read" in verify_folder(tmp_path)[0].message


def test_cache_dir_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("LOCALDPO_CACHE")
    assert cache_dir().name == "localdpo"


def test_recipes_dir_is_a_folder():
    assert recipes_dir().is_dir()
