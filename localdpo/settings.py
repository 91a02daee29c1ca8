"""Turn YAML and `a.b=c` overrides into a pydantic model, or into a list of every problem with its line.

This module knows nothing about which settings there are: it reads their names, bounds and descriptions from
the model's fields.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from localdpo.errors import InputError, Problem
from localdpo.yamlfile import KeyPath, YamlDocument, parse_yaml

__all__ = ["Finding", "Settings", "conflict", "fields_of", "to_yaml", "validate"]

Model = TypeVar("Model", bound=BaseModel)
_FINDINGS = "findings"


@dataclass(frozen=True, slots=True)
class Finding:
    """Settings that are fine one by one and wrong together; the first of `keys` is the one to name."""

    keys: tuple[str, ...]
    message: str
    fix: str = ""


def conflict(findings: Sequence[Finding]) -> PydanticCustomError:
    """Return the exception that a model's validator raises to report `findings`, all of them."""
    text = "; ".join(f"{finding.keys[0]} {finding.message}" for finding in findings)
    return PydanticCustomError("conflict", "{text}", {"text": text, _FINDINGS: tuple(findings)})


@dataclass(slots=True)
class Settings:
    """Values as read, and where each came from."""

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: set[KeyPath] = field(default_factory=set)

    @classmethod
    def of(cls, document: YamlDocument, name: str) -> Settings:
        """Take over a document, whose top level must be a mapping. Raises `InputError`."""
        values = {} if document.value is None else document.value
        if not isinstance(values, dict):
            raise InputError(Problem(f"{name}:1", "must be a mapping of keys to values, such as `model: NAME`"))
        return cls(name, values, document.lines)

    def where(self, path: KeyPath) -> str:
        """Say where a key was given: by an override, or on a line, its own or that of its section."""
        key = ".".join(map(str, path))
        if self.overridden(path):
            return f"--set {key}"
        line = self.line(path)
        return f"{self.name}:{line} {key}" if line else f"{self.name} {key}"

    def overridden(self, path: KeyPath) -> bool:
        """Return whether an override gave this key or a section around it."""
        return any(path[:length] in self.overrides for length in range(1, len(path) + 1))

    def line(self, path: KeyPath) -> int:
        """Return the line of a key or of the innermost section around it, 0 when the file has neither."""
        return next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 0)

    def override(self, assignments: Sequence[str]) -> list[Problem]:
        """Apply `a.b=value` assignments in order; values are YAML. Returns what is wrong with them."""
        problems = []
        for assignment in assignments:
            key, equals, text = assignment.partition("=")
            key = key.strip()
            named = all(part and part.isprintable() for part in key.split("."))  # half characters are not
            if not equals or not named:
                fix = "Write --set section.key=value, such as --set dpo.beta=0.2"
                problems.append(Problem(f"--set {assignment}", "is not of the form key=value", fix))
                continue
            try:
                value = parse_yaml(text, f"--set {key}").value
            except InputError as error:
                problems += [replace(problem, where=f"--set {key}") for problem in error.problems]
                continue
            self._assign(tuple(key.split(".")), value)
        return problems

    def _assign(self, path: tuple[str, ...], value: Any) -> None:
        place = self.values
        for part in path[:-1]:
            inner = place.get(part)
            if not isinstance(inner, dict):
                inner = place[part] = {}
            place = inner
        place[path[-1]] = value
        self.overrides.add(path)


def fields_of(model: type[BaseModel]) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield the path and field of every setting of `model`, its sections' settings in their place."""
    for name, info in model.model_fields.items():
        section = _section(info)
        if section is None:
            yield (name,), info
        else:
            for path, inner in fields_of(section):
                yield (name, *path), inner


def _section(info: FieldInfo) -> type[BaseModel] | None:
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _sections(model: type[BaseModel]) -> set[str]:
    return {name for name, info in model.model_fields.items() if _section(info) is not None}


def validate(model: type[Model], settings: Settings, synonyms: Mapping[str, str]) -> Model:
    """Return the validated model. Raises `InputError` with every problem, in the order of the file's lines.

    `synonyms` maps names that other tools use to the dotted key they have here. A section left empty in the
    YAML counts as absent.
    """
    for name in _sections(model):
        if settings.values.get(name, 0) is None:
            del settings.values[name]
    try:
        return model.model_validate(settings.values)
    except ValidationError as error:
        translator = _Translator(model, settings, synonyms)
        problems = translator.translate(error)
        problems += translator.hidden_conflicts()
        raise InputError(*problems) from None


@dataclass(slots=True)
class _Translator:
    model: type[BaseModel]
    settings: Settings
    synonyms: Mapping[str, str]
    known: dict[tuple[str, ...], FieldInfo] = field(init=False)
    bad: set[KeyPath] = field(default_factory=set)
    conflicts_seen: bool = False

    def __post_init__(self) -> None:
        self.known = dict(fields_of(self.model))

    def translate(self, error: ValidationError) -> list[Problem]:
        by_key: dict[KeyPath, list[ErrorDetails]] = {}
        problems = []
        for details in error.errors(include_url=False):
            if details["type"] == "conflict":
                self.conflicts_seen = True
                problems += self.conflicts(details["ctx"][_FINDINGS])
            else:
                by_key.setdefault(self.key_path(details["loc"]), []).append(details)
        self.bad |= set(by_key)
        paths = sorted(by_key, key=self.settings.line)
        return [self.problem(path, by_key[path]) for path in paths] + problems

    def conflicts(self, findings: Sequence[Finding]) -> list[Problem]:
        return [
            Problem(self.settings.where(tuple(finding.keys[0].split("."))), finding.message, finding.fix)
            for finding in findings
            if not any(tuple(key.split(".")) in self.bad for key in finding.keys)
        ]

    def hidden_conflicts(self) -> list[Problem]:
        """Return the conflicts that pydantic did not look for because single values were wrong."""
        if self.conflicts_seen:
            return []
        repaired = {k: dict(v) if isinstance(v, dict) else v for k, v in self.settings.values.items()}
        for path in filter(None, self.bad):
            place: Any = repaired
            for part in path[:-1]:
                place = place.setdefault(part, {})
            info = self.known.get(path)  # type: ignore[arg-type]
            if info is not None and info.is_required():
                place[path[-1]] = "placeholder"
            elif isinstance(place, dict):
                place.pop(path[-1], None)
        try:
            self.model.model_validate(repaired)
        except ValidationError as error:
            found = [d for d in error.errors(include_url=False) if d["type"] == "conflict"]
            return [problem for details in found for problem in self.conflicts(details["ctx"][_FINDINGS])]
        return []

    def key_path(self, loc: tuple[int | str, ...]) -> KeyPath:
        """Cut what pydantic adds to a location (the branch of a union, the index in a list)."""
        for length in range(len(loc), 0, -1):
            if loc[:length] in self.known:
                return loc[:length]
        return loc

    def problem(self, path: KeyPath, errors: list[ErrorDetails]) -> Problem:
        where = self.settings.where(path)
        if errors[0]["type"] == "extra_forbidden":
            return Problem(where, "is not a key of a recipe", self.suggestion(path))
        info = self.known.get(path)  # type: ignore[arg-type]
        fix = (info.description if info is not None else "") or ""
        if errors[0]["type"] == "missing":
            return Problem(where, "is missing", fix)
        if info is None:
            return Problem(where, "must be a section with keys of its own", self.section_help(path))
        return Problem(where, f"{_shown(self.value_at(path))} {_reason(errors)}", fix)

    def section_help(self, path: KeyPath) -> str:
        keys = [p[-1] for p in self.known if p[:-1] == path]
        return f"Its keys are {', '.join(keys)}" if keys else ""

    def suggestion(self, path: KeyPath) -> str:
        """Return "did you mean" for an unknown key: a neighbour first, then a synonym, then any key."""
        name = str(path[-1])
        siblings = {p[len(path) - 1] for p in self.known if p[: len(path) - 1] == path[:-1]}
        close = difflib.get_close_matches(name, sorted(siblings), n=1, cutoff=0.7)
        if close:
            return f"Did you mean {'.'.join([*map(str, path[:-1]), close[0]])}?"
        if name in self.synonyms:
            return f"Did you mean {self.synonyms[name]}?"
        leaves = {p[-1]: ".".join(p) for p in self.known}
        close = difflib.get_close_matches(name, sorted(leaves), n=1, cutoff=0.75)
        if close:
            return f"Did you mean {leaves[close[0]]}?"
        return f"Keys here are {', '.join(sorted(siblings))}" if siblings else ""

    def value_at(self, path: KeyPath) -> Any:
        value: Any = self.settings.values
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value


def _shown(value: Any) -> str:
    text = {None: "null", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else None
    text = text or (repr(value) if isinstance(value, str) else str(value))
    return textwrap.shorten(text, 60, placeholder="…")


def _reason(errors: list[ErrorDetails]) -> str:
    # In a union every branch complains; the one whose type fits knows what is really wrong.
    telling = [e for e in errors if "ctx" in e and not e["type"].endswith(("_type", "literal_error"))]
    if len(errors) > 1 and not telling:
        return "is not accepted here"
    message = (telling or errors)[0]["msg"]
    message = message.replace("Input should be a valid tuple", "is not a list", 1)
    return message.replace("Input should be a valid", "is not a valid", 1).removeprefix("Input ")


def to_yaml(model: BaseModel, heading: str = "") -> str:
    """Return every setting as YAML, each under its description; reading it back gives the same model."""
    document = _commented(model, 0)
    if heading:
        document.yaml_set_start_comment(heading)
    yaml = YAML()
    yaml.Representer = _ExplicitNull
    yaml.width = 4096  # long values stay on their line
    out = StringIO()
    yaml.dump(document, out)
    return out.getvalue()


class _ExplicitNull(RoundTripRepresenter):
    """Writes `null` rather than nothing, so that a reader sees a value."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")


_ExplicitNull.add_representer(type(None), _ExplicitNull.represent_none)


def _commented(model: BaseModel, indent: int) -> CommentedMap:
    plain = model.model_dump(mode="json")
    result = CommentedMap()
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        result[name] = _commented(value, indent + 2) if isinstance(value, BaseModel) else plain[name]
        comment = textwrap.fill(info.description or "", 100 - indent)
        result.yaml_set_comment_before_after_key(name, before=comment, indent=indent)
    return result
