"""To PEFT and from it: tensors, settings and logits are those of PEFT itself; ``golden/make_peft.py`` asked it."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import exporting
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny

from localdpo.catalogue import CATALOGUE, UPSTREAM
from localdpo.errors import InputError
from localdpo.export.names import SAME_NAMES
from localdpo.export.source import find_source
from localdpo.export.targets import Options, export
from localdpo.model.load import load_model
from localdpo.model.lora import load_adapter, lora_scale

OURS = ("all", "rslora", "subset", "top1")
SAID = ("r", "lora_alpha", "use_rslora", "layers_to_transform", "rank_pattern", "alpha_pattern", "bias", "use_dora",
        "peft_type", "task_type", "fan_in_fan_out", "modules_to_save")  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exporting.golden_base(tmp_path_factory.mktemp("golden") / "base")


def ours(case: str, base: Path, folder: Path) -> Path:
    """The golden adapter of a case in mlx-lm's form, written here by hand."""
    config, tensors = exporting.PEFT["cases"][case], exporting.golden_tensors(case)
    stored = {
        name.removeprefix("base_model.model.")
        .replace(".lora_A.weight", ".lora_a")
        .replace(".lora_B.weight", ".lora_b"): (mx.array(np.ascontiguousarray(value.T)))
        for name, value in tensors.items()
    }
    keys = sorted({name.split(".", 3)[3].rpartition(".")[0] for name in stored})
    layers = len({name.split(".")[2] for name in stored})
    scale = lora_scale(config["lora_alpha"], config["r"], config["use_rslora"])
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), stored)
    parameters = {"rank": config["r"], "scale": scale, "dropout": 0.0, "keys": keys}
    described = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters, "model": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return folder


def run_of(case: str, base: Path, folder: Path) -> Path:
    """A run folder around that adapter, whose recipe says alpha and use_rslora as PEFT does."""
    config = exporting.PEFT["cases"][case]
    ours(case, base, folder.parent / f"{case}-adapter").rename(_made(folder) / "adapter")
    recipe = {
        "model": str(base),
        "data": {"train": "pairs.jsonl"},
        "lora": {"r": config["r"], "alpha": float(config["lora_alpha"]), "use_rslora": config["use_rslora"]},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "run.json").write_text("{}")
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize("case", OURS)
def test_our_logits_are_those_of_peft(case: str, base: Path, tmp_path: Path) -> None:
    loaded = load_model(str(base))
    bare = exporting.logits(loaded.model)
    load_adapter(ours(case, base, tmp_path / "adapter"), loaded)
    mine, theirs = exporting.logits(loaded.model), exporting.golden_logits(case)
    assert np.abs(mine - bare).max() > 0.1  # the adapter says something
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", OURS)
def test_the_export_is_what_peft_saved(case: str, base: Path, tmp_path: Path) -> None:
    done = export(find_source(run_of(case, base, tmp_path / "run")), "peft", tmp_path / "out")
    tensors, theirs = mx.load(str(tmp_path / "out" / "adapter_model.safetensors")), exporting.golden_tensors(case)
    assert set(tensors) == set(theirs)
    for name, value in theirs.items():
        np.testing.assert_array_equal(np.array(tensors[name]), value)
    config, golden = json.loads((tmp_path / "out" / "adapter_config.json").read_text()), exporting.PEFT["cases"][case]
    assert {key: config[key] for key in SAID} == {key: golden[key] for key in SAID}
    assert config["target_modules"] == golden["target_modules"]
    assert config["base_model_name_or_path"] == str(base)
    assert done.files["adapter_model.safetensors"] > 0
    assert f'from_pretrained("{base}")' in (tmp_path / "out" / "README.md").read_text()


def test_a_bare_adapter_says_its_scale_as_alpha(base: Path, tmp_path: Path) -> None:
    export(find_source(ours("rslora", base, tmp_path / "adapter")), "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (16, False)  # 8 / sqrt(4) = 16 / 4


def test_the_base_of_every_catalogue_model_is_its_original() -> None:
    assert set(UPSTREAM) == {entry.name for entry in CATALOGUE}
    assert not [name for name in UPSTREAM.values() if "mlx" in name.lower() or name.count("/") != 1]


def test_a_name_for_the_base_can_be_given(base: Path, tmp_path: Path) -> None:
    source = find_source(ours("subset", base, tmp_path / "adapter"))
    export(source, "peft", tmp_path / "out", options=Options(base="someone/original"))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/original"
    assert "base_model: someone/original" in (tmp_path / "out" / "README.md").read_text()


def test_a_quantised_base_is_remarked_on(tmp_path: Path) -> None:
    folder = tiny.tiny_model(tmp_path / "base", quantize=4)
    adapter = exporting.tiny_adapter(tmp_path / "adapter", folder)
    done = export(find_source(adapter, str(folder)), "peft", tmp_path / "out")
    assert any("PyTorch cannot load" in note for note in done.written.notes)


def test_experts_are_refused(tmp_path: Path) -> None:
    overrides = {"num_local_experts": 4, "num_experts_per_tok": 2}
    folder = tiny.tiny_model(tmp_path / "base", model_type="mixtral", overrides=overrides)
    adapter = exporting.tiny_adapter(tmp_path / "adapter", folder)
    with pytest.raises(InputError, match="the layers of a 'mixtral' model differently"):
        export(find_source(adapter), "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


EXTRA: dict[str, dict[str, Any]] = {
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16},
    "cohere": {"logit_scale": 1.0, "use_qk_norm": False, "layer_norm_bias": False},
    "cohere2": {"logit_scale": 1.0, "sliding_window": 16, "sliding_window_pattern": 4, "layer_norm_bias": False},
    "granite": dict.fromkeys(
        ("logits_scaling", "attention_multiplier", "embedding_multiplier", "residual_multiplier"), 1.0
    ),
    "phi": {"partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("kind", sorted(SAME_NAMES))
def test_transformers_names_the_linear_layers_alike(kind: str) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"intermediate_size": 96, "vocab_size": 384, "head_dim": 16, "rope_theta": 1e4, "tie_word_embeddings": True}
    norms = dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_epsilon"), 1e-5)
    rest = {"max_position_embeddings": 512, "attention_bias": False, "mlp_bias": False}
    module = importlib.import_module(f"mlx_lm.models.{'llama' if kind == 'mistral' else kind}")
    config = {"model_type": kind, **sizes, **more, **norms, **rest, **EXTRA.get(kind, {})}
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name]
    assert sorted(names) == exporting.PEFT["linears"][kind]


PROGRAM = """
import json, sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.no_grad():
    np.save(out, model(torch.tensor(json.loads(ids))).logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", OURS)
def test_peft_loads_the_export_and_answers_as_we_do(case: str, base: Path, tmp_path: Path, peft_python: str) -> None:
    export(find_source(run_of(case, base, tmp_path / "run")), "peft", tmp_path / "out")
    command = [peft_python, "-c", PROGRAM, str(base), str(tmp_path / "out"), json.dumps(exporting.PEFT["ids"])]
    subprocess.run([*command, str(tmp_path / "logits.npy")], check=True, capture_output=True)
    loaded = load_model(str(base))
    load_adapter(tmp_path / "run" / "adapter", loaded, any_base=True)
    np.testing.assert_allclose(exporting.logits(loaded.model), np.load(tmp_path / "logits.npy"), rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def peft_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter with PEFT: this one, that of $LOCALDPO_PEFT_PYTHON, or one in an environment made by uv."""
    import os

    given = os.environ.get("LOCALDPO_PEFT_PYTHON")
    if given:
        return given
    if importlib.util.find_spec("peft"):
        return sys.executable
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("neither peft nor uv is there")
    home = tmp_path_factory.mktemp("peft") / "venv"
    subprocess.run([uv, "venv", "--quiet", str(home)], check=True)
    python = str(home / "bin" / "python")
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "torch", "transformers", "peft"], check=True)
    return python
