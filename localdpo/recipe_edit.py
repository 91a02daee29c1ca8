"""Change keys of a recipe file: what a form needs to show every key, check it and write it back.

Help, default, type, choices and bounds of a key come from the recipe's own models. The user's comments, order
and quoting stay, because single values are changed in the text. Nothing is written that `load_recipe` would
refuse, nor over a file that someone else has changed. This module knows no terminal and loads no mlx.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from localdpo.errors import InputError, Problem
from localdpo.files import atomic_write
from localdpo.recipe import Recipe, check_recipe, recipe_schema
from localdpo.settings import Settings
from localdpo.yamledit import has_comment, remove_key, set_key, yaml_literal
from localdpo.yamlfile import parse_yaml

__all__ = ["RecipeEdit", "Setting", "settings"]

Kind = Literal["text", "file", "integer", "number", "flag", "choice", "list"]
_BOM = "\ufeff"


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of a recipe as a form shows it.

    ``kind`` is that of its main value; ``choices`` are the words it takes, alone or beside other values;
    ``nullable`` keys may be null; ``accepts`` says in words what is allowed. ``default`` is plain JSON.
    """

    key: str
    help: str
    kind: Kind
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()
    closed: bool = False
    nullable: bool = False
    accepts: str = ""

    @property
    def section(self) -> str:
        """The group the key is in; empty for those at the top."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The key without its section."""
        return self.key.rpartition(".")[2]

    @property
    def path(self) -> tuple[str, ...]:
        """The key as a path."""
        return tuple(self.key.split("."))


@cache
def settings() -> tuple[Setting, ...]:
    """Every key of a recipe, in the order of the models."""
    return tuple(_settings(recipe_schema()))


def _settings(schema: Mapping[str, Any]) -> Iterator[Setting]:
    for name, spec in schema["properties"].items():
        reference = spec.get("$ref")
        if reference is None:
            yield _setting(name, spec, name in schema["required"])
            continue
        inner = schema["$defs"][reference.rpartition("/")[2]]
        for key, value in inner["properties"].items():
            yield _setting(f"{name}.{key}", value, key in inner.get("required", ()))


def _setting(key: str, spec: Mapping[str, Any], required: bool) -> Setting:
    branches = list(spec.get("anyOf", [spec]))
    solid = [branch for branch in branches if branch["type"] != "null"]
    words = tuple(
        yaml_literal(word)
        for branch in solid
        for word in branch.get("enum", [branch["const"]] if "const" in branch else [])
    )
    nullable = len(solid) < len(branches)
    closed = all("enum" in branch or "const" in branch or branch["type"] == "boolean" for branch in solid)
    if closed:
        words += ("true", "false") if any(branch["type"] == "boolean" for branch in solid) else ()
        words += ("null",) if nullable else ()
    return Setting(
        key=key,
        help=str(spec.get("description", "")),
        kind=_kind(solid, closed),
        default=spec.get("default"),
        required=required,
        choices=words,
        closed=closed,
        nullable=nullable,
        accepts=_accepts(branches),
    )


def _kind(branches: Sequence[Mapping[str, Any]], closed: bool) -> Kind:
    if closed:
        return "flag" if all(branch["type"] == "boolean" for branch in branches) else "choice"
    open_ones = [branch for branch in branches if "enum" not in branch and "const" not in branch]
    kinds: dict[str, Kind] = {"integer": "integer", "number": "number", "boolean": "flag", "array": "list"}
    first = open_ones[0]
    if first["type"] in kinds:
        return kinds[first["type"]]
    return "file" if first.get("format") == "path" else "text"


def _accepts(branches: Sequence[Mapping[str, Any]]) -> str:
    return ", or ".join(map(_branch_text, branches))


def _branch_text(branch: Mapping[str, Any]) -> str:
    if "const" in branch:
        return str(branch["const"])
    if "enum" in branch:
        return ", ".join(map(str, branch["enum"]))
    if branch["type"] == "array":
        items = branch["items"]
        some = f"names such as [{', '.join(items.get('examples', ['q_proj', 'v_proj']))}]"
        return f"a list of {', '.join(items['enum']) if 'enum' in items else some}"
    kind = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "true or false",
        "null": "null",
        "string": "a path" if branch.get("format") == "path" else "text",
    }[branch["type"]]
    bounds = [
        f"{words} {branch[name]:g}"
        for name, words in (
            ("exclusiveMinimum", "above"),
            ("minimum", "from"),
            ("exclusiveMaximum", "below"),
            ("maximum", "up to"),
        )
        if name in branch
    ]
    return " ".join([kind, *bounds])


class RecipeEdit:
    """A recipe file being changed. Changes are to the text in memory until ``save``."""

    def __init__(self, path: str | Path, data: bytes) -> None:
        """``data`` are the bytes of the file. Raises InputError when they are not YAML at all."""
        self.path = Path(path)
        self._on_disk = data
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(Problem(str(path), f"is not UTF-8 (byte {error.start})", "Save it as UTF-8")) from None
        self._bom = text.startswith(_BOM)
        self._original = self._text = text.removeprefix(_BOM)
        self._undo: list[str] = []
        self._values = _mapping(self._text, str(path))

    @classmethod
    def open(cls, path: str | Path) -> RecipeEdit:
        """Read a recipe. Raises InputError when there is none or it is not YAML."""
        try:
            return cls(path, Path(path).read_bytes())
        except OSError as error:
            what = "there is no such recipe" if isinstance(error, FileNotFoundError) else str(error.strerror)
            raise InputError(Problem(str(path), what, "`localdpo init` writes one to start from")) from None

    @property
    def text(self) -> str:
        """The recipe as it would be written."""
        return self._text

    @property
    def changed(self) -> bool:
        """Whether something differs from the file as it was read or last saved."""
        return self._text != self._original

    def changed_elsewhere(self) -> bool:
        """Whether the file is no longer what was read or last saved here."""
        try:
            return self.path.read_bytes() != self._on_disk
        except OSError:
            return True

    def given(self, key: str) -> bool:
        """Whether the file has a value for ``key`` of its own."""
        return _lookup(self._values, _known(key).path)[0]

    def value(self, key: str) -> Any:
        """The value of ``key`` as written, else its default."""
        given, value = _lookup(self._values, _known(key).path)
        return value if given else self._default(key)

    def shown(self, key: str) -> str:
        """The value of ``key`` as text for a form; what ``set`` takes back."""
        value = self.value(key)
        return value if isinstance(value, str) else yaml_literal(value)

    def set(self, key: str, text: str) -> None:
        """Give ``key`` the value typed as ``text``, right or wrong: ``problems`` tells.

        Raises InputError, with the key, when ``text`` is no YAML value or the file cannot be changed there.
        """
        setting = _known(key)
        self._change(set_key(self._text, setting.path, self._literal(setting, text), _order()))

    def reset(self, key: str) -> None:
        """Go back to the default: the key's line goes, unless it has a comment, which stays with the default.

        Raises InputError for a key that must be given.
        """
        setting = _known(key)
        if setting.required:
            raise InputError(Problem(key, "must be given", "It has no default"))
        if not self.given(key):
            return
        if has_comment(self._text, setting.path):
            literal = yaml_literal(self._default(key))
            self._change(set_key(self._text, setting.path, literal, _order()))
        else:
            self._change(remove_key(self._text, setting.path))

    def undo(self) -> bool:
        """Take back the latest change; False when there is none."""
        if not self._undo:
            return False
        self._text = self._undo.pop()
        self._values = _mapping(self._text, str(self.path))
        return True

    def check(self, *, check_files: bool = True) -> Recipe:
        """The recipe as it stands. Raises InputError with every problem, like ``load_recipe``."""
        return check_recipe(self._text, self.path, check_files=check_files)

    def problems(self, *, check_files: bool = True) -> dict[str, list[Problem]]:
        """What is wrong, by key; under "" what belongs to no key of a recipe."""
        try:
            self.check(check_files=check_files)
        except InputError as error:
            return _by_key(error.problems)
        return {}

    def save(self) -> None:
        """Write the file. Raises InputError when the recipe is not valid or the file has changed elsewhere."""
        self.check(check_files=False)
        if self.changed_elsewhere():
            raise InputError(
                Problem(
                    str(self.path),
                    "has changed on the disk since it was read here",
                    "Reload it: your changes are made again on top of it",
                )
            )
        data = ((_BOM if self._bom else "") + self._text).encode()
        atomic_write(self.path, data)
        self._on_disk, self._original = data, self._text

    def reload(self) -> list[Problem]:
        """Read the file again and make the changes of this form on it; returns what could not be made again."""
        fresh = RecipeEdit.open(self.path)
        problems: list[Problem] = []
        before = _mapping(self._original)
        for setting in settings():
            was, now = _lookup(before, setting.path), _lookup(self._values, setting.path)
            if was == now:
                continue
            try:
                if now[0]:
                    fresh.set(setting.key, self.shown(setting.key))
                else:
                    fresh.reset(setting.key)
            except InputError as error:
                problems += error.problems
        self._undo.append(self._text)
        self._on_disk, self._bom = fresh._on_disk, fresh._bom
        self._original, self._text, self._values = fresh._original, fresh._text, fresh._values
        return problems

    def _change(self, text: str) -> None:
        if text != self._text:
            self._undo.append(self._text)
            self._text, self._values = text, _mapping(text, str(self.path))

    def _default(self, key: str) -> Any:
        return f"runs/{self.path.stem}" if key == "output_dir" else _known(key).default

    @staticmethod
    def _literal(setting: Setting, text: str) -> str:
        text = " ".join(text.split()) if setting.kind != "list" else text.strip()
        if text == "null" or (setting.choices and text in setting.choices):
            return text
        if setting.kind == "text" or (setting.kind == "file" and not _is_number(text)):
            return yaml_literal(text)
        return text or '""'


def _lookup(values: Mapping[str, Any], path: Sequence[str]) -> tuple[bool, Any]:
    """Whether there is a value at ``path``, and the value."""
    place: Any = values
    for part in path:
        if not isinstance(place, dict) or part not in place:
            return False, None
        place = place[part]
    return True, place


def _known(key: str) -> Setting:
    for setting in settings():
        if setting.key == key:
            return setting
    raise InputError(Problem(key, "there is no such key in a recipe"))


def _order() -> list[tuple[str, ...]]:
    return [setting.path for setting in settings()]


def _mapping(text: str, name: str = "recipe") -> dict[str, Any]:
    return Settings.of(parse_yaml(text, name), name).values


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _by_key(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    keys = {setting.key for setting in settings()}
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        # "recipe.yaml:12 train.learning_rate": the key is what follows the last space.
        key = problem.where.rpartition(" ")[2]
        found.setdefault(key if key in keys else "", []).append(problem)
    return found
