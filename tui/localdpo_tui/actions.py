"""The action registry: everything a key does is declared once, here or beside the widget that does it.

Keys, footer, command palette and help are made from it, so they cannot disagree. It knows nothing about what
an action does: `Action.name` names a method `action_<name>` of the widget, screen or app that declares it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from textual.binding import Binding, BindingType
from textual.dom import DOMNode

__all__ = ["Action", "available", "bindings", "register", "registered"]


@dataclass(frozen=True, slots=True)
class Action:
    """Something the user can do.

    `id` is `where.name`; `key` is Textual's name of the key, several with commas, "" for palette only. `label`
    is for the footer (one or two words), `title` for the palette and help, `help` is a sentence. `priority`
    takes the key before the focused widget sees it.
    """

    id: str
    key: str
    label: str
    help: str
    group: str = ""
    footer: bool = True
    priority: bool = False
    where: str = ""

    @property
    def name(self) -> str:
        """The part of the id that names the method: `pairs.new` is done by `action_new`."""
        return self.id.rpartition(".")[2]


_REGISTRY: dict[str, Action] = {}


def register(where: str, *actions: Action) -> tuple[Action, ...]:
    """Add actions of the place, widget or dialog `where`, and return them. An id may be registered once."""
    placed = []
    for action in actions:
        whole = Action(
            action.id,
            action.key,
            action.label,
            action.help,
            action.group or where.partition(".")[0].capitalize(),
            action.footer,
            action.priority,
            where,
        )
        if _REGISTRY.get(whole.id, whole) != whole:
            raise ValueError(f"the action {whole.id} is registered twice")
        _REGISTRY[whole.id] = whole
        placed.append(whole)
    return tuple(placed)


def registered() -> list[Action]:
    """Return every action known so far; a place that was never opened has not registered its own."""
    return list(_REGISTRY.values())


def bindings(actions: Iterable[Action]) -> list[BindingType]:
    """Return the key bindings of `actions`, for a class's `BINDINGS`."""
    return [
        Binding(
            action.key,
            action.name,
            action.label,
            show=action.footer,
            tooltip=action.help,
            priority=action.priority,
            id=action.id,
        )
        for action in actions
        if action.key
    ]


def available(chain: Iterable[DOMNode]) -> list[tuple[DOMNode, Action]]:
    """Return the actions of the nodes of `chain` that can be done now, nearest first, each once."""
    found: dict[str, tuple[DOMNode, Action]] = {}
    for node in chain:
        for action in getattr(node, "ACTIONS", ()):
            if node.check_action(action.name, ()):
                found.setdefault(action.id, (node, action))
    return list(found.values())
