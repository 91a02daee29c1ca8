"""Tokenizer, weights and config are held against each other before a step: what does not fit is named, nothing is read
beyond an array, and a base that is broken is never called a training that diverged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from training import collect, of, recipe_for, workspace, write_rows

from localdpo.data.encode import encode_prompt
from localdpo.errors import InputError
from localdpo.model.load import load_model, open_model
from localdpo.model.safety import READ_QUANTISATIONS, check_config
from localdpo.train.events import EndEvent, StepEvent
from localdpo.train.inputs import read_inputs
from localdpo.train.loop import train
from localdpo.train.session import preflight

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    return tmp_path


def add_token(model: Path, text: str, special: bool = False) -> int:
    """Add a token behind all others to the tokenizer, and cut the embedding there; returns its id."""
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    highest = max([*tokenizer["model"]["vocab"].values(), *(token["id"] for token in tokenizer["added_tokens"])])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    number = highest + 1
    cut_embedding(model, number)
    tokenizer["added_tokens"].append({"id": number, "content": text, **flags})
    path.write_text(json.dumps(tokenizer))
    return number


def configure(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(model: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    path = model / "model.safetensors"
    weights = dict(mx.load(str(path)))
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})


def poison(name: str, value: float) -> Callable[[Path], str]:
    def apply(model: Path) -> str:
        def change(weights: dict[str, mx.array]) -> None:
            flat = np.array(weights[name].astype(mx.float32))
            flat.reshape(-1)[-1] = value
            weights[name] = mx.array(flat).astype(weights[name].dtype)

        change_weights(model, change)
        return rf"{name} holds values that are not finite"

    return apply


def configured(pattern: str, **changes: Any) -> Callable[[Path], str]:
    def apply(model: Path) -> str:
        configure(model, **changes)
        return pattern

    return apply


def cut_embedding(model: Path, rows: int) -> None:
    def change(weights: dict[str, mx.array]) -> None:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = weights[name][:rows]

    change_weights(model, change)
    configure(model, vocab_size=rows)


def shrink_embedding(model: Path) -> str:
    """As when a vocabulary was extended and the weights were not: the last ids have no row."""
    rows = 284
    cut_embedding(model, rows)
    return rf"as id [\d,]+, and its embedding has {rows:,} rows"


def drop_layer(model: Path) -> str:
    change_weights(model, lambda weights: [weights.pop(n) for n in list(weights) if "layers.0.mlp" in n])
    return "layers.0.mlp"


def foreign(method: str, **more: Any) -> Callable[[Path], str]:
    settings = {"quant_method": method, **more}
    return configured(
        rf"quantised with {method}, which MLX cannot read.*Take the original", quantization_config=settings
    )


DAMAGES: dict[str, Callable[[Path], str]] = {
    "ids beyond the embedding": shrink_embedding,
    "NaN in a norm": poison("model.norm.weight", float("nan")),
    "infinity in a matrix": poison("model.layers.0.mlp.down_proj.weight", float("inf")),
    "NaN in the embedding": poison("model.embed_tokens.weight", float("nan")),
    "NaN in the head": poison("lm_head.weight", float("-inf")),
    "a layer without its MLP": drop_layer,
    "more layers than weights": configured("model.layers.2", num_hidden_layers=8),
    "fewer layers than weights": configured("not in model", num_hidden_layers=1),
    "a larger vocabulary": configured("embed_tokens", vocab_size=5000),
    "another width": configured("shape", hidden_size=128, head_dim=16),
    "bitsandbytes": foreign("bitsandbytes", load_in_4bit=True),
    "hqq": foreign("hqq"),
    "quanto": foreign("quanto"),
    "torchao": foreign("torchao"),
    "gptq in 8 bits": foreign("gptq", bits=8),
    "compressed to float8": foreign("compressed-tensors", format="float-quantized"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_named_before_a_step(root: Path, damage: str) -> None:
    pattern = DAMAGES[damage](root / "model")
    seen: list[Any] = []
    with pytest.raises(InputError, match=f"(?s){pattern}") as found:
        seen.extend(train(recipe_for(root, data__eval=None)))
    assert found.value.exit_code == 2
    assert not of(seen, StepEvent)
    assert not (root / "runs" / "a" / "adapter").exists()


def test_a_quantised_base_has_its_scales_looked_at(tmp_path: Path) -> None:
    from tiny import tiny_model

    model = tiny_model(tmp_path / "m", quantize=4, dtype=mx.float16)
    poison("model.layers.1.self_attn.q_proj.scales", float("nan"))(model)
    with pytest.raises(InputError, match=r"model\.safetensors.*q_proj\.scales holds values that are not finite"):
        load_model(str(model))


def test_weights_are_looked_at_once_and_again_when_they_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = root / "model", []
    real = mx.isfinite
    monkeypatch.setattr(mx, "isfinite", lambda value: looked.append(1) or real(value))
    configure(model, name="of this test alone")
    load_model(str(model))
    assert looked
    looked.clear()
    load_model(str(model))
    assert not looked
    poison("model.norm.weight", float("nan"))(model)
    with pytest.raises(InputError, match="norm"):
        load_model(str(model))


def test_a_token_without_an_embedding_may_stand_unused(root: Path) -> None:
    number = add_token(root / "model", "<unused-pad>")
    loaded = load_model(str(root / "model"))
    assert loaded.tokenizer.encode("<unused-pad>", add_special_tokens=False) == [number]
    assert isinstance(collect(recipe_for(root, train__max_steps=1, data__eval=None))[-1], EndEvent)
    with pytest.raises(InputError, match=rf"'<unused-pad>' as id {number:,}, and its embedding has"):
        encode_prompt([{"role": "user", "content": "say <unused-pad>"}], loaded.tokenizer)


def test_a_row_that_uses_it_stops_the_run(root: Path) -> None:
    add_token(root / "model", "<ghost>")
    rows = [{"prompt": f"hello {n}", "chosen": "yes" + " <ghost>" * (n == 3), "rejected": "no"} for n in range(6)]
    write_rows(root / "pairs.jsonl", rows)
    with pytest.raises(InputError, match="<ghost>"):
        preflight(recipe := recipe_for(root, data__eval=None), read_inputs(recipe))


def test_a_base_that_scores_nothing_is_no_divergence(root: Path) -> None:
    """Finite weights whose products are not."""

    def change(weights: dict[str, mx.array]) -> None:
        weights["model.norm.weight"] = mx.full(weights["model.norm.weight"].shape, 3e38)
        weights["lm_head.weight"] = weights["lm_head.weight"].astype(mx.float32) * 1e30

    change_weights(root / "model", change)
    with pytest.raises(InputError, match="no finite log-prob for 24 of 24 rows before training") as found:
        collect(recipe_for(root, data__eval=None))
    assert found.value.exit_code == 2


def test_an_old_chat_template_file_is_read(root: Path) -> None:
    model = root / "model"
    before = encode_prompt(HELLO, load_model(str(model)).tokenizer).tolist()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = settings.pop("chat_template", None) or (model / "chat_template.jinja").read_text()
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(HELLO, load_model(str(model)).tokenizer)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert encode_prompt(HELLO, load_model(str(model)).tokenizer).tolist() == before
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (model / "chat_template.json").write_text(json.dumps({"chat_template": endless}))
    with pytest.raises(InputError, match="chat template"):
        load_model(str(model))


@pytest.mark.parametrize("method", sorted(READ_QUANTISATIONS))
def test_what_mlx_lm_reads_is_not_refused_by_its_name(method: str) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": method}}
    assert check_config(config, "config.json") == []


def test_mlx_quantisation_is_never_foreign() -> None:
    settings = {"group_size": 64, "bits": 4}
    config = {"model_type": "llama", "quantization": settings, "quantization_config": settings}
    assert check_config(config, "config.json") == []


def test_opening_without_reading_refuses_foreign_weights_too(root: Path) -> None:
    configure(root / "model", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(InputError, match="bitsandbytes"):
        open_model(str(root / "model"))
