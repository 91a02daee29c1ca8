"""Changing a recipe: the user's text stays byte for byte, and nothing wrong is written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from localdpo.errors import InputError
from localdpo.paths import recipes_dir
from localdpo.recipe import Recipe, dump_recipe, load_recipe
from localdpo.recipe_edit import RecipeEdit, settings
from localdpo.settings import fields_of
from localdpo.yamledit import remove_key, set_key, yaml_literal
from localdpo.yamlfile import parse_yaml

RECIPE = """\
# Mine.
model: smollm2-135m   # small

data:
  train: pairs.jsonl  # the pairs
  # how many are held out
  eval: 0.1

dpo: {beta: 0.1, loss_type: "sigmoid"}   # the loss
train:
    learning_rate: 1.5e-3    # high
    max_steps: 10

# the end
"""
ORDER = [setting.path for setting in settings()]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    path = tmp_path / "mine.yaml"
    path.write_bytes(RECIPE.encode())
    return path


def changed_lines(before: str, after: str) -> tuple[list[str], list[str]]:
    """Lines only in ``before``, and lines only in ``after``."""
    old, new = before.splitlines(keepends=True), after.splitlines(keepends=True)
    return [line for line in old if line not in new], [line for line in new if line not in old]


@pytest.mark.parametrize(
    ("key", "text", "gone", "come"),
    [
        (
            "train.learning_rate",
            "1e-4",
            ["    learning_rate: 1.5e-3    # high\n"],
            ["    learning_rate: 1e-4      # high\n"],
        ),
        (
            "dpo.beta",
            "0.25",
            ['dpo: {beta: 0.1, loss_type: "sigmoid"}   # the loss\n'],
            ['dpo: {beta: 0.25, loss_type: "sigmoid"}   # the loss\n'],
        ),
        (
            "dpo.loss_type",
            "ipo",
            ['dpo: {beta: 0.1, loss_type: "sigmoid"}   # the loss\n'],
            ['dpo: {beta: 0.1, loss_type: "ipo"}   # the loss\n'],
        ),
        ("data.eval", "null", ["  eval: 0.1\n"], ["  eval: null\n"]),
        ("data.max_length", "64", [], ["  max_length: 64\n"]),
        ("train.num_train_epochs", "2", [], ["    num_train_epochs: 2\n"]),
        ("lora.target_modules", "[q_proj, v_proj]", [], ["lora:\n", "  target_modules: [q_proj, v_proj]\n"]),
        ("seed", "7", [], ["seed: 7\n"]),
        (
            "model",
            "a # b",
            ["model: smollm2-135m   # small\n"],
            ['model: "a # b"        # small\n'],
        ),
    ],
)
def test_only_the_line_of_the_key_changes(recipe, key, text, gone, come):
    edit = RecipeEdit.open(recipe)
    edit.set(key, text)
    assert changed_lines(RECIPE, edit.text) == (gone, come)
    assert edit.value(key) == parse_yaml(text, "x").value if text != "a # b" else edit.value(key) == text
    assert edit.undo()
    assert edit.text == RECIPE


def test_new_keys_stand_in_the_models_order(recipe):
    edit = RecipeEdit.open(recipe)
    for key, text in (("lora.r", "4"), ("quantize", "4"), ("lora.alpha", "8"), ("train.memory", "lean")):
        edit.set(key, text)
    read = parse_yaml(edit.text, "x")
    lines = read.lines
    assert lines[("model",)] < lines[("quantize",)] < lines[("data",)] < lines[("lora",)] < lines[("dpo",)]
    assert lines[("lora", "r")] < lines[("lora", "alpha")]
    assert lines[("train", "memory")] > lines[("train", "max_steps")]
    assert changed_lines(RECIPE, edit.text)[0] == []


@pytest.mark.parametrize(
    "text",
    [
        "model: m\r\ndata:\r\n  train: p.jsonl # x\r\n",
        "model: m\ndata: {train: p.jsonl}",
        "# only\nmodel: m\ndata:\n  train: p.jsonl\ntrain:\ndpo: {}\nlora: # later\n",
        "model: m\ndata:\n  train: p.jsonl\nlora:\n  target_modules: # which\n    - q_proj # 1\n    - v_proj\n  r: 2\n",
        "model: >\n  m\ndata:\n  train: p.jsonl\n",
    ],
)
@pytest.mark.parametrize(
    ("key", "literal"),
    [
        (("model",), "other"),
        (("train", "max_steps"), "3"),
        (("dpo", "beta"), "0.2"),
        (("lora", "target_modules"), "mlp"),
        (("lora", "r"), "16"),
        (("data", "train"), '"a: b, {c}.jsonl"'),
    ],
)
def test_every_way_of_writing_is_understood(text, key, literal):
    changed = set_key(text, key, literal, ORDER)
    value = parse_yaml(changed, "x").value
    section = value[key[0]] if len(key) == 2 else value
    assert section[key[-1]] == parse_yaml(literal, "x").value
    for comment in ("# x", "# only", "# later", "# which"):
        assert (comment in changed) == (comment in text)
    assert ("\r\n" in changed) == ("\r\n" in text)
    assert changed.count("\r") == changed.count("\n") * ("\r\n" in text)


@hypothesis_settings(deadline=None)
@given(
    value=st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**9), 10**9),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20),
        st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8), max_size=3),
    ),
    key=st.sampled_from(ORDER),
)
def test_any_value_reads_back_and_other_values_stay(value, key):
    changed = set_key(RECIPE, key, yaml_literal(value), ORDER)
    after, before = parse_yaml(changed, "x").value, parse_yaml(RECIPE, "x").value
    (after if len(key) == 1 else after[key[0]]).pop(key[-1])
    if len(key) == 2 and key[0] not in before:
        after.pop(key[0])
    (before if len(key) == 1 else before.get(key[0], {})).pop(key[-1], None)
    assert after == before


@pytest.mark.parametrize("key", ["model", "data.eval", "dpo.beta", "dpo.loss_type", "train.max_steps"])
def test_removing_is_the_opposite_of_adding(key):
    path = tuple(key.split("."))
    without = remove_key(RECIPE, path)
    value = parse_yaml(without, "x").value
    assert path[-1] not in (value if len(path) == 1 else value[path[0]])
    assert remove_key(without, path) == without


def test_what_an_alias_shares_is_left_alone():
    text = "model: m\ndata: {train: &file p.jsonl, eval: *file}\n"
    with pytest.raises(InputError, match=r"data\.eval: is written in a way that cannot be changed"):
        set_key(text, ("data", "eval"), "0.1", ORDER)


def test_reset_keeps_a_comment_and_takes_the_rest(recipe):
    edit = RecipeEdit.open(recipe)
    edit.reset("train.max_steps")
    edit.reset("train.learning_rate")
    edit.reset("dpo.beta")
    assert "max_steps" not in edit.text
    assert "    learning_rate: 0.0001    # high\n" in edit.text
    assert 'dpo: {loss_type: "sigmoid"}   # the loss\n' in edit.text
    with pytest.raises(InputError, match=r"data\.train: must be given"):
        edit.reset("data.train")


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("dpo.beta", "0", "greater than 0"),
        ("train.learning_rate", "fast", "is not a valid number"),
        ("lora.r", "2.5", "is not a valid integer"),
        ("data.train", "nowhere.jsonl", "no such file"),
        ("data.truncation", "middle", "keep_start"),
        ("dpo.label_smoothing", "0.7", "less than 0.5"),
    ],
)
def test_an_invalid_value_is_refused_with_its_key(recipe, key, text, message):
    edit = RecipeEdit.open(recipe)
    edit.set(key, text)
    problems = edit.problems()
    assert list(problems) == [key]
    assert message in str(problems[key][0])
    if key != "data.train":  # files may come later: the recipe is sound
        with pytest.raises(InputError, match=key):
            edit.save()
        assert recipe.read_text() == RECIPE


def test_settings_wrong_together_are_named(recipe):
    edit = RecipeEdit.open(recipe)
    edit.set("dpo.loss_type", "robust")
    assert list(edit.problems()) == ["dpo.label_smoothing"]
    edit.set("dpo.label_smoothing", "0.1")
    assert edit.problems() == {}


def test_an_unknown_key_in_the_file_is_no_keys_problem(recipe):
    recipe.write_text(RECIPE + "learning_rate: 3\n")
    edit = RecipeEdit.open(recipe)
    assert "train.learning_rate" in str(edit.problems()[""][0])


@pytest.mark.parametrize("text", ["[1,", "!!python/name:os.system x", "{a: 1", "a: b: c"])
def test_what_is_no_yaml_is_refused_at_once(recipe, text):
    edit = RecipeEdit.open(recipe)
    with pytest.raises(InputError):
        edit.set("lora.target_modules", text)
    assert edit.text == RECIPE


def test_saved_bytes_are_the_shown_ones(recipe):
    recipe.write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    edit = RecipeEdit.open(recipe)
    assert not edit.changed
    edit.set("dpo.beta", "0.3")
    assert edit.changed
    edit.save()
    assert not edit.changed
    expected = RECIPE.replace("beta: 0.1", "beta: 0.3").replace("\n", "\r\n").encode()
    assert recipe.read_bytes() == b"\xef\xbb\xbf" + expected
    assert load_recipe(recipe).dpo.beta == 0.3


def test_a_file_changed_elsewhere_is_not_overwritten_and_both_changes_meet(recipe):
    edit = RecipeEdit.open(recipe)
    edit.set("dpo.beta", "0.3")
    edit.reset("train.max_steps")
    theirs = RECIPE.replace("1.5e-3", "2e-3").replace("# the end", "# theirs")
    recipe.write_text(theirs)
    with pytest.raises(InputError, match="has changed on the disk"):
        edit.save()
    assert recipe.read_text() == theirs
    assert edit.reload() == []
    edit.save()
    expected = theirs.replace("beta: 0.1", "beta: 0.3").replace("    max_steps: 10\n", "")
    assert recipe.read_text() == expected


def test_every_key_of_the_models_is_a_setting():
    assert [setting.path for setting in settings()] == [path for path, _ in fields_of(Recipe)]
    least = Recipe.model_validate({"model": "m", "data": {"train": "p"}}).model_dump(mode="json")
    for setting in settings():
        assert setting.help
        assert setting.accepts
        assert setting.required == (setting.key in ("model", "data.train"))
        if not setting.required:
            section = least[setting.section] if setting.section else least
            assert section[setting.name] == setting.default


def test_kinds_and_choices_come_from_the_types():
    known = {setting.key: setting for setting in settings()}
    assert known["dpo.loss_type"].kind == "choice"
    assert known["dpo.loss_type"].choices[:2] == ("sigmoid", "ipo")
    assert known["quantize"].choices == ("2", "3", "4", "6", "8", "null")
    assert known["train.gradient_checkpointing"].choices == ("auto", "true", "false")
    assert known["lora.use_rslora"].kind == "flag"
    assert (known["lora.num_layers"].kind, known["lora.num_layers"].choices) == ("integer", ("all",))
    assert not known["lora.num_layers"].closed
    assert known["data.eval"].accepts == "a number from 0 up to 0.5, or a path, or null"
    assert known["dpo.label_smoothing"].accepts == "a number from 0 below 0.5"


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.key)
def test_every_default_can_be_set_and_is_accepted(tmp_path, setting):
    shutil.copytree(recipes_dir(), tmp_path / "r")
    edit = RecipeEdit.open(tmp_path / "r" / "athene.yaml")
    before = edit.text
    if setting.required:
        edit.set(setting.key, edit.shown(setting.key))
        assert edit.text == before
        return
    edit.set(setting.key, yaml_literal(setting.default))
    assert not edit.problems().get(setting.key)
    assert all(line in edit.text for line in before.splitlines() if line.startswith("#"))


def test_a_full_recipe_keeps_every_comment(tmp_path):
    path = tmp_path / "full.yaml"
    text = dump_recipe(load_recipe(recipes_dir() / "athene.yaml"))
    path.write_text(text)
    edit = RecipeEdit.open(path)
    edit.set("lora.r", "16")
    edit.set("train.stop_loss", "0.05")
    assert changed_lines(text, edit.text) == (
        ["  r: 8\n", "  stop_loss: null\n"],
        ["  r: 16\n", "  stop_loss: 0.05\n"],
    )


def test_the_module_never_loads_mlx():
    code = "import sys, localdpo.recipe_edit; sys.exit(any(n.split('.')[0] == 'mlx' for n in sys.modules))"
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
