"""Who may talk to the server: the Host and Origin of a request, and the token.

A browser on this machine runs pages of strangers, and such a page can send requests to loopback addresses. Its
Origin gives it away; and where it has pointed a name of its own at 127.0.0.1 (DNS rebinding), the Host does. So a
Host must be a name we know, and an Origin one that was allowed. Beyond this machine a token is required too. Tokens
come from the environment or a file only its owner can read, never from the command line, and are never shown.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import secrets
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import atomic_write, environment_faults

__all__ = ["TOKEN_VARIABLE", "Guard", "Refused", "is_loopback", "make_guard", "read_or_make_token"]

TOKEN_VARIABLE = "LOCALDPO_API_KEY"
_MIN_TOKEN = 16
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Refused:
    """Why a request goes no further: a status, an OpenAI error code, a sentence."""

    status: int
    code: str
    message: str


@dataclass(frozen=True)
class Guard:
    """What is checked of every request.

    ``names``: Hosts that are this server, without port. ``any_address``: any address in digits is, too (a page can
    make its own name point here, but not an address). ``origins``: pages that may call. ``token``: what a request
    must bear, None for nothing; it is not in this object's repr.
    """

    names: frozenset[str]
    any_address: bool
    origins: frozenset[str]
    token: str | None = None

    def __repr__(self) -> str:
        bears = "none" if self.token is None else "required"
        return f"Guard(names={sorted(self.names)}, origins={sorted(self.origins)}, token={bears})"

    def check(self, headers: Mapping[str, list[str]], *, public: bool = False) -> Refused | None:
        """What is wrong with a request; ``headers`` by lower-case name. A ``public`` resource needs no token."""
        hosts, origins = headers.get("host", []), headers.get("origin", [])
        if len(hosts) != 1 or not self._knows(hosts[0]):
            return Refused(403, "host_not_allowed", "the Host of this request is not this server; see --allow-host")
        if len(origins) > 1 or (origins and not self.allows_origin(origins[0], hosts[0])):
            return Refused(403, "origin_not_allowed", "pages of this Origin may not call; see --allow-origin")
        if self.token is not None and not public and not self._bears(headers.get("authorization", [])):
            return Refused(401, "invalid_api_key", "a token is needed: Authorization: Bearer …")
        return None

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether pages of ``origin`` may call: those that were allowed, and the server's own."""
        return origin in self.origins or origin == f"http://{host}"

    def _knows(self, host: str) -> bool:
        name = _host_name(host)
        return name is not None and (name in self.names or (self.any_address and _is_address(name)))

    def _bears(self, values: list[str]) -> bool:
        scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        expected = (self.token or "").encode()
        return scheme.lower() == "bearer" and hmac.compare_digest(token.strip().encode("latin-1", "replace"), expected)


def make_guard(bind: str, hosts: Iterable[str] = (), origins: Iterable[str] = (), token: str | None = None) -> Guard:
    """The guard of a server that listens at the address ``bind``; ``hosts`` and ``origins`` are further ones.

    Raises InputError for an origin that is none.
    """
    names = {*_LOOPBACK_NAMES, *(host.lower().rstrip(".") for host in hosts)}
    if not is_loopback(bind):
        own = socket.gethostname().lower()
        names |= {own, f"{own.removesuffix('.local')}.local", bind.lower()}
    problems = [
        Problem("--allow-origin", f"{origin!r} is not an origin", "Write it as in http://localhost:3000")
        for origin in origins
        if not _is_origin(origin)
    ]
    if problems:
        raise InputError(*problems)
    return Guard(frozenset(names), not is_loopback(bind), frozenset(origins), token)


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach what listens at ``address``."""
    if address.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def read_or_make_token(file: Path) -> tuple[str, str]:
    """The token, and where it is from: the environment, or ``file``, which is made when it is not there.

    Raises InputError for a token in the environment that is too short, EnvironmentFault for a file that others may
    read.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if token:
        if len(token) < _MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            fix = "Choose letters and digits at random, or unset it to have one made"
            raise InputError(Problem(TOKEN_VARIABLE, f"must be at least {_MIN_TOKEN} characters without spaces", fix))
        return token, f"${TOKEN_VARIABLE}"
    with environment_faults(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            atomic_write(file, secrets.token_urlsafe(32) + "\n")
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) & 0o077:
            fix = "Delete it to have a new one made"
            raise EnvironmentFault(Problem(str(file), "others could read or change this token file", fix))
        token = file.read_text(encoding="ascii", errors="replace").strip()
    if len(token) < _MIN_TOKEN:
        raise EnvironmentFault(Problem(str(file), "holds no token", "Delete it to have a new one made"))
    return token, str(file)


def _host_name(host: str) -> str | None:
    """The name in a Host header, without port and brackets; None when it is malformed."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return None
    if parts.netloc != host or parts.username is not None or parts.path or parts.query or not parts.hostname:
        return None
    return parts.hostname.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_origin(origin: str) -> bool:
    try:
        parts = urlsplit(origin)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and origin == f"{parts.scheme}://{parts.netloc}"
