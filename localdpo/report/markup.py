"""HTML and SVG out of values that may hold anything.

`escape` is the one way from a text to markup: `tag` uses it, and so does every expression of a template
(`localdpo.report.page`). Only `Markup` goes in as it is. Attributes that could run code or leave the page (`on…`,
`style`, links to elsewhere) are refused by `tag`, whatever is in them, and written in no template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from markupsafe import Markup
from markupsafe import escape as html_escape

from localdpo.text import sanitise

__all__ = ["Child", "Markup", "escape", "inert", "joined", "tag"]

_NOT_XML = re.compile("[\ufffe\uffff]")
_LINKS = frozenset({"href", "src", "action", "formaction", "data", "srcset", "xlink:href"})

Child = Markup | str | int | float | None | Iterable["Child"]
"""What an element may hold: markup, text, a number, nothing, or several of these."""


def inert(value: object) -> object:
    """`value` as text that neither steers its reader nor is outside XML; markup as it is, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, Markup):
        return value
    return _NOT_XML.sub(lambda match: f"<U+{ord(match.group()):04X}>", sanitise(str(value)))


def escape(value: object) -> Markup:
    """`value` as text that cannot end where it stands: in elements, in quoted attributes, in XML.

    Control and direction-changing characters are made visible (`localdpo.text.sanitise`).
    """
    return html_escape(inert(value))


def joined(children: Child) -> Markup:
    """The markup of children, one after the other."""
    if children is None or isinstance(children, str | int | float):
        return escape(children)
    return Markup("").join(map(joined, children))


def tag(name: str, /, *children: Child, **attributes: Any) -> Markup:
    """The element `name`. `class_` is the attribute class, `aria_label` is aria-label; None leaves one out.

    Raises ValueError for an attribute that could run code or fetch something: a fault of the caller.
    """
    written = "".join(
        _attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None
    )
    return Markup(f"<{name}{written}>{joined(children)}</{name}>")


def _attribute(name: str, value: object) -> str:
    if name.startswith("on") or name == "style" or (name in _LINKS and not str(value).startswith("#")):
        raise ValueError(f"a page must not have the attribute {name}={value!r}")
    return f' {name}="{escape(value)}"'
