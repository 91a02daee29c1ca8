"""HTML and SVG out of values that may hold anything.

`escape` is the one way from a text to markup, and `tag` the one way to build elements: a string given to `tag` is
escaped, only `Markup` goes in as it is, and `Markup` comes from these two alone. Attributes that could run code or
leave the page (`on…`, `style`, links to elsewhere) are refused, whatever is in them. It knows nothing about runs.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

from localdpo.text import sanitise

__all__ = ["Child", "Markup", "escape", "joined", "tag"]

_VOID = frozenset({"br", "input", "meta", "col", "hr"})
_NOT_XML = re.compile("[\ufffe\uffff]")
_LINKS = frozenset({"href", "src", "action", "formaction", "data", "srcset", "xlink:href"})


class Markup(str):
    """A string that is HTML or SVG already, every text in it escaped."""

    __slots__ = ()


Child = Markup | str | int | float | None | Iterable["Child"]
"""What an element may hold: markup, text, a number, nothing, or several of these."""


def escape(value: object) -> Markup:
    """`value` as text that cannot end where it stands or steer a reader: in elements, in quoted attributes, in XML.

    Control and direction-changing characters are made visible (`localdpo.text.sanitise`).
    """
    shown = _NOT_XML.sub(lambda match: f"<U+{ord(match.group()):04X}>", sanitise(str(value)))
    return Markup(html.escape(shown, quote=True))


def joined(children: Child) -> Markup:
    """The markup of children, one after the other."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int | float):
        return escape(children)
    return Markup("".join(map(joined, children)))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """The element `name`. `class_` is the attribute class, `aria_label` is aria-label; None and False leave one out.

    Raises ValueError for an attribute that could run code or fetch something: a fault of the caller.
    """
    written = "".join(
        _attribute(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def _attribute(name: str, value: object) -> str:
    if name.startswith("on") or name == "style" or (name in _LINKS and not str(value).startswith("#")):
        raise ValueError(f"a page must not have the attribute {name}={value!r}")
    return f" {name}" if value is True else f' {name}="{escape(value)}"'
