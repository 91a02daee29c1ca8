"""A run on the Hugging Face Hub: adapter, recipe, figures and a model card in a repository of the user's.

The adapter goes up as PEFT reads it (at the top, where the Hub looks) and as mlx-lm does (in mlx/). The pairs do not:
their number and hash do. Paths of this machine are left out. The repository is private unless told otherwise, and
an existing one is added to only when asked. The token is huggingface_hub's business alone; no message of an exception
from there is passed on, because it may quote a request.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localdpo.errors import EnvironmentFault, InputError, LocalDPOError, Problem
from localdpo.export.hubcard import CardFacts, hub_card
from localdpo.export.source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Source
from localdpo.export.targets import Options, export
from localdpo.files import environment_faults, sha256_file
from localdpo.recipe import Recipe, dump_recipe
from localdpo.train.events import EndEvent

__all__ = ["Uploaded", "check_name", "require_token", "stage", "upload"]

PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LOGIN = "Log in with `hf auth login`, using a token that may write"


@dataclass(frozen=True)
class Uploaded:
    """What went up: the repository, its page, the commit."""

    repository: str
    url: str
    commit: str
    private: bool


def check_name(name: str) -> None:
    """Raise InputError unless ``name`` can be a repository: NAME, or OWNER/NAME."""
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith((".", "-", ".git")):
        fix = "Use letters, digits, -, _ and ., as in athene or owner/athene"
        raise InputError(Problem("NAME", f"{name[:100]!r} cannot name a repository", fix))


def require_token(name: str) -> None:
    """Raise EnvironmentFault when huggingface_hub has no token to upload ``name`` with."""
    from huggingface_hub import get_token

    if not get_token():
        raise EnvironmentFault(Problem(name, "there is no Hugging Face token on this machine", _LOGIN))


def stage(
    source: Source, folder: Path, *, base: str | None = None, say: Callable[[str], None] = lambda _: None
) -> dict[str, int]:
    """Write the repository's files into ``folder``, an empty one; their names and sizes in bytes.

    ``base`` names the base for others, where it is a folder of this machine. Raises InputError and
    EnvironmentFault.
    """
    from localdpo.model.load import open_model
    from localdpo.model.lora import read_adapter

    model = open_model(source.model, quantize=source.quantize, notify=say)
    read_adapter(source.adapter, model.model, model)
    public = _public_base(source.model, model.source.kind == "folder", base)
    has_peft = _stage_peft(source, folder, public, say)
    _stage_mlx(source, folder / "mlx", public)
    figures = _figures(source)
    with environment_faults(folder):
        if figures:
            _write_json(folder / "figures.json", figures)
        if source.recipe is not None:
            (folder / "recipe.yaml").write_text(dump_recipe(_portable(source.recipe, public)), encoding="utf-8")
        facts = CardFacts(
            name=source.name,
            base=public,
            license=model.source.license,
            quantization=model.config.get("quantization"),
            peft=has_peft,
            pairs=_pairs(source),
            recipe=source.recipe,
            figures=tuple(str(line) for line in figures.get("lines", ())),
        )
        (folder / "README.md").write_text(hub_card(facts), encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def upload(folder: Path, name: str, *, public: bool = False, force: bool = False) -> Uploaded:
    """Send every file of ``folder`` to the repository ``name`` in one commit.

    ``force`` adds to a repository that exists; one that is public is never added to unless ``public``. Raises
    InputError for a name that is taken or not the user's, EnvironmentFault when the Hub cannot be reached or does
    not know the user.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # not re-exported

    check_name(name)
    require_token(name)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi(library_name="localdpo")
    with _hub_faults(name):
        repository = _repository(api, name, public, force)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        operations = [
            CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=str(path))
            for path in files
        ]
        commit = api.create_commit(
            repo_id=repository, operations=operations, commit_message="Upload an adapter with localdpo"
        )
        private = bool(api.repo_info(repository).private)
    return Uploaded(repository, f"{api.endpoint}/{repository}", str(commit.oid), private)


def _repository(api: Any, name: str, public: bool, force: bool) -> str:
    """Make the repository, or see that the one there is may be added to; its full name."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(api.create_repo(name, private=not public).repo_id)
    except HfHubHTTPError as error:
        if _status(error) != 409:
            raise
    if not force:
        fix = "Choose another name, or add a commit to it with --force"
        raise InputError(Problem(name, "this repository exists already", fix))
    full = name if "/" in name else f"{api.whoami()['name']}/{name}"
    if not public and not api.repo_info(full).private:
        fix = "Make it private on the Hub, or say --public"
        raise InputError(Problem(full, "this repository is public", fix))
    return full


@contextmanager
def _hub_faults(name: str) -> Iterator[None]:
    """Turn what goes wrong with the Hub into sentences that quote nothing of it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except LocalDPOError:
        raise
    except OfflineModeIsEnabled:
        raise EnvironmentFault(Problem(name, "HF_HUB_OFFLINE is set, so nothing is sent", "Unset it")) from None
    except HfHubHTTPError as error:
        raise _refusal(name, _status(error)) from None
    except ValueError as error:
        kind = type(error).__name__
        raise EnvironmentFault(Problem(name, f"the Hub did not take the files ({kind})", "Try again later")) from None
    except Exception as error:  # its transport's exceptions are not part of huggingface_hub's interface
        if isinstance(cause := error.__cause__, HfHubHTTPError):  # one of the files
            raise _refusal(name, _status(cause)) from None
        where = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        raise EnvironmentFault(Problem(name, where, "Connect to the network, and try again")) from None


def _status(error: Any) -> int:
    return int(getattr(error.response, "status_code", 0) or 0)


def _refusal(name: str, status: int) -> LocalDPOError:
    if status == 401:
        return EnvironmentFault(Problem(name, "the Hub does not accept the token of this machine (401)", _LOGIN))
    if status == 403:
        fix = "Use a name of your own, or a token that may write there: `hf auth login`"
        return EnvironmentFault(Problem(name, "your token may not write there (403)", fix))
    if status == 404:
        return InputError(Problem(name, "the Hub knows no such owner or repository (404)", "Check the spelling"))
    if status == 409:
        return InputError(Problem(name, "another upload is at work on this repository (409)", "Try again"))
    if status in (400, 413, 422):
        return InputError(Problem(name, f"the Hub refuses these files or this name ({status})", "Choose another name"))
    return EnvironmentFault(Problem(name, f"the Hub failed ({status})", "Try again later"))


def _public_base(spec: str, is_folder: bool, asked: str | None) -> str:
    """What others call the base. Raises InputError for a folder of this machine that has no other name."""
    from localdpo.catalogue import UPSTREAM, find_entry

    if asked:
        return asked
    entry = find_entry(spec)
    if entry is not None:
        return entry.hub_id or UPSTREAM[entry.name]
    if is_folder:
        fix = "Say with --base what others can get it as, such as owner/name"
        raise InputError(Problem(spec, "the base is a folder of this machine", fix))
    return spec.partition("@")[0]


def _stage_peft(source: Source, folder: Path, base: str, say: Callable[[str], None]) -> bool:
    """Write PEFT's form; False where this model has none."""
    from localdpo.catalogue import UPSTREAM, find_entry

    entry = find_entry(source.model)
    original = UPSTREAM[entry.name] if entry is not None else base
    place = folder / ".peft"
    try:
        export(source, "peft", place, options=Options(base=original), notify=say)
    except InputError as error:
        say(f"Without PEFT's form: {error}")
        return False
    with environment_faults(folder):
        for name in PEFT_FILES:
            shutil.move(place / name, folder / name)
        shutil.rmtree(place)
    return True


def _stage_mlx(source: Source, folder: Path, base: str) -> None:
    with environment_faults(folder):
        folder.mkdir()
        shutil.copyfile(source.adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        config = json.loads((source.adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        _write_json(folder / ADAPTER_CONFIG, config | {"model": base})


def _portable(recipe: Recipe, base: str) -> Recipe:
    """The recipe without folders of this machine."""
    values = recipe.model_dump(mode="json")
    values |= {"model": base, "output_dir": Path(values["output_dir"]).name}
    for key in ("train", "eval", "retain", "probes"):
        value = values["data"].get(key)
        if isinstance(value, str):
            values["data"][key] = Path(value).name
    return Recipe.model_validate(values)


def _figures(source: Source) -> dict[str, Any]:
    """The closing figures of the run; empty where it has none."""
    events = source.run.every_event() if source.run is not None else iter(())
    ends = deque((event for event in events if isinstance(event, EndEvent)), maxlen=1)
    return dict(ends[0].figures) if ends and ends[0].figures else {}


def _pairs(source: Source) -> tuple[int, str] | None:
    """How many rows the run learned from, and the sha256 of their file."""
    if source.run is None or not source.run.pairs_file.is_file():
        return None
    with environment_faults(source.run.pairs_file), source.run.pairs_file.open("rb") as file:
        return sum(bool(line.strip()) for line in file), sha256_file(source.run.pairs_file)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
