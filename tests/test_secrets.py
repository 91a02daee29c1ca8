"""Planted tokens reach no output and no file: real commands are run with them, and every byte they write is searched.

Tokens are planted where users have them: in the environment and in huggingface_hub's own file. A Hub that answers
with the token it was sent, and errors shown with their tracebacks, are the ways they could get out.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model
from training import write_rows
from vt import ROOT, environment_of

from localdpo.redact import redact

SECRETS = {
    "HF_TOKEN": "hf_PlantedInTheEnvironment0123456789",
    "HUGGING_FACE_HUB_TOKEN": "hf_PlantedUnderItsOldName0123456789",
    "OPENAI_API_KEY": "sk-PlantedForOpenAI0123456789",
    "WANDB_API_KEY": "Planted0123456789abcdef0123456789abcdef0",
    "LOCALDPO_API_KEY": "PlantedForTheServer-0123456789-0123456789",
    "AWS_SECRET_ACCESS_KEY": "PlantedForAWS/0123456789abcdef",
}
IN_A_FILE = "hf_PlantedInTheTokenFile0123456789"
RECIPE = """
model: model
data: {train: pairs.jsonl, eval: 0.25, retain: null, probes: probes.jsonl, max_length: 64}
lora: {r: 2}
train: {max_steps: 2, per_device_train_batch_size: 2, save_steps: 1}
output_dir: runs/a
"""
# Run one after the other in one process: starting one takes longer than what it does.
_RUNNER = """
import json, sys
from localdpo.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["localdpo", *words]
    try:
        main()
    except SystemExit as left:
        print(f"## {left.code or 0} {' '.join(words)}", flush=True)
"""


class _Echo(BaseHTTPRequestHandler):
    """A Hub that refuses, and says back all it was sent."""

    seen: list[str]

    def _any(self) -> None:
        sent = str(self.headers)
        self.seen.append(sent)
        body = json.dumps({"error": f"refused: {self.path} {sent}"}).encode()
        self.send_response(403)
        self.send_header("X-Error-Message", sent.replace("\n", " ").replace("\r", " "))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_HEAD = do_PUT = _any

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub that echoes, and what it was sent."""
    handler = type("Echo", (_Echo,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.seen  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "work"
    tiny_model(folder / "model", num_hidden_layers=1)
    write_rows(folder / "pairs.jsonl", [{"prompt": f"p {n}", "chosen": "yes", "rejected": "no"} for n in range(8)])
    write_rows(folder / "probes.jsonl", [{"prompt": "p", "accept": ["yes"]}])
    (folder / "recipe.yaml").write_text(RECIPE)
    (folder / "bad.yaml").write_text(RECIPE.replace("model: model", "model: owner/gated"))
    return folder


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    home = tmp_path / "home"
    (home / "hf").mkdir(parents=True)
    (home / "hf" / "token").write_text(IN_A_FILE)
    path = f"{ROOT}{os.pathsep}{ROOT / 'tui'}"
    ours = environment_of(home, PYTHONPATH=path, HF_HOME=str(home / "hf"), HF_HUB_DISABLE_TELEMETRY="1")
    return {**os.environ, **SECRETS, **ours, **more}


def assert_kept(output: bytes, *folders: Path) -> None:
    """No secret, in any of the forms it could take, is in what was printed or in a file."""
    forms = {form for secret in (*SECRETS.values(), IN_A_FILE) for form in _forms(secret)}
    places = {"the output": output}
    for folder in folders:
        places |= {
            str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "token"
        }
        places |= {f"the name of {path}": os.fsencode(path) for path in folder.rglob("*")}
    found = [(place, form) for place, content in places.items() for form in forms if form in content]
    assert found == []
    assert len(places) > 10  # there was something to search


def _forms(secret: str) -> tuple[bytes, ...]:
    """As it is, without its prefix and end, quoted, and in Base64 as basic authentication has it."""
    return (
        secret.encode(), secret[4:-4].encode(), quote(secret, safe="").encode(),
        base64.b64encode(secret.encode()).rstrip(b"=")[:-2],
    )  # fmt: skip


def run(commands: list[list[str]], folder: Path, env: dict[str, str]) -> bytes:
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, json.dumps(commands)],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    return done.stdout


def test_the_search_finds_what_is_planted(tmp_path: Path):
    """Without this the tests below would prove nothing."""
    for number in range(6):
        (tmp_path / f"file{number}").write_text("nothing")
    for secret in (*SECRETS.values(), IN_A_FILE):
        with pytest.raises(AssertionError, match="the output"):
            assert_kept(f"Bearer {secret}".encode(), tmp_path)
        (tmp_path / "file0").write_text(f"x{secret}x")
        with pytest.raises(AssertionError, match="file0"):
            assert_kept(b"", tmp_path)


@pytest.mark.slow
def test_commands_tell_no_token_not_even_to_their_own_files(
    workspace: Path, tmp_path: Path, hub: tuple[str, list[str]]
):
    address, seen = hub
    commands = [
        ["train", "recipe.yaml", "--json"],
        ["train", "recipe.yaml", "--resume", "--debug"],
        ["train", "bad.yaml", "--debug"],
        ["doctor"],
        ["doctor", "--json"],
        ["doctor", "runs/a"],
        ["runs", "--json", "runs"],
        ["chat", "runs/a", "-p", "hello", "--max-tokens", "2", "--json"],
        ["models", "get", "owner/gated", "--debug"],
        ["export", "runs/a", "--to", "hub", "owner/name", "--debug"],
        ["export", "runs/a", "--to", "peft", "--out", "exported"],
        ["report", "runs/a"],
        ["pairs", "check", "pairs.jsonl", "--json"],
    ]
    output = run(commands, workspace, environment(tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0"))
    assert output.count(b"\n## ") >= len(commands) - 1
    assert b"## 0 train recipe.yaml --json" in output
    assert b"Traceback" in output  # of --debug: the way by which exceptions would tell
    assert any(SECRETS["HF_TOKEN"] in sent for sent in seen)  # the token was used, where it belongs
    assert (workspace / "runs" / "a" / "metrics.jsonl").is_file()
    assert_kept(output, workspace, tmp_path / "home")


@given(st.text(max_size=10), st.text(max_size=10))
def test_known_and_likely_secrets_are_taken_out_of_messages(before: str, after: str):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MY_API_KEY", "planted/with.signs")
        for secret in ("planted/with.signs", IN_A_FILE, "sk-Planted0123456789"):
            assert secret not in redact(f"{before} {secret} {after}")
        assert redact("Authorization: Bearer abcdefgh.ijkl") == "Authorization: Bearer …"
        assert redact("max_tokens 512, the key is q_proj") == "max_tokens 512, the key is q_proj"


def test_the_token_file_of_the_hub_is_told_by_nobody(workspace: Path, tmp_path: Path, hub: tuple[str, list[str]]):
    address, seen = hub
    env = environment(tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="0")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        del env[name]
    output = run([["models", "get", "owner/gated", "--debug"], ["doctor"]], workspace, env)
    assert any(IN_A_FILE in sent for sent in seen)
    assert_kept(output, workspace, tmp_path / "home")


@pytest.mark.slow
def test_the_server_tells_neither_its_token_nor_the_one_a_client_sent(workspace: Path, tmp_path: Path):
    env = environment(tmp_path)
    command = [sys.executable, "-m", "localdpo", "serve", "--model", "model", "--port", "0", "--json"]
    wrong = "Wrong-0123456789-0123456789"
    with subprocess.Popen(command, cwd=workspace, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        assert server.stdout is not None
        ready = b""
        while b'"ready"' not in ready:
            ready += server.stdout.readline()
        url = json.loads(ready.splitlines()[-1])["url"]
        for token in (wrong, SECRETS["LOCALDPO_API_KEY"]):
            request = urllib.request.Request(
                f"{url}/v1/models?key={token}", headers={"Authorization": f"Bearer {token}"}
            )
            try:
                urllib.request.urlopen(request, timeout=60).read()
            except urllib.error.HTTPError as error:
                error.close()
        server.send_signal(signal.SIGINT)
        output = ready + server.stdout.read()
    assert wrong.encode() not in output
    assert_kept(output, workspace, tmp_path / "home")
