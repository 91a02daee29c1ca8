"""Uploading to the Hub: the real huggingface_hub against a stand-in on loopback that the test starts."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
import tiny
from hub import FakeHub, fake_hub
from huggingface_hub import constants
from serving import make_run
from typer.testing import CliRunner

from localdpo.cli import app
from localdpo.errors import EnvironmentFault, InputError, LocalDPOError
from localdpo.export.hub import check_name, stage, upload
from localdpo.export.source import find_source
from localdpo.files import sha256_file
from localdpo.model.load import load_model
from localdpo.recipe import load_recipe
from localdpo.train.events import EndEvent, event_line

TOKEN = "hf_planted0token0that0must0never0show"
ROOT = Path(__file__).parents[1]
# huggingface_hub's own, which is to be its business: it hands a file to its HTTP client by a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
LINES = ["identity: 3 of 4 (75%) answers say Athene", "everyday: `x` \x1b[31m kept"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    base = load_model(str(tiny.tiny_model(root / "secret-home" / "base", tie_word_embeddings=False)))
    run = make_run(root / "runs" / "athene", base, 1)
    (run / "pairs.jsonl").write_text('{"prompt": "secret prompt", "chosen": "a", "rejected": "b"}\n\n' * 3)
    (run / "recipe.yaml").write_text(
        f"model: {base.spec}\ndata: {{train: {root}/secret-home/pairs.jsonl, retain: null}}\noutput_dir: {run}\n"
    )
    end = EndEvent(step=4, reason="finished", message="", adapter=None, adapter_step=4, seconds=1.0, resumable=False,
                   figures={"lines": LINES})  # fmt: skip
    (run / "metrics.jsonl").write_text(event_line(end))
    return run


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    with fake_hub(TOKEN) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def staged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("staged") / "repository"
    folder.mkdir()
    files = stage(find_source(run), folder, base="someone/tiny-base")
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "figures.json", "mlx/adapter_config.json",
        "mlx/adapters.safetensors", "recipe.yaml",
    }  # fmt: skip
    assert files["README.md"] == (folder / "README.md").stat().st_size
    return folder


def test_the_card_says_what_it_is(staged: Path, run: Path):
    card = (staged / "README.md").read_text()
    front = dict(line.split(": ", 1) for line in card.split("---\n")[1].splitlines())
    assert json.loads(front["base_model"]) == "someone/tiny-base"
    assert json.loads(front["base_model_relation"]) == "adapter"
    assert json.loads(front["library_name"]) == "peft"
    assert "license" not in front
    for expected in ("3 rows", sha256_file(run / "pairs.jsonl"), LINES[0], "beta 0.1", "rank 8", "mlx_lm.generate",
                     "not known"):  # fmt: skip
        assert expected in card
    assert "\x1b" not in card


def test_nothing_of_this_machine_or_of_the_pairs_goes_up(staged: Path, run: Path):
    for path in staged.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"secret" not in data, path
            assert str(run.parent).encode() not in data, path
    recipe = load_recipe(staged / "recipe.yaml", check_files=False)
    assert recipe.model == "someone/tiny-base"
    assert Path(recipe.data.train).name == "pairs.jsonl"


def test_both_forms_hold_the_adapters_numbers(staged: Path, run: Path):
    ours = dict(mx.load(str(run / "adapter" / "adapters.safetensors")))
    copied = dict(mx.load(str(staged / "mlx" / "adapters.safetensors")))
    theirs = dict(mx.load(str(staged / "adapter_model.safetensors")))
    assert ours.keys() == copied.keys()
    assert len(theirs) == len(ours)
    name = next(iter(ours))
    assert mx.array_equal(ours[name], copied[name])
    path, _, matrix = name.rpartition(".")
    assert mx.array_equal(theirs[f"base_model.model.{path}.lora_{matrix[-1].upper()}.weight"], ours[name].T)
    assert json.loads((staged / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny-base"


def test_a_base_that_is_a_folder_needs_a_name(run: Path, tmp_path: Path):
    with pytest.raises(InputError, match="--base"):
        stage(find_source(run), tmp_path)


@pytest.mark.parametrize("public", [False, True])
def test_an_upload_is_whole_and_private_unless_asked(hub: FakeHub, staged: Path, public: bool):
    done = upload(staged, "me/athene", public=public)
    assert done.repository == "me/athene"
    assert done.private is not public
    assert done.url == f"{hub.url}/me/athene"
    sent = hub.repositories["me/athene"]
    assert sent["private"] is not public
    local = {p.relative_to(staged).as_posix(): p.read_bytes() for p in staged.rglob("*") if p.is_file()}
    assert sent["files"] == local
    assert len(hub.blobs) == 2


def test_a_name_without_an_owner_is_the_users(hub: FakeHub, staged: Path):
    assert upload(staged, "athene").repository == "me/athene"


def test_an_existing_repository_is_added_to_only_when_asked(hub: FakeHub, staged: Path):
    hub.repositories["me/athene"] = {"private": True, "files": {}}
    with pytest.raises(InputError, match="exists already"):
        upload(staged, "athene")
    assert hub.repositories["me/athene"]["files"] == {}
    assert upload(staged, "athene", force=True).private
    assert "README.md" in hub.repositories["me/athene"]["files"]


def test_what_was_to_be_private_is_not_added_to_a_public_repository(hub: FakeHub, staged: Path):
    hub.repositories["me/athene"] = {"private": False, "files": {}}
    with pytest.raises(InputError, match="public"):
        upload(staged, "me/athene", force=True)
    assert hub.repositories["me/athene"]["files"] == {}
    assert not upload(staged, "me/athene", force=True, public=True).private


@pytest.mark.parametrize(
    ("part", "status", "kind", "words"),
    [
        ("/create", 401, EnvironmentFault, "does not accept the token"),
        ("/create", 403, EnvironmentFault, "may not write"),
        ("/commit/", 403, EnvironmentFault, "may not write"),
        ("/create", 404, InputError, "no such owner"),
        ("/commit/", 409, InputError, "another upload"),
        ("/create", 400, InputError, "refuses"),
        ("/commit/", 500, EnvironmentFault, "failed"),
        ("/lfs/", 403, EnvironmentFault, "may not write"),
        ("/validate-yaml", 400, EnvironmentFault, "did not take"),
    ],
)
def test_refusals_are_sentences_that_quote_nothing(
    hub: FakeHub, staged: Path, caplog: pytest.LogCaptureFixture, part: str, status: int,
    kind: type[LocalDPOError], words: str,
):  # fmt: skip
    caplog.set_level(logging.DEBUG)
    hub.refuse[part] = status
    with pytest.raises(kind, match=words) as caught:
        upload(staged, "me/athene")
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert TOKEN not in shown
    assert "hf_" not in str(caught.value)


def test_no_hub_no_token_and_offline(hub: FakeHub, staged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(EnvironmentFault, match="cannot be reached"):
        upload(staged, "me/athene")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE"):
        upload(staged, "me/athene")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(EnvironmentFault, match="no Hugging Face token"):
        upload(staged, "me/athene")
    assert hub.requests == []


@pytest.mark.parametrize("name", ["", "a/b/c", "../x", "-x", "x-", "x.", "a b", "x--y", "é", "x" * 97, "x.git", "a/"])
def test_names_that_can_be_none(name: str):
    with pytest.raises(InputError, match="NAME"):
        check_name(name)


def localdpo(hub: FakeHub, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    paths = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "localdpo", "export", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env={**inherited, **paths, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


def test_an_upload_from_the_command_line(hub: FakeHub, run: Path, tmp_path: Path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text(TOKEN)
    sent = localdpo(hub, tmp_path, str(run), "--to", "hub", "me/athene", "--base", "someone/tiny-base", "--json",
                    HF_DEBUG="1")  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    row: dict[str, Any] = json.loads(sent.stdout)
    assert row["private"]
    assert row["files"].keys() == hub.repositories["me/athene"]["files"].keys()
    assert TOKEN not in sent.stdout + sent.stderr


def test_a_dry_run_needs_no_token_and_no_hub_and_a_second_upload_is_refused(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
):
    arguments = ["export", str(run), "--to", "hub", "me/athene", "--base", "someone/tiny-base"]
    hub.repositories["me/athene"] = {"private": True, "files": {}}
    again = CliRunner().invoke(app, [*arguments, "--debug"])
    assert again.exit_code == 2
    assert "exists already" in again.output
    assert TOKEN not in again.output
    hub.requests.clear()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(run / "none"))
    dry = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "would send to me/athene (private)" in dry.output
    assert "mlx/adapters.safetensors" in dry.output
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 3
    assert "no Hugging Face token" in refused.output
    assert hub.requests == []


def test_options_of_other_targets_are_refused(hub: FakeHub, run: Path, tmp_path: Path):
    for arguments, words in (
        (["--to", "hub"], "NAME"),
        (["--to", "hub", "x", "--out", "y"], "--out"),
        (["--to", "mlx", "x"], "--to hub"),
        (["--to", "mlx", "--public"], "--public"),
        (["--to", "peft", "--dry-run"], "--dry-run"),
    ):
        done = CliRunner().invoke(app, ["export", str(run), *arguments])
        assert done.exit_code == 2, done.output
        assert words in done.output
    assert hub.requests == []
