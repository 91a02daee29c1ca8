"""The preflight by itself, and the recipe form at both sizes: what a user sees and what is written."""

from __future__ import annotations

import asyncio
import functools
import sys
from pathlib import Path

import pytest
from localdpo_tui.services import preflight
from localdpo_tui.widgets.recipe_form import RecipeForm
from textual.widgets import Input

from localdpo.errors import EnvironmentFault, InputError
from localdpo.recipe import load_recipe
from tui import SIZES, screen_text, seen, started, until, write_pairs

RECIPE = """\
# Mine.
model: tiny  # small
data: {train: ../pairs/mine.jsonl}
train:
  learning_rate: 1e-3   # high
"""
PLAN = {
    "event": "plan",
    "model": "tiny",
    "device": "cpu",
    "parameters": 1000,
    "trainable_parameters": 10,
    "train_pairs": 24,
    "held_out_pairs": 3,
    "retain_prompts": 0,
    "probes": 0,
    "rows_per_step": 4,
    "epochs": 2.0,
    "total_steps": 12,
    "warmup_steps": 1,
    "tokens_per_epoch": 700,
    "longest_tokens": 50,
    "truncated": 2,
    "gradient_checkpointing": False,
    "memory": {"total": 3_000_000_000},
    "memory_available": 4_000_000_000,
    "memory_verdict": "tight",
    "seconds": 61.0,
    "skipped": [{"source": "mine.jsonl", "line": 7, "reason": "the answer is \x1b[31mempty"}],
    "warnings": [{"where": "mine.jsonl", "message": "2 duplicates", "fix": "Remove one"}],
    "loss": {"loss_type": "sigmoid", "beta": 0.1, "rpo_alpha": 1.0, "label_smoothing": 0.0},
    "lengths": [[20, 5], [40, 18], [60, 1]],
}


def piloted(test):
    """Run an async test to its end."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pairs(tmp_path / "pairs" / "mine.jsonl")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(RECIPE)
    return tmp_path


async def told(pilot, text: str) -> None:
    """Wait until a notification says a text."""
    await until(pilot, lambda: any(text in one.message for one in pilot.app._notifications), repr(text))


def recipe_text(folder: Path) -> str:
    return (folder / "recipes" / "mine.yaml").read_text()


def child(tmp_path: Path, code: str) -> list[str]:
    """A command that runs Python code in place of localdpo."""
    script = tmp_path / "child.py"
    script.write_text(code)
    return [sys.executable, str(script)]


# -- the preflight by itself


def test_a_plan_comes_back_from_the_child(tmp_path):
    code = "import json, sys\nprint('noise')\nprint(json.dumps({'event': 'plan', 'argv': sys.argv[1:]}))"
    plan = asyncio.run(preflight.run_preflight(tmp_path / "r.yaml", tmp_path, child(tmp_path, code)))
    assert plan["argv"] == ["train", str(tmp_path / "r.yaml"), "--dry-run", "--json"]


@pytest.mark.parametrize(
    ("code", "kind", "said"),
    [
        (
            "import sys; print('error: dpo.beta: is 0.', file=sys.stderr); sys.exit(2)",
            InputError,
            r"^dpo\.beta: is 0\.$",
        ),
        ("import sys; print('no disk', file=sys.stderr); sys.exit(3)", EnvironmentFault, "no disk"),
        ("import sys; sys.exit(1)", EnvironmentFault, "exit code 1 and said nothing"),
        ("print('[1')", EnvironmentFault, "exit code 0"),
    ],
)
def test_what_the_child_says_is_raised(tmp_path, code, kind, said):
    with pytest.raises(kind, match=said):
        asyncio.run(preflight.run_preflight(tmp_path / "r.yaml", tmp_path, child(tmp_path, code)))


def test_a_child_that_cannot_start_is_an_environment_fault(tmp_path):
    with pytest.raises(EnvironmentFault):
        asyncio.run(preflight.run_preflight(tmp_path / "r.yaml", tmp_path, [str(tmp_path / "nothing")]))


def test_cancelling_ends_the_child(tmp_path):
    code = "import pathlib, sys, time\npathlib.Path('here').write_text('x')\ntime.sleep(600)"

    async def cancelled():
        task = asyncio.create_task(preflight.run_preflight(tmp_path / "r.yaml", tmp_path, child(tmp_path, code)))
        while not (tmp_path / "here").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 30)

    asyncio.run(cancelled())


@pytest.mark.parametrize(
    ("verdict", "word", "role"),
    [
        ("safe", "SAFE", "good"),
        ("tight", "TIGHT", "warning"),
        ("too big", "TOO BIG", "bad"),
        ("odd", "UNKNOWN", "warning"),
    ],
)
def test_the_memory_band_has_a_word_and_a_bar(verdict, word, role):
    first, _ = preflight.band({**PLAN, "memory_verdict": verdict}, 20)
    assert first == (f"Memory: {word}  [{'█' * 15}{'·' * 5}] 75% of what is available", role)


def test_a_plan_is_told_in_lines_that_fit():
    lines = preflight.lines(PLAN, 60)
    text = "\n".join(line for line, _ in lines)
    assert "2 pairs truncated" in " ".join(text.split())
    assert "mine.jsonl:7: the answer is ␛[31mempty" in " ".join(text.split())
    assert "12 of 4 rows, 2 epochs" in text
    assert "about 1 min 01 s" in text
    assert "up to 40 18 ▇▇▇▇" in text
    bars = [line.count("▇") for line, _ in lines if "up to" in line]
    assert bars == [-(-5 * bars[1] // 18), bars[1], -(-bars[1] // 18)]
    assert max(len(line) for line, role in lines if role in ("", "heading")) <= 60


# -- the form


@pytest.mark.parametrize("size", SIZES)
@piloted
async def test_a_value_is_changed_and_the_comments_stay(folder, size):
    async with started(folder, size, place="train") as (app, pilot):
        await seen(pilot, "Recipe: recipes/mine.yaml")
        await seen(pilot, "• model")
        app.screen.query_one(RecipeForm).go_to("train.learning_rate")
        await seen(pilot, "The highest learning rate of the schedule.")
        await pilot.press("enter")
        await until(pilot, lambda: app.screen.query_one("#value", Input).has_focus)
        assert app.screen.query_one("#value", Input).value == "0.001"
        await pilot.press(*"2e-4", "enter")
        await until(pilot, lambda: "2e-4" in recipe_text(folder))
        assert recipe_text(folder) == RECIPE.replace("1e-3 ", "2e-4 ")
        await seen(pilot, "─ saved")
        await pilot.press("ctrl+z")
        await until(pilot, lambda: recipe_text(folder) == RECIPE)


@piloted
async def test_a_wrong_value_is_named_and_not_written(folder):
    async with started(folder, place="train") as (app, pilot):
        await seen(pilot, "• model")
        app.screen.query_one(RecipeForm).go_to("dpo.beta")
        await pilot.press("enter", "0", "enter")
        await seen(pilot, "! 1 to put right, not saved")
        await seen(pilot, "! beta")
        await until(pilot, lambda: "greater than 0" in " ".join(screen_text(app).split()))
        assert recipe_text(folder) == RECIPE
        await pilot.press("r")
        await told(pilot, "greater than 0")
        await pilot.press("delete")
        await seen(pilot, "─ saved")


@piloted
async def test_choices_go_round_and_the_default_comes_back(folder):
    async with started(folder, place="train") as (app, pilot):
        await seen(pilot, "• model")
        app.screen.query_one(RecipeForm).go_to("dpo.loss_type")
        await pilot.press("right")
        await until(pilot, lambda: "loss_type: ipo" in recipe_text(folder))
        await pilot.press("left")
        await until(pilot, lambda: "loss_type: sigmoid" in recipe_text(folder))
        await pilot.press("delete")
        await until(pilot, lambda: "loss_type" not in recipe_text(folder))
        assert load_recipe(folder / "recipes" / "mine.yaml").dpo.loss_type == "sigmoid"


@pytest.mark.parametrize("size", SIZES)
@piloted
async def test_search_finds_keys_by_their_help(folder, size):
    async with started(folder, size, place="train") as (app, pilot):
        await seen(pilot, "• model")
        await pilot.press("slash")
        await until(pilot, lambda: app.screen.query_one("#search", Input).has_focus)
        await pilot.press(*"warm", "minus", *"up")
        await until(pilot, lambda: "lora" not in screen_text(app))
        assert "lr_scheduler_type" in screen_text(app)
        assert "adam_beta1" not in screen_text(app)
        await pilot.press("enter")
        await until(pilot, lambda: app.screen.query_one(RecipeForm).has_focus)
        await pilot.press("escape")
        await seen(pilot, "• model")


@piloted
async def test_a_recipe_changed_elsewhere_keeps_both_changes(folder):
    async with started(folder, place="train") as (app, pilot):
        await seen(pilot, "• model")
        (folder / "recipes" / "mine.yaml").write_text(RECIPE.replace("# Mine.", "# Ours."))
        app.screen.query_one(RecipeForm).go_to("dpo.beta")
        await pilot.press("enter", *"0.3", "enter")
        await until(pilot, lambda: "beta: 0.3" in recipe_text(folder))
        assert recipe_text(folder).startswith("# Ours.")


@pytest.mark.parametrize("size", SIZES)
@piloted
async def test_an_empty_folder_says_what_a_recipe_is(tmp_path, size):
    async with started(tmp_path, size, place="train") as (app, pilot):
        await seen(pilot, "There is no recipe in this folder yet.")
        await pilot.press("c", "r", "u", "x", "t")
        assert "Internal error" not in screen_text(app)


@piloted
async def test_another_recipe_is_opened_and_remembered(folder):
    (folder / "recipes" / "other.yaml").write_text(RECIPE.replace("tiny", "huge"))
    async with started(folder, place="train") as (app, pilot):
        await seen(pilot, "• model")
        await pilot.press("o")
        await seen(pilot, "Open a recipe")
        await pilot.press("down", "enter")
        await seen(pilot, "recipes/other.yaml")
        await until(pilot, lambda: app.workspace.state().get("recipe") == "recipes/other.yaml")
    async with started(folder, place="train") as (_, pilot):
        await seen(pilot, "recipes/other.yaml")


@piloted
async def test_a_broken_recipe_is_told_and_not_touched(folder):
    (folder / "recipes" / "mine.yaml").write_text("model: [1,\n")
    async with started(folder, place="train") as (_, pilot):
        await told(pilot, "is not YAML")
    assert recipe_text(folder) == "model: [1,\n"
