"""One grammar for models: catalogue, Hub id, folder; and what is fetched from a Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny

from localdpo.catalogue import CATALOGUE, find_entry, suggest_names
from localdpo.errors import EnvironmentFault, InputError
from localdpo.model.resolve import cached_path, resolve_model


def test_the_catalogue_is_consistent() -> None:
    names = [entry.name for entry in CATALOGUE]
    assert names[0] == "smollm2-135m"
    assert len(set(names)) == len(names)
    others = CATALOGUE[1:]
    assert len(others) >= 8
    for entry in others:
        assert re.fullmatch(r"mlx-community/[\w.-]+-4bit", entry.hub_id or "")
        assert 0.4e9 < entry.parameters < 8.5e9
        # 4 bits and, for each group of 64, a half-precision scale and bias
        assert entry.disk_bytes == pytest.approx(entry.parameters * 4.5 / 8, rel=0.01)
    sizes = [entry.disk_bytes for entry in CATALOGUE]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("smollm2-135m", 0.1345), ("qwen2.5-0.5b", 0.494), ("llama3.2-1b", 1.236), ("gemma2-2b", 2.614),
     ("qwen3-4b", 4.02), ("mistral-7b", 7.248), ("llama3.1-8b", 8.030), ("qwen2.5-7b", 7.615)],
)  # fmt: skip
def test_parameter_counts_are_the_published_ones(name: str, billions: float) -> None:
    entry = find_entry(name)
    assert entry is not None
    assert entry.parameters / 1e9 == pytest.approx(billions, rel=2e-3)


def test_entries_are_found_by_name_and_by_hub_id() -> None:
    assert find_entry("qwen3-4b") is find_entry("mlx-community/Qwen3-4B-4bit")
    assert find_entry("nothing") is None
    assert suggest_names("qwen3-5b")[0].startswith("qwen3")


def test_the_starter_by_name(starter: Path) -> None:
    source = resolve_model(" smollm2-135m ")
    assert source.path.resolve() == starter.resolve()
    assert (source.kind, source.name, source.license) == ("catalogue", "smollm2-135m", "apache-2.0")
    assert cached_path("smollm2-135m") == source.path


def test_a_folder_by_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("mine", "./mine", str(tmp_path / "mine"), "~/mine", "../" + tmp_path.name + "/mine"):
        source = resolve_model(spec)
        assert source.path.resolve() == (tmp_path / "mine").resolve()
        assert (source.kind, source.spec) == ("folder", str(source.path)), "it is found again from anywhere"
        assert cached_path(spec) == source.path


def test_a_catalogue_name_wins_over_a_folder(starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2-135m").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("smollm2-135m").kind == "catalogue"
    assert resolve_model("./smollm2-135m").kind == "folder"


@pytest.mark.parametrize("spec", ["./nowhere", "/no/such/folder", "~/nowhere", "..", "~nobody-at-all/x"])
def test_a_missing_folder_downloads_nothing(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("localdpo.model.resolve._download", lambda *_: pytest.fail("the Hub was asked"))
    if spec == "..":
        assert resolve_model(spec).kind == "folder"
        return
    with pytest.raises(InputError, match=re.escape(spec)):
        resolve_model(spec)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    with pytest.raises(InputError, match="is a file"):
        resolve_model(str(file))


@pytest.mark.parametrize(
    "spec", ["", "qwen2.5", "a/b/c", "a b/c", "owner/na me", "owner/..", "owner/name@", "a/b@../c", "x" * 5000]
)
def test_what_cannot_be_a_name(spec: str) -> None:
    with pytest.raises(InputError, match="is not a model"):
        resolve_model(spec)


def test_suggestions() -> None:
    with pytest.raises(InputError, match=r"Did you mean llama3\.2-1b"):
        resolve_model("llama-3.2-1b")


@pytest.mark.parametrize("spec", ["qwen3-0.6b", "some/model", "some/model@v1.0"])
def test_offline_and_not_cached_fails_at_once(spec: str) -> None:
    start = time.monotonic()
    with pytest.raises(EnvironmentFault, match="HF_HUB_OFFLINE") as caught:
        resolve_model(spec)
    assert time.monotonic() - start < 5
    assert "localdpo models get" in str(caught.value)
    assert cached_path(spec) is None


class _Hub(BaseHTTPRequestHandler):
    """Enough of a model hub for one repository, ``owner/name``; every path asked for is recorded."""

    files: dict[str, bytes]
    asked: list[str]
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.asked.append(path)
        if "/resolve/" in path and path.startswith("/owner/name/"):
            content = self.files.get(path.split("/", 5)[5], None)
            if content is None:
                return self._send(404, b"", body)
            return self._send(200, content, body)
        if path.startswith("/api/models/owner/name/tree/"):
            listing = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            return self._send(200, json.dumps(listing).encode(), body)
        if path.startswith("/api/models/owner/name"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            info = {"id": "owner/name", "sha": self.sha, "siblings": siblings, "cardData": {"license": "mit"}}
            return self._send(200, json.dumps(info).encode(), body)
        return self._send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, type[_Hub]]]:
    folder = tiny.tiny_model(tmp_path / "original")
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    files |= {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"pickle", "README.md": b"# a model"}
    handler = type("Hub", (_Hub,), {"files": files, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()
    thread.join()


def _resolve_in_process(endpoint: str, home: Path, spec: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because huggingface_hub reads its settings when it is imported."""
    code = (
        "import sys\n"
        "from localdpo.errors import LocalDPOError\n"
        "from localdpo.model.resolve import cached_path, resolve_model\n"
        "try:\n"
        "    source = resolve_model(sys.argv[1])\n"
        "except LocalDPOError as error:\n"
        "    print(error); sys.exit(error.exit_code)\n"
        "assert cached_path(sys.argv[1]) == source.path\n"
        "print(source.path, source.license, source.revision)\n"
    )
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code, spec], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_a_repository_is_fetched_once_and_only_its_data(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    endpoint, handler = hub
    done = _resolve_in_process(endpoint, tmp_path / "home", "owner/name")
    assert done.returncode == 0, done.stdout + done.stderr
    path, license_name, revision = done.stdout.split()
    names = {file.name for file in Path(path).iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"modeling.py", "pytorch_model.bin", "README.md"}
    assert not any(asked.endswith((".py", ".bin")) for asked in handler.asked)
    assert (license_name, revision) == ("mit", handler.sha)
    handler.asked.clear()
    assert _resolve_in_process(endpoint, tmp_path / "home", "owner/name").returncode == 0
    assert handler.asked == []  # the second time it comes from the cache


def test_a_repository_that_names_code_is_refused_before_its_weights(
    hub: tuple[str, type[_Hub]], tmp_path: Path
) -> None:
    endpoint, handler = hub
    config = json.loads(handler.files["config.json"]) | {"auto_map": {"AutoModel": "modeling.Model"}}
    handler.files["config.json"] = json.dumps(config).encode()
    done = _resolve_in_process(endpoint, tmp_path / "home", "owner/name")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "auto_map" in done.stdout
    assert not any(asked.endswith(".safetensors") for asked in handler.asked)


def test_a_repository_without_safetensors(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    endpoint, handler = hub
    del handler.files["model.safetensors"]
    done = _resolve_in_process(endpoint, tmp_path / "home", "owner/name")
    assert done.returncode == 2
    assert "no safetensors" in done.stdout


def test_an_unknown_repository(hub: tuple[str, type[_Hub]], tmp_path: Path) -> None:
    done = _resolve_in_process(hub[0], tmp_path / "home", "owner/other")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "not on the Hub" in done.stdout


def test_an_unreachable_hub(tmp_path: Path) -> None:
    start = time.monotonic()
    done = _resolve_in_process("http://127.0.0.1:9", tmp_path / "home", "owner/name")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "cannot be reached" in done.stdout
    assert time.monotonic() - start < 60
