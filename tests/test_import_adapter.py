"""Adapters made elsewhere become runs: PEFT's answer as PEFT does, mlx-lm's as mlx-lm does; the rest is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exporting
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.tuner.utils import load_adapters as theirs_load
from mlx_lm.utils import load_model as theirs_model
from training import adapter_arrays, collect, of, recipe_for, workspace
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.console.talk import find_target
from localdpo.errors import InputError
from localdpo.evaluate.heldout import evaluate_run
from localdpo.export.importing import _ours, import_adapter
from localdpo.model.load import load_model
from localdpo.model.lora import load_adapter
from localdpo.recipe import load_recipe
from localdpo.train.events import StepEvent
from localdpo.train.run import RunFolder, find_runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporting.golden_base(tmp_path_factory.mktemp("golden") / "base")


def mlx_lm_adapter(folder: Path, base: Path, keys: list[str] | None, layers: int = 1) -> Path:
    """An adapter as mlx_lm.lora leaves it: no word of ours in its config."""
    model, _ = theirs_model(base)
    parameters: dict[str, Any] = {"rank": 4, "scale": 3.0, "dropout": 0.0}
    if keys is not None:
        parameters["keys"] = keys
    model.freeze()
    linear_to_lora_layers(model, layers, parameters)
    tiny.randomise_adapter(model, seed=1, scale=0.2)
    folder.mkdir()
    weights = dict(tree_flatten(model.trainable_parameters()))
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters, "model": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"iters": 100, "batch_size": 4}))
    return folder


@pytest.mark.parametrize("case", list(exporting.PEFT["cases"]))
def test_a_run_from_peft_answers_as_peft_did(case: str, base: Path, tmp_path: Path) -> None:
    done = import_adapter(exporting.golden_peft(case, tmp_path / "peft"), tmp_path / "run", model=str(base))
    loaded = load_model(str(base))
    load_adapter(tmp_path / "run" / "adapter", loaded)  # our own check of the base included
    np.testing.assert_allclose(exporting.logits(loaded.model), exporting.golden_logits(case), rtol=0, atol=1e-4)
    assert done.format == "peft"
    assert done.named_base == "model"


@pytest.mark.parametrize(("keys", "layers"), [(None, 2), (["self_attn.q_proj", "mlp.up_proj"], 1)])
def test_a_run_from_mlx_lm_answers_as_mlx_lm_does(
    keys: list[str] | None, layers: int, base: Path, tmp_path: Path
) -> None:
    adapter = mlx_lm_adapter(tmp_path / "adapter", base, keys, layers)
    import_adapter(adapter, tmp_path / "run")
    loaded = load_model(str(base))
    load_adapter(tmp_path / "run" / "adapter", loaded)
    theirs = theirs_load(theirs_model(base)[0], str(adapter))
    np.testing.assert_allclose(exporting.logits(loaded.model), exporting.logits(theirs), rtol=0, atol=1e-4)


def test_the_run_is_one_like_others_and_says_its_reference(base: Path, tmp_path: Path) -> None:
    done = import_adapter(exporting.golden_peft("top1", tmp_path / "peft"), tmp_path / "runs" / "a", model=str(base))
    (run,) = find_runs(tmp_path / "runs")
    status, info = run.status(), run.info()
    assert status is not None
    assert (status.state, status.reason) == ("finished", "imported")
    assert info["imported"]["reference"] == "base"
    assert info["imported"]["format"] == "peft"
    assert any("reference is the base without this adapter" in line for line in done.lines())
    target = find_target(run.path, None)  # what chat and serve load
    assert (target.model, target.adapter) == (str(base), run.adapter)
    assert find_target(run.adapter, None) == target  # the adapter alone says its base too
    recipe = load_recipe(run.recipe_file, check_files=False)
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.num_layers) == (4, 2.0, 1)
    assert recipe.lora.target_modules == ("mlp.down_proj", "mlp.gate_proj", "mlp.up_proj")
    assert [event.reason for event in run.events().events] == ["imported"]  # type: ignore[attr-defined]


def test_it_is_evaluated_on_pairs_that_are_named(tmp_path: Path) -> None:
    base = tiny.tiny_model(tmp_path / "base", tie_word_embeddings=False)
    run = import_adapter(mlx_lm_adapter(tmp_path / "adapter", base, None), tmp_path / "run").run
    with pytest.raises(InputError, match="imported, without pairs"):
        evaluate_run(run)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "who?", "chosen": "me", "rejected": "you, I think"}\n')
    held = evaluate_run(run, pairs)
    assert held.pairs == 1
    assert abs(held.metrics["eval_rewards/margins"]) > 1e-3  # against the base: the adapter says something


@pytest.mark.parametrize("reference", ["base", "init"])
def test_a_run_goes_on_from_it(reference: str, tmp_path: Path) -> None:
    root = workspace(tmp_path)
    adapter = mlx_lm_adapter(tmp_path / "adapter", root / "model", ["self_attn.q_proj", "mlp.up_proj"])
    run = import_adapter(adapter, tmp_path / "imported").run
    lora = load_recipe(run / "recipe.yaml", check_files=False).lora.model_dump() | {"init_from": run / "adapter"}
    recipe = recipe_for(root, lora=lora, dpo__reference=reference, train__max_steps=1, train__learning_rate=1e-6)
    steps = of(collect(recipe), StepEvent)
    rewards = [steps[0].metrics[f"rewards/{side}"] for side in ("chosen", "rejected")]
    if reference == "init":
        assert rewards == pytest.approx([0, 0], abs=1e-4)  # nothing learned yet
    else:
        assert min(map(abs, rewards)) > 1e-3  # the adapter has moved it from the base already
    before, after = (adapter_arrays(folder) for folder in (run / "adapter", tmp_path / "runs" / "a" / "adapter"))
    assert set(before) == set(after)
    for name, value in before.items():
        np.testing.assert_allclose(np.array(after[name]), np.array(value), atol=1e-4)


def test_a_name_of_the_catalogue_stands_for_its_original() -> None:
    assert _ours("Qwen/Qwen3-0.6B") == "qwen3-0.6b"
    assert _ours("someone/else") == "someone/else"


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA"),
    "ia3": ({"peft_type": "IA3"}, "only LoRA"),
    "bias": ({"bias": "all"}, "without biases"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "changes the base"),
    "alpha": ({"lora_alpha": 0}, "is not a number other than 0"),
    "alpha text": ({"lora_alpha": "16"}, "is not a number other than 0"),
    "dropout": ({"lora_dropout": 7}, "lora_dropout"),
    "patterns": ({"alpha_pattern": {"(a+)+$": 4}}, "plain module names"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_other_kinds_are_refused_in_a_sentence(name: str, base: Path, tmp_path: Path) -> None:
    folder = exporting.golden_peft("subset", tmp_path / "peft")
    change, said = REFUSED[name]
    config = json.loads((folder / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=said):
        import_adapter(folder, tmp_path / "run", model=str(base))
    assert not (tmp_path / "run").exists()


A, B = (f"base_model.model.model.layers.1.self_attn.q_proj.lora_{matrix}.weight" for matrix in "AB")
DAMAGE = {
    "not finite": ({A: mx.full((2, 32), float("nan"))}, "not finite"),
    "rank": ({B: mx.zeros((32, 3))}, "not of one rank"),
    "width": ({A: mx.ones((2, 48))}, "do not fit this model"),
    "half": ({A: None}, "has no lora_A"),
    "dora": ({A.replace("lora_A.weight", "lora_magnitude_vector"): mx.ones((32,))}, "belongs to DoRA"),
    "embedding": ({"base_model.model.model.embed_tokens.lora_embedding_A": mx.ones((2, 128))}, "adapts an embedding"),
    "whole weight": ({"base_model.model.lm_head.weight": mx.ones((4, 4))}, "is no LoRA matrix"),
    "layer": (
        {A.replace("layers.1", "layers.9"): mx.ones((2, 32)), B.replace("layers.1", "layers.9"): mx.ones((32, 2))},
        "none of the 2 blocks",
    ),
    "name": (
        {A.replace("q_proj", "z_proj"): mx.ones((2, 32)), B.replace("q_proj", "z_proj"): mx.ones((32, 2))},
        "matches no linear layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_is_named(name: str, base: Path, tmp_path: Path) -> None:
    folder = exporting.golden_peft("subset", tmp_path / "peft")
    change, said = DAMAGE[name]
    tensors = {n: mx.array(v) for n, v in exporting.golden_tensors("subset").items()} | change
    kept = {n: v for n, v in tensors.items() if v is not None}
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), kept)
    with pytest.raises(InputError, match=said):
        import_adapter(folder, tmp_path / "run", model=str(base))
    assert not (tmp_path / "run").exists()


def test_trailing_bytes_are_refused(base: Path, tmp_path: Path) -> None:
    folder = exporting.golden_peft("subset", tmp_path / "peft")
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match="damaged safetensors"):
        import_adapter(folder, tmp_path / "run", model=str(base))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapters.npz"])
def test_pickles_are_refused(name: str, base: Path, tmp_path: Path) -> None:
    folder = exporting.golden_peft("subset", tmp_path / "peft")
    (folder / "adapter_model.safetensors").rename(folder / name)
    with pytest.raises(InputError, match="pickled"):
        import_adapter(folder, tmp_path / "run", model=str(base))


def test_another_base_is_refused(tmp_path: Path) -> None:
    first = tiny.tiny_model(tmp_path / "first", seed=1)
    second = tiny.tiny_model(tmp_path / "second", seed=2)
    adapter = exporting.tiny_adapter(tmp_path / "adapter", first)
    with pytest.raises(InputError, match="trained on another base"):
        import_adapter(adapter, tmp_path / "run", model=str(second))


def test_what_is_no_adapter_is_said(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "adapter_config.json").write_text("{}")
    for folder, said in (("none", "not a folder"), ("empty", "has no adapter_config"), ("odd", "neither mlx-lm's")):
        with pytest.raises(InputError, match=said):
            import_adapter(tmp_path / folder, tmp_path / "run", model=str(base))


def test_a_run_that_is_there_is_kept(base: Path, tmp_path: Path) -> None:
    adapter = exporting.golden_peft("subset", tmp_path / "peft")
    import_adapter(adapter, tmp_path / "run", model=str(base))
    with pytest.raises(InputError, match="holds a run already"):
        import_adapter(adapter, tmp_path / "run", model=str(base))
    done = import_adapter(adapter, tmp_path / "run", model=str(base), force=True)
    assert done.set_aside == tmp_path / "run.1"
    assert RunFolder(tmp_path / "run.1").info()["imported"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="is no run"):
        import_adapter(adapter, tmp_path / "mine", model=str(base), force=True)


def test_the_command(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exporting.golden_peft("subset", tmp_path / "taught")
    done = CliRunner().invoke(app, ["import-adapter", "taught", "--model", str(base), "--json"])
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["run"], told["format"], told["reference"], told["lora"]["rank"]) == ("runs/taught", "peft", "base", 2)
    again = CliRunner().invoke(app, ["import-adapter", "taught", "--model", str(base)])
    assert again.exit_code == 2
    assert "--force" in again.stderr
    shown = CliRunner().invoke(app, ["import-adapter", "taught", "--model", str(base), "--out", "b"])
    assert "localdpo chat b --compare" in shown.stdout
    assert "lora.init_from=b/adapter --set lora.r=2 --set lora.alpha=3.0" in shown.stdout
