"""Change single values in the text of a YAML file and leave every other byte as it was.

The text is composed into nodes for their positions alone; the new value is spliced in, and the result is read
again: it must hold the old values with this one change, or nothing is changed. So comments, order, quoting and
line ends stay the user's. This module knows mappings within mappings, and nothing about recipes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from localdpo.errors import InputError, Problem
from localdpo.yamlfile import parse_yaml

__all__ = ["remove_key", "set_key", "yaml_literal"]

Key = tuple[str, ...]


def yaml_literal(value: Any) -> str:
    """``value`` (None, bool, number, text, list or mapping of these) as YAML on one line."""
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_item, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_item(key)}: {_item(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def set_key(text: str, key: Key, literal: str, order: Sequence[Key] = ()) -> str:
    """Return ``text`` with ``key`` set to the YAML ``literal``, in its place or as a new line.

    A new key goes after the nearest one before it in ``order``. Raises InputError when the text cannot be
    changed there without changing something else (an alias, say) or ``literal`` is not YAML.
    """
    value = parse_yaml(literal, ".".join(key)).value
    expected = _assigned(_values(text), key, value)
    for candidate in dict.fromkeys((literal, yaml_literal(value), _quoted(value))):
        changed = _spliced(text, key, candidate, order)
        if changed is not None and _reads_as(changed, expected):
            return changed
    raise _by_hand(key)


def remove_key(text: str, key: Key) -> str:
    """Return ``text`` without ``key``, its line and the comment on it. Raises InputError like :func:`set_key`."""
    expected = _values(text)
    place = expected
    for part in key[:-1]:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or key[-1] not in place:
        return text
    del place[key[-1]]
    changed = _cut(text, key)
    if changed is not None and _reads_as(changed, expected):
        return changed
    raise _by_hand(key)


def has_comment(text: str, key: Key) -> bool:
    """Whether the line of ``key`` ends in a comment."""
    entry = _find(_compose(text), key)
    if entry is None:
        return False
    rest = text[_end(entry.value) : _line_end(text, _end(entry.value))]
    return rest.lstrip(" \t,").startswith("#")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A key with its value, and the mapping around both."""

    key: Node
    value: Node
    mapping: MappingNode


def _by_hand(key: Key) -> InputError:
    where = ".".join(key)
    return InputError(Problem(where, "is written in a way that cannot be changed from here", "Change it in an editor"))


def _values(text: str) -> Any:
    value = parse_yaml(text, "recipe").value
    return {} if value is None else copy.deepcopy(value)


def _reads_as(text: str, expected: Any) -> bool:
    try:
        return _same(_values(text), expected)
    except InputError:
        return False


def _same(left: Any, right: Any) -> bool:
    # A section without keys reads as null; 1 == True and 1 == 1.0, which are not the same here.
    if isinstance(left, dict) or isinstance(right, dict):
        left, right = left or {}, right or {}
        return (
            isinstance(left, dict)
            and isinstance(right, dict)
            and left.keys() == right.keys()
            and all(_same(left[key], right[key]) for key in left)
        )
    return type(left) is type(right) and bool(left == right)


def _assigned(values: Any, key: Key, value: Any) -> Any:
    place = values
    for part in key[:-1]:
        if not isinstance(place, dict):
            raise _by_hand(key)
        if not isinstance(place.get(part), dict):
            if place.get(part) is not None:
                raise _by_hand(key)
            place[part] = {}
        place = place[part]
    if not isinstance(place, dict):
        raise _by_hand(key)
    place[key[-1]] = value
    return values


def _is_plain(value: str) -> bool:
    try:
        return "\n" not in value and parse_yaml(value, "value").value == value
    except InputError:
        return False


def _item(value: Any) -> str:
    """A value inside [ ] or { }, where commas and brackets mean something."""
    literal = yaml_literal(value)
    if isinstance(value, str) and any(mark in value for mark in ",[]{}:#"):
        return json.dumps(value, ensure_ascii=False)
    return literal


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else yaml_literal(value)


def _compose(text: str) -> Node | None:
    node: Node | None = YAML(typ="safe", pure=True).compose(text)
    return node


def _entries(mapping: Node | None) -> Iterator[_Entry]:
    if isinstance(mapping, MappingNode):
        for key, value in mapping.value:
            yield _Entry(key, value, mapping)


def _find(root: Node | None, key: Key) -> _Entry | None:
    found: _Entry | None = None
    for part in key:
        found = next((entry for entry in _entries(root) if str(entry.key.value) == part), None)
        if found is None:
            return None
        root = found.value
    return found


def _is_empty(node: Node) -> bool:
    return isinstance(node, ScalarNode) and node.start_mark.index == node.end_mark.index


def _flows(node: Node) -> bool:
    """Whether a collection is written in brackets."""
    return isinstance(node, MappingNode | SequenceNode) and bool(node.flow_style)


def _is_block(node: Node) -> bool:
    """Whether the value is written over lines of its own."""
    return node.style in ("|", ">") if isinstance(node, ScalarNode) else not _flows(node)


def _end(node: Node) -> int:
    """Where the text of a node ends: the marks of block collections lie beyond the comments after them."""
    if isinstance(node, ScalarNode) or _flows(node):
        return int(node.end_mark.index)
    children = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else node.value
    return max(map(_end, children))


def _line_end(text: str, index: int) -> int:
    found = text.find("\n", index)
    if found < 0:
        return len(text)
    return found - 1 if text[found - 1] == "\r" else found


def _line_start(text: str, index: int) -> int:
    return text.rfind("\n", 0, index) + 1


def _newline(text: str) -> str:
    return "\r\n" if "\r\n" in text else "\n"


def _spliced(text: str, key: Key, literal: str, order: Sequence[Key]) -> str | None:
    root = _compose(text)
    entry = _find(root, key)
    if entry is not None:
        return _replaced(text, entry, literal)
    if len(key) == 1:
        return _inserted(text, root, key, literal, order)
    section = _find(root, key[:-1])
    if section is None:
        # One line below the new section's own: the sections of a recipe are one level deep.
        indented = f"{_newline(text)}{_indent(text, root)}{key[-1]}: {literal}"
        return _inserted(text, root, key[:-1], indented, order)
    if isinstance(section.value, MappingNode) and section.value.value:
        return _inserted(text, section.value, key, literal, order)
    if isinstance(section.value, MappingNode):  # {}
        return text[: section.value.start_mark.index] + f"{{{key[-1]}: {literal}}}" + text[_end(section.value) :]
    at = _line_end(text, _end(section.key))
    return text[:at] + f"{_newline(text)}{_indent(text, root)}{key[-1]}: {literal}" + text[at:]


def _indent(text: str, root: Node | None) -> str:
    """The indentation that the file's sections use; two spaces where there is none yet."""
    for entry in _entries(root):
        for inner in _entries(entry.value):
            if not _flows(entry.value):
                return " " * int(inner.key.start_mark.column)
    return "  "


def _replaced(text: str, entry: _Entry, literal: str) -> str:
    start, end = int(entry.value.start_mark.index), _end(entry.value)
    if _is_block(entry.value):
        return _replaced_block(text, entry, literal)
    if _is_empty(entry.value):
        colon = text.index(":", _end(entry.key)) + 1
        return text[:colon] + " " + _aligned(literal, "", text[colon:])
    old = text[start:end]
    return text[:start] + _aligned(_styled(literal, old), old, text[end:])


def _replaced_block(text: str, entry: _Entry, literal: str) -> str:
    """A value over several lines becomes one on the line of its key."""
    colon = text.index(":", _end(entry.key)) + 1
    end = len(text[: _end(entry.value)].rstrip("\r\n"))
    head_end = colon if isinstance(entry.value, ScalarNode) else _line_end(text, colon)
    return text[:colon] + " " + literal + text[colon:head_end] + text[_line_end(text, end) :]


def _styled(literal: str, old: str) -> str:
    """Text keeps the kind of quotes it had."""
    if old[:1] == '"' and literal[:1] not in ("'", '"') and _is_text(literal):
        return json.dumps(literal, ensure_ascii=False)
    if old[:1] == "'" and literal[:1] not in ("'", '"') and _is_text(literal):
        return "'" + literal.replace("'", "''") + "'"
    return literal


def _is_text(literal: str) -> bool:
    return isinstance(parse_yaml(literal, "value").value, str)


def _aligned(new: str, old: str, rest: str) -> str:
    """``new`` in place of ``old`` before ``rest``, with a comment on this line kept in its column."""
    spaces = len(rest) - len(rest.lstrip(" "))
    if not spaces or rest[spaces : spaces + 1] != "#":
        return new + rest
    return new + " " * max(1, spaces + len(old) - len(new)) + rest[spaces:]


def _inserted(text: str, mapping: Node | None, key: Key, literal: str, order: Sequence[Key]) -> str:
    line = f"{key[-1]}:{literal}" if literal.startswith(("\n", "\r")) else f"{key[-1]}: {literal}"
    entries = list(_entries(mapping))
    if not entries:
        glue = "" if not text or text.endswith("\n") else _newline(text)
        return f"{text}{glue}{line}{_newline(text)}"
    before = _before(entries, key, order)
    if entries[0].mapping.flow_style:
        if before is None:
            at = int(entries[0].key.start_mark.index)
            return f"{text[:at]}{line}, {text[at:]}"
        at = _end(before.value)
        return f"{text[:at]}, {line}{text[at:]}"
    indent = " " * int(entries[0].key.start_mark.column)
    if before is None:
        at = _line_start(text, int(entries[0].key.start_mark.index))
        return f"{text[:at]}{indent}{line}{_newline(text)}{text[at:]}"
    at = _line_end(text, max(_end(before.key), len(text[: _end(before.value)].rstrip("\r\n"))))
    return f"{text[:at]}{_newline(text)}{indent}{line}{text[at:]}"


def _before(entries: Sequence[_Entry], key: Key, order: Sequence[Key]) -> _Entry | None:
    """The entry a new key goes after: the nearest before it in ``order``, the last when none of them is known."""
    names = list(dict.fromkeys(known[len(key) - 1] for known in order if known[: len(key) - 1] == key[:-1]))
    if key[-1] not in names:
        return entries[-1]
    earlier = names[: names.index(key[-1])]
    present = {str(entry.key.value): entry for entry in entries}
    return next((present[name] for name in reversed(earlier) if name in present), None)


def _cut(text: str, key: Key) -> str | None:
    entry = _find(_compose(text), key)
    if entry is None:
        return None
    if entry.mapping.flow_style:
        return _cut_flow(text, entry)
    start = _line_start(text, int(entry.key.start_mark.index))
    end = _line_end(text, max(_end(entry.key), len(text[: _end(entry.value)].rstrip("\r\n"))))
    after = text.find("\n", end) + 1
    return text[:start] + (text[after:] if after else "")


def _cut_flow(text: str, entry: _Entry) -> str:
    pairs = list(_entries(entry.mapping))
    index = next(number for number, pair in enumerate(pairs) if pair.key is entry.key)
    if index:
        return text[: _end(pairs[index - 1].value)] + text[_end(entry.value) :]
    if len(pairs) > 1:
        return text[: entry.key.start_mark.index] + text[pairs[1].key.start_mark.index :]
    return text[: entry.key.start_mark.index] + text[_end(entry.value) :]
