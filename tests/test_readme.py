"""What the README says about recipes, commands and exit codes is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from localdpo import DivergedError, EnvironmentFault, InputError, Interrupted, Recipe
from localdpo.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")


def table_after(heading: str) -> list[list[str]]:
    section = README.split(heading, 1)[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def settings(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Every key of the recipe with its default."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= settings(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.default
    return found


def test_the_recipe_table_has_existing_keys_and_true_defaults():
    known = settings(Recipe)
    for keys, defaults, _ in table_after("## A recipe, key by key"):
        names = re.findall(r"`([\w.]+)`", keys)
        section = names[0].rpartition(".")[0]
        names = [name if name in known else f"{section}.{name}" for name in names]
        assert set(names) <= set(known), keys
        stated = [value.strip("` ") for value in defaults.split(",")] if defaults else []
        if len(stated) < len(names):
            stated *= len(names)
        for name, value in zip(names, stated, strict=False):
            if name == "output_dir" or not value:
                continue
            default = known[name]
            assert value in (str(default).lower(), "null" if default is None else "") or (
                isinstance(default, int | float) and float(value) == default
            ), f"{name}: the README says {value}, it is {default}"


def test_every_command_of_the_table_exists():
    documented = {
        re.match(r"`localdpo ([\w-]+)", row[0]).group(1) for row in table_after("## Commands") if "`localdpo" in row[0]
    }  # type: ignore[union-attr]
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert documented == names | {group.name for group in app.registered_groups}


def test_options_named_in_the_commands_table_exist():
    for cell, text, *_ in table_after("## Commands"):
        command = re.match(r"`localdpo ([\w-]+)", cell)
        if command:
            shown = CliRunner().invoke(app, [command.group(1), "--help"]).stdout
            for option in re.findall(r"(?<!\w)(--?[a-z-]+)", text):
                assert option in shown, f"{command.group(1)} {option}"


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (InputError("x"), "2"),
        (EnvironmentFault("x"), "3"),
        (DivergedError("x"), "4"),
        (Interrupted("x"), "130"),
    ],
)
def test_exit_codes(error: Any, row: str):
    assert str(error.exit_code) == row
    assert re.search(rf"^\| {row}\b", README, re.MULTILINE)
