"""Write files and folders so that a crash leaves the old state or the new one, never half of either.

The recipe: a temporary sibling with mode 0600, write, flush, fsync, read back and compare, `os.replace`,
fsync the folder. A folder gets a manifest of sizes and sha256 sums, so that a reader can prove it whole.
This module knows nothing about what it writes. Every `OSError` here becomes an `EnvironmentFault` that
names the path.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import secrets
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import psutil

from localdpo.errors import EnvironmentFault, Problem

__all__ = [
    "MANIFEST",
    "array_faults",
    "atomic_file",
    "atomic_folder",
    "atomic_write",
    "environment_faults",
    "recover_folder",
    "remove_leftovers",
    "require_space",
    "sha256_file",
    "verify_folder",
    "write_json",
]

MANIFEST = "manifest.json"
_SPARE_BYTES = 1 << 20  # left free for the file system's own bookkeeping
_FIXES = {
    errno.ENOSPC: "Free some space on this disk, or choose another folder",
    errno.EDQUOT: "Your disk quota is used up: free some space, or choose another folder",
    errno.EROFS: "This disk is read-only: choose another folder",
    errno.EACCES: "You may not write here: choose another folder, or change its permissions",
    errno.EPERM: "You may not write here: choose another folder, or change its permissions",
}


@contextmanager
def environment_faults(path: Path) -> Iterator[None]:
    """Turn an `OSError` in the block into an `EnvironmentFault` with its path (else `path`) and a remedy."""
    try:
        yield
    except OSError as error:
        where = str(error.filename or path)
        fix = _FIXES.get(error.errno or 0, "")
        raise EnvironmentFault(Problem(where, error.strerror or str(error), fix)) from error


@contextmanager
def array_faults(path: Path) -> Iterator[None]:
    """Like `environment_faults`, for mlx too, which reports a write that fails as a `RuntimeError`."""
    try:
        with environment_faults(path):
            yield
    except RuntimeError as error:
        raise EnvironmentFault(Problem(str(path), f"could not be saved ({error})", _FIXES[errno.ENOSPC])) from error


def _sync(fd: int) -> None:
    """Push a file to the disk itself: on macOS fsync stops at the drive's cache, F_FULLFSYNC does not."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        with suppress(OSError):  # network volumes refuse it
            fcntl.fcntl(fd, full)
            return
    os.fsync(fd)


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        _sync(fd)
    finally:
        os.close(fd)


def _sync_folder(path: Path) -> None:
    # Some file systems cannot fsync a folder; the rename is still atomic there.
    with suppress(OSError):
        _sync_path(path)


def require_space(folder: str | Path, needed: int) -> None:
    """Raise `EnvironmentFault` unless `needed` bytes fit on the disk of `folder`, which may not exist yet."""
    place = Path(folder).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    with environment_faults(place):
        free = shutil.disk_usage(place).free
    if free < needed + _SPARE_BYTES:
        raise EnvironmentFault(
            Problem(
                str(folder),
                f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free on this disk",
                _FIXES[errno.ENOSPC],
            )
        )


def sha256_file(path: str | Path) -> str:
    """Return the sha256 of a file in hexadecimal, reading it piece by piece."""
    with environment_faults(Path(path)), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _temporary_sibling(path: Path) -> Path:
    # The name tells a later run on this machine whether the writer is still alive.
    return path.with_name(f".{path.name}.tmp-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def remove_leftovers(path: Path) -> None:
    """Delete temporary siblings whose writer, a process of this machine, is gone."""
    prefix = f".{path.name}.tmp-{_host()}-"
    for entry in path.parent.iterdir():
        pid = entry.name.removeprefix(prefix).split("-")[0]
        if not entry.name.startswith(prefix) or not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        with suppress(OSError):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Replace the file at `path` by `data` (text is written as UTF-8), whole or not at all.

    A symbolic link is followed, so that what it points to is replaced. An existing file keeps its
    permissions; a new one is for its owner only. Raises `EnvironmentFault`.
    """
    payload = data.encode("utf-8") if isinstance(data, str) else data
    target = Path(os.path.realpath(path))
    require_space(target.parent, len(payload))
    temporary = _temporary_sibling(target)
    with environment_faults(target):
        remove_leftovers(target)
        try:
            _write_verified(temporary, payload)
            with suppress(FileNotFoundError):
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a file to write piece by piece; when the block ends well, it becomes `path`, as by `atomic_write`.

    For what need not fit into memory: what is read back is compared by its sha256. When the block raises, nothing at
    `path` changes. Raises `EnvironmentFault`.
    """
    target = Path(os.path.realpath(path))
    temporary = _temporary_sibling(target)
    with environment_faults(target):
        remove_leftovers(target)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(fd, "wb") as file:
            hashing = _Hashing(file)
            with environment_faults(target):
                yield cast(BinaryIO, hashing)
                file.flush()
                _sync(fd)
        with environment_faults(target):
            if sha256_file(temporary) != hashing.digest.hexdigest():
                raise OSError(errno.EIO, "What was read back differs from what was written", str(temporary))
            with suppress(FileNotFoundError):
                temporary.chmod(stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
            _sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Hashing(io.RawIOBase):
    """A file open for writing that takes the sha256 of what passes."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self._size = 0
        self.digest = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self._size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _write_verified(path: Path, payload: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb") as file:
        file.write(payload)
        file.flush()
        _sync(file.fileno())
    if path.read_bytes() != payload:
        raise OSError(errno.EIO, "What was read back differs from what was written", str(path))


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON with `atomic_write`. NaN and infinity raise `ValueError`."""
    atomic_write(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends well, it becomes `path` with a manifest, in one rename.

    A folder already at `path` is replaced: it is moved aside, and deleted once the new one is in place. A
    crash between those two renames leaves it aside; `recover_folder` brings it back, and the next
    `atomic_folder` does so by itself. When the block raises, nothing at `path` changes. Raises
    `EnvironmentFault`.
    """
    target = Path(path).absolute()
    temporary = _temporary_sibling(target)
    with environment_faults(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target)
        recover_folder(target)
        temporary.mkdir(mode=0o700)
    try:
        yield temporary
        with environment_faults(target):
            _seal(temporary)
            _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _seal(folder: Path) -> None:
    """Write the manifest and push every file and folder below `folder` to disk."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    entries = {p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    for file in files:
        _sync_path(file)
    write_json(folder / MANIFEST, {"files": entries})
    for inner in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        _sync_folder(inner)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _put_in_place(temporary: Path, target: Path) -> None:
    aside = _aside(target)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        recover_folder(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def recover_folder(path: str | Path) -> bool:
    """Bring back the folder that a crash in `atomic_folder` left aside. Returns whether there was one.

    Only the writer of `path`, or a reader that knows no writer is at work, may call it.
    """
    target = Path(path).absolute()
    aside = _aside(target)
    if target.exists() or not aside.is_dir():
        return False
    with environment_faults(target):
        os.rename(aside, target)
        _sync_folder(target.parent)
    return True


def verify_folder(path: str | Path) -> list[Problem]:
    """Return what is wrong with a folder that `atomic_folder` wrote; an empty list means it is whole.

    Every file of the manifest must be there with its size and sha256. Files that the manifest does not name
    (a `.DS_Store`, a note) do not matter.
    """
    folder = Path(path)
    manifest = folder / MANIFEST
    try:
        entries = json.loads(manifest.read_bytes())["files"]
        checks = [(str(name), int(entry["size"]), str(entry["sha256"])) for name, entry in entries.items()]
    except OSError as error:
        return [Problem(str(manifest), f"cannot be read ({error.strerror})")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return [Problem(str(manifest), "is not a manifest")]
    found = (_verify_file(folder, name, size, digest) for name, size, digest in checks)
    return [problem for problem in found if problem is not None]


def _verify_file(folder: Path, name: str, size: int, digest: str) -> Problem | None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return Problem(str(folder / MANIFEST), f"names a file outside its folder: {name}")
    file = folder / relative
    try:
        actual = file.stat().st_size
        if actual != size:
            return Problem(str(file), f"has {actual:,} bytes and should have {size:,}")
        if sha256_file(file) != digest:
            return Problem(str(file), "has other content than was written (its sha256 differs)")
    except OSError as error:
        return Problem(str(file), f"cannot be read ({error.strerror})")
    except EnvironmentFault as error:
        return error.problems[0]
    return None
