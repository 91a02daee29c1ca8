"""Imports point one way, and what must start at once loads no mlx."""

from __future__ import annotations

import ast
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import localdpo

PACKAGE = Path(localdpo.__file__).parent
LAYERS = (
    "",
    "data",
    "model",
    "core",
    "dpo",
    "methods",
    "train",
    "evaluate",
    "report",
    "export",
    "serve",
    "console",
    "commands",
    "cli",
)
HEAVY = {"mlx", "mlx_lm", "transformers", "torch"}
MAY_IMPORT_MLX = {"model", "core", "methods", "dpo", "train", "evaluate", "export", "serve"}
MODULES = sorted(PACKAGE.rglob("*.py"))
OPENS_THE_UI = "localdpo.console.ui"  # the one door: everything else works without localdpo_tui
PUBLIC = (PACKAGE / "__init__.py", PACKAGE / "__main__.py")  # these name every layer


def layer_of(module: str) -> str:
    """The layer of `localdpo.x.y`; modules beside `data` and the others are below all of them."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else ""


def module_name(path: Path) -> str:
    return ".".join(("localdpo", *path.relative_to(PACKAGE).with_suffix("").parts))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [alias.name for alias in node.names] if node.module == "localdpo" else [None]
            yield from (f"{node.module}.{name}" if name else str(node.module) for name in names)


@pytest.mark.parametrize("path", [path for path in MODULES if path not in PUBLIC], ids=module_name)
def test_a_module_imports_its_own_layer_and_lower_ones(path: Path):
    module = module_name(path)
    own = LAYERS.index(layer_of(module))
    for name in imports(path):
        root = name.partition(".")[0]
        assert root != "localdpo_tui" or module == OPENS_THE_UI, f"{module} imports the terminal UI"
        if root == "localdpo":
            assert LAYERS.index(layer_of(name)) <= own, f"{module} imports {name}"
        if root in HEAVY:
            assert layer_of(module) in MAY_IMPORT_MLX, f"{module} imports {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name == "__init__.py"], ids=module_name)
def test_packages_import_nothing_of_ours_when_loaded(path: Path):
    tree = ast.parse(path.read_text("utf-8"))
    names = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if name and name.startswith("localdpo")]


def loaded_by(code: str, tmp_path: Path, **environment: str) -> set[str]:
    """Top-level modules in `sys.modules` after ``code`` ran in a process of its own."""
    report = tmp_path / "modules.json"
    script = (
        "import atexit, json, pathlib, sys\n"
        f"atexit.register(lambda: pathlib.Path({str(report)!r}).write_text("
        "json.dumps(sorted({name.partition('.')[0] for name in sys.modules}))))\n" + code
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        stdout=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
    )
    return set(json.loads(report.read_text()))


def test_what_must_start_at_once_loads_no_mlx(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    (tmp_path / "recipe.yaml").write_text("model: smollm2-135m\ndata: {train: pairs.jsonl}\n")
    code = """
import localdpo, localdpo.cli, localdpo.console.display, localdpo.console.chat, localdpo.console.training
import localdpo.train.events, localdpo.train.run
recipe = localdpo.load_recipe("recipe.yaml")
localdpo.read_pairs(recipe.data.train)
"""
    assert not loaded_by(code, tmp_path) & HEAVY


def test_help_loads_neither_mlx_nor_anything_else_slow(tmp_path: Path):
    code = "import sys; sys.argv = ['localdpo', '--help']; from localdpo.cli import main; main()"
    assert not loaded_by(code, tmp_path) & (HEAVY | {"numpy", "pydantic", "rich", "ruamel", "textual"})


def test_help_answers_within_300_ms(tmp_path: Path):
    # CPU time of the fastest of a few, with bytecode as an installation has it: the program is measured, not what
    # else the machine is doing. It has one thread, so on an idle machine this is the time it takes.
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "localdpo", "--help"], check=True, capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3, seconds


def test_the_public_surface_is_sorted_and_whole():
    assert localdpo.__all__ == sorted(localdpo.__all__)
    assert dir(localdpo) == localdpo.__all__
    for name in localdpo.__all__:
        assert getattr(localdpo, name) is not None
    with pytest.raises(AttributeError, match="nosuch"):
        _ = localdpo.nosuch
