"""One grammar for naming a model: catalogue name, Hub id with optional @revision, or local folder.

    smollm2-135m                                  a name from the catalogue
    mlx-community/Qwen3-0.6B-4bit[@revision]      a repository on the Hugging Face Hub
    ./my-model, ~/models/x, /abs/path             a folder on this machine; nothing is downloaded for it

A catalogue name wins over a folder of the same name (write ``./name`` for the folder); an existing folder wins
over a Hub id. What is in the cache is used without asking the network. This module knows where model files are
and fetches them; it parses config.json only, and loads no mlx.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from localdpo.catalogue import STARTER_NAME, find_entry, suggest_names
from localdpo.errors import EnvironmentFault, InputError, Problem
from localdpo.files import require_space
from localdpo.model.safety import check_config, missing_shards, read_json
from localdpo.model.starter import ensure_starter, starter_cached, starter_folder

Notify = Callable[[str], None]

# Data only. Python files are never fetched, whatever config.json may name.
ALLOW_PATTERNS = (
    "*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "tiktoken.model", "*.tiktoken",
    "chat_template.jinja",
)  # fmt: skip
PROBE_SECONDS = 8.0
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]{1,200}))?")


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine, in the folder ``path``. ``spec`` names it again, wherever the user is then."""

    path: Path
    spec: str
    revision: str | None
    name: str
    license: str
    kind: Literal["catalogue", "hub", "folder"]


def resolve_model(spec: str, notify: Notify | None = None) -> ModelSource:
    """Find the folder of a model, fetching it when it is neither local nor cached.

    ``notify`` receives a sentence before each long step. Raises InputError for a name that means nothing and a
    folder or repository that does not exist; EnvironmentFault at once when it would need a network that is not
    there, or disk space that is not.
    """
    spec = spec.strip()
    entry = find_entry(spec)
    if spec == STARTER_NAME and entry:
        return ModelSource(ensure_starter(notify), spec, None, spec, entry.license, "catalogue")
    if (entry is None or entry.name != spec) and _is_local(spec):
        return _local_source(spec)
    repository, revision = _hub_name(spec)
    path = _cached_snapshot(repository, revision)
    license_name = entry.license if entry else "unknown"
    if path is None:
        path, license_name = _download(repository, revision, license_name, notify or (lambda _: None))
    kind: Literal["catalogue", "hub"] = "catalogue" if entry and entry.name == spec else "hub"
    name = spec if kind == "catalogue" else repository.split("/")[-1]
    return ModelSource(path, spec, revision or path.name, name, license_name, kind)


def cached_path(spec: str) -> Path | None:
    """The folder of a model that is on this machine already, else None. Touches no network.

    Raises InputError when ``spec`` cannot name a model.
    """
    spec = spec.strip()
    if spec == STARTER_NAME:
        return starter_folder() if starter_cached() else None
    entry = find_entry(spec)
    if (entry is None or entry.name != spec) and _is_local(spec):
        return _local_source(spec).path
    return _cached_snapshot(*_hub_name(spec))


def _is_local(spec: str) -> bool:
    try:
        return bool(spec) and (spec.startswith((".", "/", "~")) or Path(spec).exists())
    except OSError:  # longer than a path can be
        return False


def _local_source(spec: str) -> ModelSource:
    try:
        path = Path(spec).expanduser().absolute()
    except RuntimeError:
        raise InputError(Problem(spec, "names the home folder of an unknown user")) from None
    if path.is_file():
        raise InputError(Problem(spec, "is a file", "A model is a folder with config.json and safetensors weights"))
    if not path.is_dir():
        raise InputError(Problem(spec, "there is no such folder", "Check the path; nothing is downloaded for a path"))
    return ModelSource(path, str(path), None, path.name, "unknown", "folder")


def _hub_name(spec: str) -> tuple[str, str | None]:
    entry = find_entry(spec)
    if entry is not None and entry.hub_id:
        return entry.hub_id, None
    match = _HUB_ID.fullmatch(spec)
    if match and ".." not in spec:
        return match["id"], match["revision"]
    similar = suggest_names(spec)
    hint = f"Did you mean {' or '.join(similar)}? " if similar else ""
    raise InputError(
        Problem(
            spec or "(empty)",
            "is not a model",
            hint + "Give a name from `localdpo models`, a Hub id like owner/name, or a folder like ./my-model",
        )
    )


def _cached_snapshot(repository: str, revision: str | None) -> Path | None:
    """The complete snapshot in the Hugging Face cache, if there is one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(
            snapshot_download(repository, revision=revision, allow_patterns=list(ALLOW_PATTERNS), local_files_only=True)
        )
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None
    complete = (path / "config.json").is_file() and any(path.glob("model*.safetensors"))
    return path if complete and not missing_shards(path) else None


def _download(repository: str, revision: str | None, license_name: str, say: Notify) -> tuple[Path, str]:
    from huggingface_hub import HfApi, constants, snapshot_download

    where = f"{repository}@{revision}" if revision else repository
    try:
        # One short request first: without it, an absent network ends in a series of timeouts and retries.
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=PROBE_SECONDS)
    except Exception as error:  # its transport's exceptions are not part of huggingface_hub's interface
        raise _hub_error(where, error) from error
    files = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    wanted = {name: size for name, size in files.items() if _allowed(name)}
    if not any(name.endswith(".safetensors") for name in wanted):
        raise InputError(
            Problem(where, "has no safetensors weights", "GGUF and pickled weights are not read; pick another version")
        )
    license_name = _license(info) or license_name
    try:
        config = snapshot_download(
            repository, revision=info.sha, allow_patterns=["config.json"], etag_timeout=PROBE_SECONDS
        )
        problems = check_config(read_json(Path(config) / "config.json"), f"{where}/config.json")
        if problems:
            raise InputError(*problems)
        total = sum(wanted.values())
        require_space(constants.HF_HUB_CACHE, total)
        say(f"Fetching {where}: {total / 1e6:,.0f} MB (once)")
        # the branch, not the hash: so that the cache finds it again by the name the user wrote
        path = snapshot_download(
            repository, revision=revision, allow_patterns=list(ALLOW_PATTERNS), etag_timeout=PROBE_SECONDS
        )
    except (InputError, EnvironmentFault):
        raise
    except Exception as error:
        raise _hub_error(where, error) from error
    return Path(path), license_name


def _allowed(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in ALLOW_PATTERNS)


def _license(info: Any) -> str | None:
    value = (info.card_data or {}).get("license") if info.card_data is not None else None
    return value if isinstance(value, str) else None


def _hub_error(where: str, error: Exception) -> InputError | EnvironmentFault:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        fix = "Accept its terms on the Hub, then log in with `hf auth login`"
        return InputError(Problem(where, "asks for its terms to be accepted before it can be fetched", fix))
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(Problem(where, "has no such revision", "Give a branch, tag or commit that exists"))
    if isinstance(error, errors.RepositoryNotFoundError):
        fix = "Check the spelling; for a private one log in with `hf auth login`"
        return InputError(Problem(where, "is not on the Hub, or is private", fix))
    if isinstance(error, errors.HFValidationError):
        return InputError(Problem(where, "is not a valid Hub id"))
    reason = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else type(error).__name__
    return EnvironmentFault(
        Problem(
            where,
            f"is not on this machine, and the Hub cannot be reached ({reason})",
            f"Connect to the network and run `localdpo models get {where}`, or give a local folder",
        )
    )
