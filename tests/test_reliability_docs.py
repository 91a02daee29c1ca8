"""docs/reliability.md speaks of every fault there is, and every test it and SECURITY.md name exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAULTS = 48
_ROW = re.compile(r"^\| ([\d, ]+|fuzzing) \|.*\| ([^|]*) \|$", re.MULTILINE)
_NAMED = re.compile(r"(test_\w+\.py)(?:: ([^;]*))?")


@cache
def found_in(file: str) -> dict[str, bool]:
    """The tests of a file, and whether each is marked slow."""
    tree = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    whole = any(isinstance(node, ast.Assign) and "mark.slow" in ast.unparse(node) for node in tree.body)
    found = {}
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name.startswith("test_"):
                found[inner.name] = whole or any("mark.slow" in ast.unparse(mark) for mark in inner.decorator_list)
    return found


def rows() -> list[tuple[str, str]]:
    return _ROW.findall((ROOT / "docs" / "reliability.md").read_text("utf-8"))


def test_every_fault_has_a_row():
    numbers = [int(number) for faults, _ in rows() if faults != "fuzzing" for number in faults.split(",")]
    assert sorted(set(numbers)) == list(range(1, FAULTS + 1))


def test_the_tests_of_every_row_exist_and_slow_ones_are_told():
    for faults, cell in rows():
        named = _NAMED.findall(cell)
        assert named, f"{faults}: no test is named"
        assert all((ROOT / file).is_file() for file in re.findall(r"benchmarks/\w+\.py", cell)), faults
        for file, names in named:
            there = found_in(file)
            assert there, f"{faults}: {file} has no tests"
            for name in re.findall(r"\btest_\w+", names):
                assert name in there, f"{faults}: {file} has no {name}"
                assert not there[name] or "slow" in cell, f"{faults}: {name} is slow, which the row does not say"


def test_the_files_that_security_names_exist():
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    named = set(re.findall(r"tests/test_\w+\.py", text))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []
