"""A stand-in for the Hugging Face Hub: its HTTP interface on loopback, as far as an upload needs it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """Repositories by name (``private``, ``files``), every request, and statuses to answer paths with."""

    token: str
    user: str = "me"
    repositories: dict[str, dict[str, Any]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)
    url: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """The status and JSON body of a request."""
        self.requests.append((method, path))
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": f"refused, token {token}"}
        if path.startswith("/lfs/"):  # a signed address: it takes no token
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}
        if token != self.token:
            return 401, {"error": f"Invalid credentials {token}"}
        return self._known(method, path, body)

    def _known(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            content = json.loads(body)["content"]
            return (200, {}) if content.startswith("---\n") else (400, {"errors": [{"message": "no metadata"}]})
        if path == "/api/whoami-v2":
            return 200, {"name": self.user, "type": "user", "orgs": []}
        name, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            files = [
                {"path": f["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return 200, {"files": files}
        if path.endswith("/info/lfs/objects/batch"):
            upload = lambda oid: {"upload": {"href": f"{self.url}/lfs/{oid}"}}  # noqa: E731
            objects = [{**entry, "actions": upload(entry["oid"])} for entry in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        name, _, action = path.removeprefix("/api/models/").partition("/commit/")
        if action:
            return self._commit(name, body)
        repository = self.repositories.get(name.partition("/revision/")[0])
        if method == "GET" and repository is not None:
            return 200, {"id": name, "private": repository["private"], "sha": "a" * 40, "siblings": []}
        return 404, {"error": "Not Found"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted.get('organization') or self.user}/{wanted['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repositories[name] = {"private": private, "files": {}}
        return 200, {"url": f"{self.url}/{name}", "name": name, "id": name}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        files = self.repositories[name]["files"]
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                blob = self.blobs[value["oid"]]
                assert hashlib.sha256(blob).hexdigest() == value["oid"]
                files[value["path"]] = blob
        return 200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/{'b' * 40}", "commitOid": "b" * 40}


@contextmanager
def fake_hub(token: str) -> Iterator[FakeHub]:
    """A Hub on a free port of loopback, which knows one user by ``token``."""
    hub = FakeHub(token)

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            status, answer = hub.answer(self.command, self.path.partition("?")[0], body, token)
            payload = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = do_PUT = do_HEAD = _any

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, name="hub", kwargs={"poll_interval": 0.02})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
