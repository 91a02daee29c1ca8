from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from localdpo.errors import InputError
from localdpo.recipe import Recipe, dump_recipe, load_recipe, recipe_schema
from localdpo.settings import fields_of
from localdpo.yamlfile import parse_yaml, read_yaml

SHORT = "model: smollm2-135m\ndata: {train: pairs.jsonl}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pairs.jsonl").write_text("")
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    path = folder / "athene.yaml"
    path.write_text(text, "utf-8")
    return load_recipe(path, overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(folder, text, *overrides)
    return [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]


def test_two_lines_are_a_whole_recipe(folder: Path):
    recipe = load(folder, SHORT)
    assert recipe.model == "smollm2-135m"
    assert recipe.data.train == folder / "pairs.jsonl"
    assert recipe.output_dir == Path("runs/athene")
    assert (recipe.data.eval, recipe.data.retain, recipe.data.probes) == (0.1, "everyday", None)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.target_modules) == (8, 16.0, "all-linear")
    assert (recipe.dpo.beta, recipe.dpo.loss_type, recipe.dpo.rpo_alpha) == (0.1, "sigmoid", 1.0)
    assert (recipe.train.learning_rate, recipe.train.num_train_epochs) == (1e-4, 3.0)
    assert not recipe.dpo.reference_free


def test_every_setting_has_a_description_for_people():
    for path, info in fields_of(Recipe):
        assert info.description, path
        assert info.description.endswith("."), path


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "simpo"])
def test_label_smoothing_where_it_is_defined(folder: Path, loss: str):
    recipe = load(folder, SHORT + f"dpo: {{loss_type: {loss}, label_smoothing: 0.1}}\n")
    assert recipe.dpo.label_smoothing == 0.1
    assert recipe.dpo.reference_free == (loss == "simpo")


@pytest.mark.parametrize("number", ["1e-5", "1.0e-5", "0.00001", "1E-05"])
def test_1e_5_is_a_float(folder: Path, number: str):
    assert load(folder, SHORT + f"train: {{learning_rate: {number}}}\n").train.learning_rate == 1e-5


def test_yaml_1_2_scalars():
    text = "a: yes\nb: 0o17\nc: 017\nd: 0x1F\ne: .inf\nf: ~\ng:\nh: '3'\ni: 2001-01-01\nj: true\nk: -1_000\nl: -.Inf"
    value = parse_yaml(text, "x").value
    assert value == {
        "a": "yes", "b": 15, "c": 17, "d": 31, "e": float("inf"), "f": None, "g": None, "h": "3",
        "i": "2001-01-01", "j": True, "k": -1000, "l": float("-inf"),
    }  # fmt: skip


def test_every_problem_at_once_in_the_order_of_the_lines(folder: Path):
    text = """model: smollm2-135m
lr: 3
data:
  trian: foo
  eval: 0.7
  retain: 3
lora: {r: 0, rank: 3, target_modules: 3}
dpo:
  beta: -1
  loss_type: ipo
  label_smoothing: 0.1
train:
  max_steps: .nan
  eval_steps: true
"""
    found = problems(folder, text, "train.warmup_ratio=2")
    starts = [
        "athene.yaml:2 lr: is not a key of a recipe. Did you mean train.learning_rate?",
        "athene.yaml:3 data.train: is missing. JSONL file of preference pairs.",
        "athene.yaml:4 data.trian: is not a key of a recipe. Did you mean data.train?",
        "athene.yaml:5 data.eval: 0.7 should be less than or equal to 0.5. Pairs held out",
        "athene.yaml:6 data.retain: 3 is not accepted here. Prompts whose answers must stay",
        "athene.yaml:7 lora.r: 0 should be greater than or equal to 1. Rank of the adapter.",
        "athene.yaml:7 lora.rank: is not a key of a recipe. Did you mean lora.r?",
        "athene.yaml:7 lora.target_modules: 3 is not accepted here. Which layers",
        "athene.yaml:9 dpo.beta: -1 should be greater than 0. How far",
        "--set train.warmup_ratio: 2 should be less than or equal to 1. The fraction",
        "athene.yaml:13 train.max_steps: nan is not a valid integer. Stop after",
        "athene.yaml:14 train.eval_steps: true is not a valid integer. Evaluate",
        "athene.yaml:11 dpo.label_smoothing: is 0.1, but the loss ipo has no label smoothing. Set it to 0",
    ]
    # A --set key has no line of its own: it comes with the section it belongs to.
    assert len(found) == len(starts)
    for start in starts:
        assert [line for line in found if line.startswith(start)], start


@pytest.mark.parametrize(
    ("extra", "where"),
    [
        ("dpo: {beta: 0}", "dpo.beta: 0 should be greater than 0"),
        ("dpo: {beta: .inf}", "dpo.beta: inf should be a finite number"),
        ("train: {learning_rate: .nan}", "train.learning_rate: nan should be a finite number"),
        ("train: {learning_rate: 0}", "train.learning_rate: 0 should be greater than 0"),
        ("train: {learning_rate: '1e-5'}", "train.learning_rate: '1e-5' is not a valid number"),
        ("train: {learning_rate: true}", "train.learning_rate: true is not a valid number"),
        ("train: {max_steps: 0}", "train.max_steps: is 0, which trains nothing"),
        ("train: {max_steps: 5, warmup_steps: 5}", "train.warmup_steps: is 5, which leaves none"),
        ("lora: {r: 0}", "lora.r: 0 should be greater than or equal to 1"),
        ("lora: {r: 8.5}", "lora.r: 8.5 is not a valid integer"),
        ("lora: {target_modules: []}", "lora.target_modules: [] "),
        ("lora: {num_layers: 0}", "lora.num_layers: 0 should be greater than or equal to 1"),
        ("dpo: {label_smoothing: 0.5}", "dpo.label_smoothing: 0.5 should be less than 0.5"),
        ("dpo: {label_smoothing: -0.1}", "dpo.label_smoothing: -0.1 should be greater than or equal to 0"),
        ("dpo: {loss_type: robust}", "dpo.label_smoothing: must be above 0 for the loss robust"),
        ("dpo: {loss_type: hinge, label_smoothing: 0.1}", "dpo.label_smoothing: is 0.1, but the loss hinge"),
        ("dpo: {simpo_gamma: 1.0}", "dpo.simpo_gamma: has no effect on the loss sigmoid"),
        ("dpo: {loss_type: dpo}", "dpo.loss_type: 'dpo' should be 'sigmoid', 'ipo'"),
        ("dpo: {rpo_alpha: -1}", "dpo.rpo_alpha: -1 should be greater than or equal to 0"),
        ("quantize: 5", "quantize: 5 should be 2, 3, 4, 6 or 8"),
        ("quantize: true", "quantize: true should be 2, 3, 4, 6 or 8"),
        ("seed: -1", "seed: -1 should be greater than or equal to 0"),
        ("train: 3", "train: must be a section with keys of its own. Its keys are learning_rate,"),
        ("train: {save_total_limit: 0}", "train.save_total_limit: 0 should be greater"),
    ],
)
def test_bad_values_are_refused(folder: Path, extra: str, where: str):
    (problem,) = problems(folder, SHORT + extra + "\n")
    assert problem.startswith(f"athene.yaml:3 {where}")


@pytest.mark.parametrize("key", ["eval_steps", "early_stopping_patience"])
@pytest.mark.parametrize("nothing", ["null", "0", "0.0"])
def test_what_needs_held_out_pairs_says_so(folder: Path, key: str, nothing: str):
    text = SHORT + f"train: {{{key}: 2}}\n"
    (problem,) = problems(folder, text, f"data.eval={nothing}")
    assert problem.startswith(f"athene.yaml:3 train.{key}: needs held-out pairs")


@pytest.mark.parametrize(
    ("extra", "suggestion"),
    [
        ("dpo: {bta: 1}", "dpo.beta"),
        ("train: {lr: 1}", "train.learning_rate"),
        ("train: {leraning_rate: 1}", "train.learning_rate"),
        ("learning_rate: 1", "train.learning_rate"),
        ("beta: 1", "dpo.beta"),
        ("train: {batch_size: 1}", "train.per_device_train_batch_size"),
        ("lora: {lora_alpha: 1}", "lora.alpha"),
        ("modle: x", "model"),
        ("trian: {}", "train"),
    ],
)
def test_did_you_mean(folder: Path, extra: str, suggestion: str):
    (problem,) = problems(folder, SHORT + extra + "\n")
    assert problem.endswith(f"is not a key of a recipe. Did you mean {suggestion}?")


def test_a_key_like_no_other_gets_the_list(folder: Path):
    (problem,) = problems(folder, SHORT + "zzz: 1\n")
    assert problem == (
        "athene.yaml:3 zzz: is not a key of a recipe. "
        "Keys here are data, dpo, lora, method, model, output_dir, quantize, seed, train."
    )


def test_overrides_parse_as_yaml_and_the_last_one_counts(folder: Path):
    overrides = (
        "dpo.beta=1e-1",
        "dpo.beta=0.3",
        "lora.target_modules=[q_proj, v_proj]",
        "train.eval_steps=null",
    )
    recipe = load(folder, SHORT + "dpo: {beta: 0.5}\n", *overrides, "seed=7", "train.gradient_checkpointing=true")
    assert recipe.dpo.beta == 0.3
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert (recipe.seed, recipe.train.gradient_checkpointing) == (7, True)


def test_an_override_can_supply_what_is_missing(folder: Path):
    recipe = load(folder, "model: x\n", f"data.train={folder / 'pairs.jsonl'}")
    assert recipe.data.train == folder / "pairs.jsonl"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("beta", "--set beta: is not of the form key=value. Write --set section.key=value"),
        (".beta=1", "--set .beta=1: is not of the form key=value"),
        ("dpo.beta=[", "--set dpo.beta: is not YAML"),
        ("dpo.beta=-1", "--set dpo.beta: -1 should be greater than 0"),
        ("dpo.bta=1", "--set dpo.bta: is not a key of a recipe. Did you mean dpo.beta?"),
        ("dpo=3", "--set dpo: must be a section"),
        ("dpo={beta: -1}", "--set dpo.beta: -1 should be greater than 0"),
        ("dpo.label_smoothing=!!python/name:os.system", "--set dpo.label_smoothing: the tag"),
    ],
)
def test_bad_overrides_are_named(folder: Path, override: str, problem: str):
    (found,) = problems(folder, SHORT, override)
    assert found.startswith(problem)


def test_files_are_relative_to_the_recipe_and_overrides_to_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    here = folder / "here"
    (here / "sub").mkdir(parents=True)
    for file in (folder / "e.jsonl", folder / "r.jsonl", here / "sub" / "p.jsonl"):
        file.write_text("")
    monkeypatch.chdir(here)
    text = "model: ../m\ndata: {train: pairs.jsonl, eval: ./e.jsonl, retain: here/../r.jsonl}\noutput_dir: out\n"
    recipe = load(folder, text, "data.probes=sub/p.jsonl")
    assert recipe.model == str(folder.parent / "m")
    assert recipe.data.eval == folder / "e.jsonl"
    assert recipe.data.retain == folder / "r.jsonl"
    assert recipe.data.probes == here / "sub" / "p.jsonl"
    assert recipe.output_dir == Path("out")


@pytest.mark.parametrize("name", ["smollm2-135m", "org/name", "org/name@v1"])
def test_a_model_that_is_no_path_is_left_alone(folder: Path, name: str):
    assert load(folder, SHORT, f"model={name}").model == name


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(folder))
    recipe = load(folder, "model: ~/m\ndata: {train: ~/pairs.jsonl}\noutput_dir: ~/out\n")
    assert (recipe.model, recipe.data.train) == (str(folder / "m"), folder / "pairs.jsonl")
    assert recipe.output_dir == folder / "out"


def test_missing_files_are_named_all_of_them(folder: Path):
    text = "model: x\ndata:\n  train: a.jsonl\n  eval: b.jsonl\n  probes: .\n"
    assert problems(folder, text) == [
        "athene.yaml:3 data.train: a.jsonl: there is no such file. Paths in a recipe are relative to its folder.",
        "athene.yaml:4 data.eval: b.jsonl: there is no such file. Paths in a recipe are relative to its folder.",
        f"athene.yaml:5 data.probes: {folder}: is a folder, not a file. Paths in a recipe are relative to its folder.",
    ]
    assert load_recipe(folder / "athene.yaml", check_files=False).data.train == folder / "a.jsonl"


def test_a_name_longer_than_the_system_allows_is_a_missing_file(folder: Path):
    (found,) = problems(folder, f"model: x\ndata: {{train: {'x' * 400}}}\n")
    assert "there is no such file" in found


def test_empty_sections_count_as_absent(folder: Path):
    assert load(folder, SHORT + "train:\nlora:\n") == load(folder, SHORT)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "athene.yaml model: is missing"),
        ("- a\n", "athene.yaml:1: must be a mapping of keys to values"),
        ("just text\n", "athene.yaml:1: must be a mapping"),
        ("model: a\nmodel: b\n", "athene.yaml:2: the key 'model' is already on line 1. Keep one of the two."),
        ("dpo: {beta: 1, beta: 2}\n", "athene.yaml:1: the key 'beta' is already on line 1"),
        ("model: !!python/object/apply:os.system [x]\n", "athene.yaml:1: the tag !!python/object/apply:os.system is"),
        ("model: !custom x\n", "athene.yaml:1: the tag !custom is not allowed"),
        ("dpo: !!python/dict {beta: 1}\n", "athene.yaml:1: the tag !!python/dict is not allowed"),
        ("model: !!int abc\n", "athene.yaml:1: 'abc' is not a value of type int"),
        ("? [a, b]\n: c\n", "athene.yaml:1: a key must be plain text"),
        ("model: [\n", "athene.yaml:2: is not YAML"),
        ("model: a: b\n", "athene.yaml:1: is not YAML: mapping values are not allowed here."),
        ("model: a\n---\nmodel: b\n", "athene.yaml:2: is not YAML"),
        ("model: a\n\tlora: b\n", "athene.yaml:2: is not YAML"),
        ("model: a\x00b\n", "athene.yaml: is not YAML"),
        ("a: &a [*a]\n", "athene.yaml:1: is nested deeper than 24"),
        ("a: " + "[" * 50_000, "athene.yaml: has more than 500 brackets"),
        ("a: " + "[" * 400, "athene.yaml:1: is not YAML"),
        ("- " * 5000, "athene.yaml: is nested deeper than 24"),
        ("a: " + "[" * 40 + "]" * 40, "athene.yaml:1: is nested deeper than 24"),
        ("a: " + "9" * 5000, "athene.yaml:1: '9999"),
        ("# " + "x" * 100_000, "athene.yaml: has more than 100,000 characters. Is this the right file?"),
    ],
)  # fmt: skip
def test_yaml_that_is_broken_or_hostile(folder: Path, text: str, problem: str):
    assert problems(folder, text)[0].startswith(problem)


def test_an_alias_bomb_is_cut_off(folder: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "is too large once expanded" in problems(folder, "\n".join(lines))[0]


def test_plain_aliases_work():
    assert parse_yaml("a: &x {b: 1}\nc: *x\n", "x").value == {"a": {"b": 1}, "c": {"b": 1}}


def test_utf_8_with_a_byte_order_mark_and_nothing_else(folder: Path):
    assert read_yaml(b"\xef\xbb\xbfa: 1", "x").value == {"a": 1}
    with pytest.raises(InputError, match=r"x: is not UTF-8 \(byte 3\). Save it as UTF-8"):
        read_yaml(b"a: \xff", "x")


def test_a_recipe_that_is_not_there(tmp_path: Path):
    with pytest.raises(InputError, match="there is no such recipe"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="directory"):
        load_recipe(tmp_path)


def test_problems_show_control_characters_inert(folder: Path):
    (problem,) = problems(folder, SHORT + 'quantize: "\\e]52;c;x\\a"\n')
    assert "\x1b" not in problem


def test_dump_and_load_give_the_same_recipe(folder: Path):
    overrides = (
        "train.learning_rate=1e-5", "lora.target_modules=[q_proj]", "data.eval=null", "dpo.loss_type=robust",
        "dpo.label_smoothing=0.1", "quantize=4", "train.warmup_steps=3", "data.retain=null",
    )  # fmt: skip
    recipe = load(folder, SHORT, *overrides)
    elsewhere = folder / "run" / "recipe.yaml"
    elsewhere.parent.mkdir()
    elsewhere.write_text(dump_recipe(recipe), "utf-8")
    assert load_recipe(elsewhere) == recipe


def test_a_dump_explains_every_key(folder: Path):
    text = dump_recipe(load(folder, SHORT))
    for path, info in fields_of(Recipe):
        assert f"{path[-1]}:" in text
        assert str(info.description).split()[0] in text
    assert max(map(len, text.splitlines())) <= 110 or str(folder) in text


@settings(max_examples=25, deadline=None)
@given(
    beta=st.floats(1e-8, 1e8),
    rate=st.floats(1e-12, 1.0),
    seed=st.integers(0, 2**32 - 1),
    model=st.text(min_size=1, max_size=20).filter(lambda s: s.strip() == s),
)
def test_any_values_survive_a_dump(beta: float, rate: float, seed: int, model: str):
    recipe = Recipe.model_validate(
        {
            "model": model,
            "data": {"train": "x"},
            "seed": seed,
            "dpo": {"beta": beta},
            "train": {"learning_rate": rate},
        }
    )
    # What YAML cannot hold (control characters) is refused when read, so it is left out here.
    if model.isprintable():
        again = Recipe.model_validate(parse_yaml(dump_recipe(recipe), "x").value)
        assert again == recipe


def test_recipes_made_in_python_are_checked_too():
    values: dict[str, Any] = {"model": "x", "data": {"train": "x"}, "dpo": {"loss_type": "robust"}}
    with pytest.raises(ValidationError, match="label_smoothing must be above 0"):
        Recipe.model_validate(values)


def test_the_schema_describes_every_key():
    schema = recipe_schema()
    json.dumps(schema)
    assert schema["required"] == ["model", "data"]
    assert schema["additionalProperties"] is False
    definitions = schema["$defs"]
    assert definitions["TrainRecipe"]["properties"]["learning_rate"]["exclusiveMinimum"] == 0
    for section in ("DataRecipe", "LoraRecipe", "DPORecipe", "TrainRecipe"):
        for key, value in definitions[section]["properties"].items():
            assert value["description"], key
