"""What all exports share, and the folder for mlx-lm's own commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import exporting
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.utils import load as theirs_load
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.errors import EnvironmentFault, InputError
from localdpo.export import targets
from localdpo.export.source import find_source
from localdpo.export.targets import MARKER, TARGETS, Options, export
from localdpo.files import verify_folder
from localdpo.model.generate import SamplingOptions, stream
from localdpo.model.load import load_model
from localdpo.model.lora import load_adapter

PROMPT = [5, 6, 7, 8, 300]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_model(tmp_path_factory.mktemp("m") / "base", quantize=4, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return exporting.tiny_adapter(base.parent / "adapter", base, rank=4)


def our_tokens(base: Path, adapter: Path, quantize: int | None = None) -> list[int]:
    loaded = load_model(str(base), quantize=quantize)
    load_adapter(adapter, loaded)
    return [token.id for token in stream(loaded, PROMPT, SamplingOptions(max_tokens=24))]


def their_tokens(model: str, adapter: str) -> list[int]:
    from mlx_lm.generate import stream_generate

    loaded, tokenizer = theirs_load(model, adapter_path=adapter)
    return [int(response.token) for response in stream_generate(loaded, tokenizer, PROMPT, max_tokens=24)]


def test_mlx_lm_says_the_same_tokens(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = export(find_source(adapter), "mlx", tmp_path / "out")
    tokens = our_tokens(base, adapter)
    assert len(set(tokens)) > 3
    assert their_tokens(str(base), str(tmp_path / "out")) == tokens
    readme = (tmp_path / "out" / "README.md").read_text()
    for command in ("mlx_lm.generate", "mlx_lm.chat", "mlx_lm.server"):
        assert f"{command} --model {base} --adapter-path ." in readme
    assert any("mlx_lm.server" in step for step in done.written.next_steps)


def test_with_its_base_the_folder_works_by_itself(base: Path, adapter: Path, tmp_path: Path) -> None:
    export(find_source(adapter), "mlx", tmp_path / "out", options=Options(with_base=True))
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert their_tokens(str(tmp_path / "elsewhere" / "base"), str(tmp_path / "elsewhere")) == our_tokens(base, adapter)
    assert "--model base --adapter-path ." in (tmp_path / "elsewhere" / "README.md").read_text()


def test_a_base_quantised_at_load_goes_along(tmp_path: Path) -> None:
    base = tiny.tiny_model(tmp_path / "base", tie_word_embeddings=False)
    run = tmp_path / "run"
    exporting.tiny_adapter(run / "adapter", base, quantize=4)
    recipe = {"model": str(base), "quantize": 4, "data": {"train": "pairs.jsonl"}}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    export(find_source(run), "mlx", tmp_path / "out")
    mine, (theirs, _) = load_model(str(base), quantize=4), theirs_load(str(tmp_path / "out" / "base"))
    ids = mx.array([PROMPT])
    np.testing.assert_allclose(mine.model(ids), theirs(ids), atol=1e-4)
    assert load_model(str(tmp_path / "out" / "base")).quantization == {"group_size": 64, "bits": 4}


@pytest.mark.slow
def test_the_starter_through_mlx_lms_own_command(starter: Path, tmp_path: Path) -> None:
    adapter = exporting.tiny_adapter(tmp_path / "adapter", Path("smollm2-135m"), rank=4, num_layers=2)
    export(find_source(adapter), "mlx", tmp_path / "out")
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", "base", "--adapter-path", "."]
    arguments = ["--prompt", "Hello", "--max-tokens", "4"]
    done = subprocess.run([*command, *arguments], cwd=tmp_path / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Generation: 4 tokens" in done.stdout


def test_an_export_says_what_it_is_and_is_whole(adapter: Path, tmp_path: Path) -> None:
    for target in ("mlx", "peft"):
        done = export(find_source(adapter), target, tmp_path / target)
        assert not verify_folder(tmp_path / target)
        marker = json.loads((tmp_path / target / MARKER).read_text())
        assert marker["target"] == target
        assert len(marker["adapter_sha256"]) == 64
        assert set(done.files) == {path.name for path in (tmp_path / target).iterdir()}
        assert (tmp_path / target / "README.md").stat().st_mode & 0o777 == 0o644


def test_an_earlier_export_is_replaced_by_force_alone(adapter: Path, tmp_path: Path) -> None:
    source = find_source(adapter)
    export(source, "mlx", tmp_path / "out")
    with pytest.raises(InputError, match="holds an earlier export"):
        export(source, "peft", tmp_path / "out")
    export(source, "peft", tmp_path / "out", force=True)
    assert json.loads((tmp_path / "out" / MARKER).read_text())["target"] == "peft"
    assert not (tmp_path / "out" / "adapters.safetensors").exists()


def test_what_is_not_an_export_is_never_replaced(adapter: Path, tmp_path: Path) -> None:
    source = find_source(adapter)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    export(source, "mlx", tmp_path / "mixed")
    (tmp_path / "mixed" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("text")
    for name in ("mine", "mixed", "file"):
        with pytest.raises(InputError, match="exists already and is no export"):
            export(source, "mlx", tmp_path / name, force=True)
    assert (tmp_path / "mixed" / "letter.txt").exists()
    for place in (adapter, adapter.parent, adapter / "out"):
        with pytest.raises(InputError, match="holds the adapter itself"):
            export(source, "mlx", place, force=True)


def test_a_failure_leaves_what_was_there(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source(adapter)
    export(source, "mlx", tmp_path / "out")
    before = (tmp_path / "out" / MARKER).read_text()

    def broken(_: object) -> None:
        raise EnvironmentFault("no space")

    monkeypatch.setattr("localdpo.export.peft.write", broken)
    with pytest.raises(EnvironmentFault):
        export(source, "peft", tmp_path / "out", force=True)
    assert (tmp_path / "out" / MARKER).read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_there_is_no_adapter(base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps({"model": str(base), "data": {"train": "p.jsonl"}}))
    exporting.golden_peft("all", tmp_path / "peft")
    for name, said in (("none", "no run folder"), ("run", "no adapter yet"), ("peft", "import-adapter")):
        with pytest.raises(InputError, match=said):
            find_source(tmp_path / name)


def test_a_model_of_the_users_choice_must_be_the_adapters(adapter: Path, tmp_path: Path) -> None:
    other = tiny.tiny_model(tmp_path / "other", quantize=4, seed=5)
    with pytest.raises(InputError, match="trained on another base"):
        export(find_source(adapter, str(other)), "mlx", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "onnx"], "one of peft, gguf, fused, mlx"),
        (["--to", "mlx", "--quantize", "4"], "has no effect on --to mlx"),
        (["--to", "fused", "--with-base"], "has no effect on --to fused"),
        (["--to", "mlx", "--model", "no/such/model/at/all"], "is not a model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_are_bad_input(arguments: list[str], said: str, adapter: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(adapter), "--out", str(tmp_path / "out"), *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    assert said in done.stderr.replace("\n", " ")


def test_what_the_command_prints(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", str(adapter), "--to", "mlx"])
    assert done.exit_code == 0, done.stderr
    assert "adapters.safetensors" in done.stdout
    assert "next:" in done.stdout
    assert (tmp_path / "exports" / "adapter-mlx" / "README.md").is_file()


def test_every_target_has_its_module() -> None:
    import importlib

    assert list(TARGETS) == ["peft", "gguf", "fused", "mlx"]
    assert all(callable(importlib.import_module(target.module).write) for target in TARGETS.values())
    assert targets.export is export
