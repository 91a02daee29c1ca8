"""Read untrusted YAML 1.2 into plain Python values, with the line of every key.

The text is composed into nodes and converted here, so that no constructor runs: tags other than YAML's core
types, duplicate keys, alias bombs and deep nesting are problems, each with its line. This module knows
nothing about recipes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from localdpo.errors import InputError, Problem

__all__ = ["KeyPath", "YamlDocument", "parse_yaml", "read_yaml"]

KeyPath = tuple[str | int, ...]

MAX_CHARACTERS = 100_000
MAX_BRACKETS = 500  # the parser's time grows with the square of how many are open
MAX_NODES = 20_000  # after aliases are expanded
MAX_DEPTH = 24
_CORE = "tag:yaml.org,2002:"
_TEXT_TAGS = {_CORE + "str", _CORE + "timestamp"}


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """Plain values (dict, list, str, int, float, bool, None) and the 1-based line of each key path."""

    value: Any
    lines: dict[KeyPath, int]


@dataclass(slots=True)
class _Converter:
    name: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    nodes: int = 0

    def report(self, node: Node, message: str, fix: str = "") -> None:
        self.problems.append(Problem(f"{self.name}:{node.start_mark.line + 1}", message, fix))

    def convert(self, node: Node, path: KeyPath) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES or len(path) > MAX_DEPTH:
            what = f"nested deeper than {MAX_DEPTH}" if len(path) > MAX_DEPTH else "too large once expanded"
            where = f"{self.name}:{node.start_mark.line + 1}"
            raise InputError(Problem(where, f"is {what}", "Write the values out plainly, without aliases"))
        if isinstance(node, MappingNode):
            return self.mapping(node, path)
        if isinstance(node, SequenceNode):
            self.check_tag(node, "seq")
            return [self.convert(child, (*path, index)) for index, child in enumerate(node.value)]
        assert isinstance(node, ScalarNode)  # there is no fourth kind
        return self.scalar(node)

    def mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        self.check_tag(node, "map")
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self.report(key_node, "a key must be plain text")
                continue
            key = self.text(key_node)
            if key in result:
                first = self.lines[(*path, key)]
                self.report(key_node, f"the key {key!r} is already on line {first}", "Keep one of the two")
                continue
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = self.convert(value_node, (*path, key))
        return result

    def text(self, node: ScalarNode) -> str:
        """Return the text of a scalar, JSON's pairs of `\\u` escapes joined to the characters they stand for."""
        text = str(node.value)
        if "\0" in text:  # most values end up in a path or a message, where the system takes it for the end
            self.report(node, "holds the character U+0000", "Remove it")
            return ""
        try:
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self.report(node, "holds half of a character (a lone surrogate)", "Write the whole character")
            return ""

    def check_tag(self, node: Node, kind: str) -> bool:
        if node.tag == _CORE + kind:
            return True
        self.report(node, f"the tag {_short(str(node.tag))} is not allowed", "Remove it: only plain values are read")
        return False

    def scalar(self, node: ScalarNode) -> Any:
        text = self.text(node)
        if node.tag in _TEXT_TAGS:
            return text
        kind = str(node.tag).removeprefix(_CORE)
        try:
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return _integer(text)
            if kind == "float":
                return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower().replace("_", "")))
        except (ValueError, KeyError):
            self.report(node, f"{text[:40]!r} is not a value of type {kind}")
            return None
        self.check_tag(node, "str")
        return None


def _integer(text: str) -> int:
    digits = text.replace("_", "")
    # YAML 1.2: 0o17 and 0x1F are octal and hexadecimal, 017 is seventeen.
    return int(digits, 0) if digits.lower().lstrip("+-").startswith(("0o", "0x")) else int(digits)


def _short(tag: str) -> str:
    return "!!" + tag.removeprefix(_CORE) if tag.startswith(_CORE) else tag


def parse_yaml(text: str, name: str) -> YamlDocument:
    """Parse one YAML document; problems name it `name`. Raises `InputError` with all of them."""
    for size, limit, what in ((len(text), MAX_CHARACTERS, "characters"), (text.count("["), MAX_BRACKETS, "brackets")):
        if size > limit:
            raise InputError(Problem(name, f"has more than {limit:,} {what}", "Is this the right file?"))
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise InputError(Problem(where, f"is not YAML: {error.problem or error.context}")) from None
    except YAMLError as error:
        raise InputError(Problem(name, f"is not YAML: {' '.join(str(error).split())}")) from None
    except RecursionError:
        raise InputError(Problem(name, f"is nested deeper than {MAX_DEPTH}")) from None
    if node is None:
        return YamlDocument(None, {})
    converter = _Converter(name)
    value = converter.convert(node, ())
    if converter.problems:
        raise InputError(*converter.problems)
    return YamlDocument(value, converter.lines)


def read_yaml(data: bytes, name: str) -> YamlDocument:
    """`parse_yaml` for the bytes of a file: UTF-8, with or without a byte order mark."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = Problem(name, f"is not UTF-8 (byte {error.start})", "Save it as UTF-8")
        raise InputError(problem) from None
    return parse_yaml(text, name)
