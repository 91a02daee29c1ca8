"""`localdpo serve` as a process of its own: ready, asked, stopped; and one answer by every way there is."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx_lm
import openai
import pytest
from serving import SECONDS, make_run, make_runs

from localdpo.console import serving as console
from localdpo.console.talk import ModelSpeaker
from localdpo.errors import EnvironmentFault, InputError
from localdpo.model.generate import SamplingOptions
from localdpo.model.load import load_model
from localdpo.model.lora import load_adapter
from localdpo.serve.guard import TOKEN_VARIABLE, is_loopback, make_guard, read_or_make_token

ROOT = Path(__file__).parents[1]
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("serve"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "localdpo", *arguments]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), **extra}


@contextmanager
def served(*arguments: str, **extra: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The server as a process, and what it said when it was ready."""
    child = subprocess.Popen(
        command("serve", *arguments, "--port", "0", "--json"),
        env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            assert line, child.communicate(timeout=SECONDS)
            yield child, json.loads(line)
        finally:
            child.kill()


def test_ready_answers_and_ends_by_a_signal_while_an_answer_is_under_way(runs: Path):
    with served(str(runs / "athene")) as (child, ready):
        assert ready["models"] == ["base", "athene", "hermes"]
        with openai.OpenAI(base_url=ready["url"], api_key="x", max_retries=0, timeout=SECONDS) as client:
            stream = client.chat.completions.create(model="hermes", messages=QUESTION, stream=True, max_tokens=40)
            first = next(iter(stream))
            child.send_signal(signal.SIGTERM)
            rest = list(stream)
        out, errors = child.communicate(timeout=SECONDS)
    assert first.model == "hermes"
    assert rest[-1].choices[0].finish_reason in ("stop", "length")
    assert child.returncode == 143
    assert "Traceback" not in errors
    (line,) = map(json.loads, out.splitlines())
    assert (line["event"], line["status"], line["path"]) == ("request", 200, "/v1/chat/completions")


def test_wider_than_this_machine_a_token_is_made_and_not_shown(runs: Path, tmp_path: Path):
    with served("--model", str(runs.parent / "base"), "--host", "0.0.0.0", LOCALDPO_CACHE=str(tmp_path)) as (child, _):
        file = tmp_path / "serve-token"
        token = file.read_text().strip()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        listing = subprocess.run(["ps", "-o", "args=", "-p", str(child.pid)], capture_output=True, text=True).stdout
        child.send_signal(signal.SIGINT)
        out, errors = child.communicate(timeout=SECONDS)
    assert child.returncode == 130
    assert len(token) >= 32
    assert token not in out + errors + listing


def test_a_port_that_is_taken(runs: Path, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = console.Options(port=taken.getsockname()[1])
        with pytest.raises(EnvironmentFault, match="--port"):
            console.run(runs / "athene", None, options)
    with pytest.raises(InputError, match="--host"):
        console.run(runs / "athene", None, console.Options(host="not an address"))


def test_runs_of_another_base_are_named(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any):
    said: list[str] = []

    async def ready(service: Any) -> int:
        service._say_ready("http://127.0.0.1:1/v1")
        said.append(capsys.readouterr().out)
        return signal.SIGTERM

    monkeypatch.setattr(console._Service, "run", ready)
    assert console.run(runs / "athene", None, console.Options()) == 143
    assert "models: base, athene, hermes" in said[0]
    assert "another base: stranger" in said[0]


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    file = tmp_path / "inner" / "token"
    token, source = read_or_make_token(file)
    assert source == str(file)
    assert read_or_make_token(file)[0] == token
    file.chmod(0o640)
    with pytest.raises(EnvironmentFault, match="others could read"):
        read_or_make_token(file)
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(EnvironmentFault, match="others could read"):
        read_or_make_token(link)
    monkeypatch.setenv(TOKEN_VARIABLE, "short")
    with pytest.raises(InputError) as caught:
        read_or_make_token(file)
    assert "short" not in str(caught.value).replace("too short", "")
    monkeypatch.setenv(TOKEN_VARIABLE, "long-enough-to-be-one")
    assert read_or_make_token(file) == ("long-enough-to-be-one", f"${TOKEN_VARIABLE}")


@pytest.mark.parametrize("origin", ["*", "localhost:3000", "http://localhost:3000/", "null", "http://", "ftp://x"])
def test_origins_that_are_none(origin: str):
    with pytest.raises(InputError, match="--allow-origin"):
        make_guard("127.0.0.1", origins=[origin])


def test_which_addresses_are_this_machine_alone():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.1.2", "example.org", "")))


def test_one_answer_by_every_way(tmp_path: Path, starter: Path):
    """The starter with an adapter: the server, `localdpo chat` and mlx-lm with its own loader say the same."""
    loaded = load_model("smollm2-135m")
    run = make_run(tmp_path / "runs" / "athene", loaded, 1, scale=0.05)
    options = {"max_tokens": 8, "temperature": 0}
    with (
        served(str(run)) as (_, ready),
        openai.OpenAI(base_url=ready["url"], api_key="x", max_retries=0, timeout=SECONDS) as client,
    ):
        answers = {
            name: client.chat.completions.create(model=name, messages=QUESTION, **options).choices[0].message.content
            for name in ("smollm2-135m", "athene")
        }
    assert answers["smollm2-135m"] == "The capital of France is Paris."
    assert answers["athene"] != answers["smollm2-135m"]
    load_adapter(run / "adapter", loaded)
    speaker = ModelSpeaker(loaded, SamplingOptions(max_tokens=8), has_adapter=True)
    told = {side: "".join(speaker.stream(side, QUESTION, lambda: False)) for side in speaker.sides}
    assert (told["base"], told["tuned"]) == (answers["smollm2-135m"], answers["athene"])
    model, tokenizer = mlx_lm.load(str(starter), adapter_path=str(run / "adapter"))[:2]
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=8) == answers["athene"]
