"""Fused models: the arithmetic, what is stored, that others load it, and that a lossy one is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exporting
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from mlx.utils import tree_flatten
from mlx_lm.utils import load as theirs_load
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.errors import EnvironmentFault, InputError
from localdpo.export import agreement as agreeing
from localdpo.export import folder as writing
from localdpo.export import fused as fused_target
from localdpo.export.agreement import Agreement, find_prompts, fuse_in_place, measure, spread
from localdpo.export.fold import Form, delta_weight, deltas, plan, stored_layer
from localdpo.export.source import find_source
from localdpo.export.targets import MARKER, Options, export
from localdpo.files import verify_folder
from localdpo.model.load import LoadedModel, load_model, open_model
from localdpo.model.lora import load_adapter, read_adapter
from localdpo.train.events import SampleEvent, event_line

PROMPTS = [np.array(ids, np.int32) for ids in ([5, 6, 7, 8], [9, 300, 17], [40, 41, 42, 43, 44])]
IDS = mx.array([[5, 6, 7, 8, 9, 300, 17]])


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few and short answers: what is tested is the measuring."""
    monkeypatch.setattr(fused_target, "PROMPTS", 5)
    monkeypatch.setattr(agreeing, "ANSWER_TOKENS", 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.tiny_model(
        tmp_path_factory.mktemp("m") / "base", quantize=4, num_hidden_layers=3, tie_word_embeddings=False
    )
    (folder / "LICENSE").write_text("do as you like")
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return exporting.tiny_adapter(base.parent / "adapter", base, rank=4, num_layers=2)


def tuned(base: Path, adapter: Path, **options: Any) -> LoadedModel:
    loaded = load_model(str(base), **options)
    load_adapter(adapter, loaded)
    return loaded


def logits(loaded: Any) -> np.ndarray:
    return np.array(loaded(IDS).astype(mx.float32))


def fused(source: Path, folder: Path, **options: Any) -> dict[str, Any]:
    return export(find_source(source), "fused", folder, options=Options(**options)).to_json()


def test_folding_a_linear_layer_and_experts() -> None:
    rng = np.random.default_rng(0)
    a, b, x = (mx.array(rng.standard_normal(shape), mx.float32) for shape in ((6, 2), (2, 5), (3, 6)))
    np.testing.assert_allclose(x @ delta_weight(a, b, 1.5).T, 1.5 * (x @ a @ b), atol=1e-5)
    a, b = (mx.array(rng.standard_normal(shape), mx.float32) for shape in ((4, 2, 6), (4, 5, 2)))
    whole = np.array(delta_weight(a, b, 2.0))
    for expert in range(4):
        np.testing.assert_allclose(whole[expert], 2.0 * np.array(b[expert]) @ np.array(a[expert]), atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_layer_as_it_is_stored(quantized: bool, bits: int | None) -> None:
    mx.random.seed(0)
    linear: nn.Module = nn.Linear(64, 32)
    linear = nn.QuantizedLinear.from_linear(linear, 32, 4) if quantized else linear
    a, b, x = mx.random.normal((64, 4)), 0.05 * mx.random.normal((4, 32)), mx.random.normal((5, 64))
    layer = stored_layer(linear, Form(mx.float32, bits, 32), (a, b, 0.5))
    expected = linear(x) + 0.5 * (x @ a @ b)
    assert isinstance(layer, nn.Linear if bits is None else nn.QuantizedLinear)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5 if bits is None else 0.05)


def test_full_precision_is_the_adapter_for_mlx_lm_and_for_us(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = fused(adapter, tmp_path / "out")
    expected = logits(tuned(base, adapter).model)
    theirs, tokenizer = theirs_load(str(tmp_path / "out"))
    np.testing.assert_allclose(logits(theirs), expected, atol=1e-4)
    ours = load_model(str(tmp_path / "out"))
    np.testing.assert_allclose(logits(ours.model), expected, atol=1e-4)
    assert ours.quantization is None
    assert tokenizer.encode("hello there") == ours.tokenizer.encode("hello there")
    assert (tmp_path / "out" / "LICENSE").read_text() == "do as you like"
    assert not verify_folder(tmp_path / "out")
    assert done["figures"]["agreement"]["kl"] < 1e-6 < done["figures"]["agreement"]["kl_base"]
    assert "quantization" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_eight_bits_repack_adapted_layers_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    fused(adapter, tmp_path / "out", quantize=8, accept_loss=True)
    before, after = (dict(mx.load(str(folder / "model.safetensors"))) for folder in (base, tmp_path / "out"))
    untouched = [name for name in before if ".layers.0." in name or "embed" in name]
    assert untouched
    for name in untouched:
        assert mx.array_equal(before[name], after[name]), name
    weight = "model.layers.2.mlp.up_proj.weight"
    assert after[weight].shape[-1] == 2 * before[weight].shape[-1]
    expected = logits(tuned(base, adapter).model)
    for model in (theirs_load(str(tmp_path / "out"))[0], load_model(str(tmp_path / "out")).model):
        assert np.abs(logits(model) - expected).max() < 0.2 * np.abs(expected).max()
        np.testing.assert_allclose(logits(model), logits(load_model(str(tmp_path / "out")).model), atol=1e-3)


def test_what_is_measured_is_what_is_written(base: Path, adapter: Path, tmp_path: Path) -> None:
    fused(adapter, tmp_path / "out", quantize=4, accept_loss=True)
    loaded, opened = tuned(base, adapter), open_model(str(base))
    adapted = deltas(read_adapter(adapter, opened.model))
    fuse_in_place(loaded, plan(opened, adapted, 4), adapted)
    np.testing.assert_allclose(logits(loaded.model), logits(load_model(str(tmp_path / "out")).model), atol=1e-5)


def test_a_lossy_fuse_is_refused_with_figures_and_a_way_out(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as refused:
        fused(adapter, tmp_path / "out", quantize=2)
    said = str(refused.value)
    for words in (
        "--quantize 2",
        "greedy answers are the same",
        "nats",
        "Nothing was written",
        "--to mlx",
        "--accept-loss",
    ):
        assert words in said
    assert not (tmp_path / "out").exists()
    done = fused(adapter, tmp_path / "out", quantize=2, accept_loss=True)
    assert done["figures"]["agreement"]["lossy"]
    assert any("does not answer as the adapter does" in note for note in done["notes"])


@pytest.mark.parametrize("bits", [None, 4])
def test_an_unquantised_base(bits: int | None, tmp_path: Path) -> None:
    base = tiny.tiny_model(tmp_path / "base", dtype=mx.float16)
    adapter = exporting.tiny_adapter(tmp_path / "adapter", base, target_modules="attention")
    fused(adapter, tmp_path / "out", quantize=bits, accept_loss=True)
    model, config = theirs_load(str(tmp_path / "out"), return_config=True)[::2]
    packed = [name for name, _ in tree_flatten(model.parameters()) if name.endswith(".scales")]
    assert bool(packed) == (bits is not None)
    if bits is None:
        expected = logits(tuned(base, adapter).model)
        np.testing.assert_allclose(logits(load_model(str(tmp_path / "out")).model), expected, atol=0.02)
        np.testing.assert_allclose(logits(model), expected, atol=0.2)  # mlx-lm computes in half precision here
    else:
        assert config["quantization"]["bits"] == 4
        assert "model.layers.0.mlp.up_proj.scales" in packed


def test_a_base_quantised_at_load_keeps_what_it_was_trained_on(tmp_path: Path) -> None:
    base = tiny.tiny_model(tmp_path / "base")
    adapter = exporting.tiny_adapter(tmp_path / "adapter", base, quantize=4)
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / "adapter")
    recipe = {"model": str(base), "quantize": 4, "data": {"train": "pairs.jsonl"}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    fused(run, tmp_path / "out")
    expected = logits(tuned(base, run / "adapter", quantize=4).model)
    np.testing.assert_allclose(logits(load_model(str(tmp_path / "out")).model), expected, atol=1e-4)


def test_the_experts_of_a_mixture(tmp_path: Path) -> None:
    overrides = {"num_local_experts": 4, "num_experts_per_tok": 2}
    base = tiny.tiny_model(tmp_path / "base", model_type="mixtral", quantize=4, overrides=overrides)
    adapter = exporting.tiny_adapter(tmp_path / "adapter", base)
    fused(adapter, tmp_path / "out")
    np.testing.assert_allclose(
        logits(theirs_load(str(tmp_path / "out"))[0]), logits(tuned(base, adapter).model), atol=1e-3
    )


def test_shards_are_bounded_and_indexed(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 100_000)
    fused(adapter, tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    np.testing.assert_allclose(
        logits(load_model(str(tmp_path / "out")).model), logits(tuned(base, adapter).model), atol=1e-4
    )


def test_divergence_is_that_of_the_distributions() -> None:
    rng = np.random.default_rng(0)
    p, q = (rng.standard_normal((2, 50)).astype(np.float32) for _ in range(2))
    softmax = [np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(1, keepdims=True) for x in (p, q)]
    expected = float((softmax[0] * np.log(softmax[0] / softmax[1])).sum())
    assert agreeing._divergence(p, q) == pytest.approx(expected, rel=1e-9)
    assert agreeing._divergence(p, p + 3) == pytest.approx(0, abs=1e-6)


def test_an_adapter_that_says_nothing_agrees_with_its_base(base: Path, adapter: Path) -> None:
    loaded = tuned(base, adapter)
    opened = open_model(str(base))
    found = measure(loaded, PROMPTS, "test", plan(opened, {}, None), {})
    # The fused copy lacks the adapter here: the figures must see it.
    assert found.kl == pytest.approx(found.kl_base, rel=1e-3)
    assert found.lossy


def test_what_is_lossy() -> None:
    def with_figures(kl: float, equal: int) -> bool:
        return Agreement(prompts=24, tokens=300, kl=kl, kl_base=1.0, equal=equal, asked="test").lossy

    assert not with_figures(2e-6, 23)
    assert not with_figures(2e-6, 20)  # ties that rounding decides
    assert with_figures(0.13, 6)
    assert with_figures(0.02, 24)
    assert with_figures(0.005, 20)


def test_prompts_come_from_the_run_and_are_spread(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert find_prompts(find_source(adapter))[0] == "everyday prompts"
    run = tmp_path / "run"
    run.mkdir()
    (run / "adapter").symlink_to(adapter)
    (run / "recipe.yaml").write_text(json.dumps({"model": str(base), "data": {"train": "pairs.jsonl"}}))
    (run / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    assert find_prompts(find_source(run)) == ("the run's pairs", [[{"role": "user", "content": "p"}]])
    sample = SampleEvent(prompt=[{"role": "user", "content": "who?"}])
    (run / "samples.jsonl").write_text(event_line(sample))
    assert find_prompts(find_source(run)) == ("the run's probes", [[{"role": "user", "content": "who?"}]])
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]


def test_bits_that_mlx_lacks(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="5 is not one of"):
        fused(adapter, tmp_path / "out", quantize=5)


def test_a_full_disk_leaves_nothing(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(writing.mx, "save_safetensors", full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        fused(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["export", str(adapter), "--to", "fused", "--json"])
    assert shown.exit_code == 0, shown.stderr
    told = json.loads(shown.stdout)
    assert Path(told["folder"]) == tmp_path / "exports" / "adapter-fused"
    assert MARKER in told["files"]
    assert told["figures"]["agreement"]["prompts"] == 5
    refused = CliRunner().invoke(app, ["export", str(adapter), "--to", "fused", "--quantize", "2", "--out", "b"])
    assert refused.exit_code == 2
    assert refused.stdout == ""
    assert "--accept-loss" in refused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("_whole")
def test_the_athene_run_survives_full_precision_and_not_four_bits(starter: Path, tmp_path: Path) -> None:
    """Figures of a run: float16 23 of 24 answers equal, KL 2.4e-06; 8 bits 23, 4.3e-04; 4 bits 6, 0.13."""
    run = exporting.athene_run(tmp_path / "run")
    found = {}
    for bits in (None, 8):
        found[bits] = fused(run, tmp_path / f"out-{bits}", quantize=bits)["figures"]["agreement"]
    assert found[None]["asked"] == "the run's probes"
    assert found[None]["kl"] < 1e-4 < found[8]["kl"] < 0.01 < found[8]["kl_base"]
    assert min(figures["equal"] for figures in found.values()) >= 20
    with pytest.raises(InputError, match="no longer answers as the adapter does"):
        fused(run, tmp_path / "out-4", quantize=4)


@pytest.fixture
def _whole(monkeypatch: pytest.MonkeyPatch, _short: None) -> None:
    """As many and as long answers as a user's."""
    monkeypatch.setattr(fused_target, "PROMPTS", 24)
    monkeypatch.setattr(agreeing, "ANSWER_TOKENS", 24)
