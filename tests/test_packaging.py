"""A wheel of the project, installed into an environment of its own, has what it needs.

The dependencies are those of the environment that runs the tests: what is tested is what the wheel carries.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(
        next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"]))
    )


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment with the wheel in it."""
    home = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # After the environment's own packages, so that localdpo comes from the wheel.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_library_ui_recipes_and_license(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        fields = BytesParser().parsebytes(archive.read(metadata))
    shipped = {f"localdpo/_recipes/{path.name}" for path in (ROOT / "recipes").iterdir() if path.is_file()}
    assert shipped
    assert shipped <= names
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "localdpo/report/templates").iterdir()}
    assert "localdpo/report/templates/run.html" in templates
    assert templates <= names
    assert {"localdpo/py.typed", "localdpo/cli.py", "localdpo_tui/py.typed"} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]
    assert fields["Requires-Python"] == ">=3.11"
    assert fields["License-Expression"] == "MIT"


def test_init_writes_a_workspace_whose_recipes_load(python: Path, tmp_path: Path):
    where = run(python, tmp_path, "-c", "import localdpo; print(localdpo.__file__)")
    assert Path(where.strip()).is_relative_to(python.parents[1])
    out = run(python, tmp_path, "-m", "localdpo", "init", "work")
    assert "next: cd work && localdpo train recipes/athene.yaml" in out
    work = tmp_path / "work"
    assert (work / "runs").is_dir()
    check = (
        "import sys, localdpo; recipe = localdpo.load_recipe(sys.argv[1]); "
        "print(len(localdpo.read_pairs(recipe.data.train).pairs))"
    )
    for recipe in (work / "recipes").glob("*.yaml"):
        assert int(run(python, tmp_path, "-c", check, str(recipe))) > 0
    assert (work / "pairs" / "athene.jsonl").is_file()


def test_init_again_leaves_what_is_there(python: Path, tmp_path: Path):
    run(python, tmp_path, "-m", "localdpo", "init")
    recipe = tmp_path / "recipes" / "athene.yaml"
    recipe.write_text("mine")
    assert "nothing to write" in run(python, tmp_path, "-m", "localdpo", "init")
    assert recipe.read_text() == "mine"


def test_the_console_script_is_declared(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "localdpo = localdpo.__main__:main" in archive.read(name).decode()


@pytest.mark.slow
def test_pip_installs_the_wheel_with_its_dependencies_into_an_empty_environment(wheel: Path, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([str(binaries / "pip"), "install", "--quiet", str(wheel)], check=True)
    command = str(binaries / "localdpo")
    for arguments in (["init"], ["doctor"], ["train", "recipes/athene.yaml", "--dry-run"]):
        done = subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "trainable parameters" in done.stdout
