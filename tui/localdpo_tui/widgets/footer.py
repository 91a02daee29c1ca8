"""The last line of every screen: the keys that do something now, and always Help and Quit."""

from __future__ import annotations

from textual.binding import ActiveBinding, Binding
from textual.content import Content
from textual.keys import key_to_character
from textual.screen import Screen
from textual.style import Style
from textual.widget import Widget

ALWAYS = ("f1", "ctrl+q")
_SIGNS = {"slash": "/"}  # keys whose names Textual does not turn back into characters


class FooterLine(Widget):
    """One line made of the active bindings, nearest to the focus first; what does not fit is left out.

    Help and Quit keep their place at the right whatever the width. A click on a hint presses its key.
    """

    COMPONENT_CLASSES = {"footerline--key", "footerline--label"}  # noqa: RUF012
    ALLOW_SELECT = False

    def __init__(self) -> None:
        super().__init__()
        self.auto_links = False  # hints are no hyperlinks: no underline, no colours of their own

    def on_mount(self) -> None:
        """Follow the screen's bindings."""
        self.screen.bindings_updated_signal.subscribe(self, self._changed)

    def _changed(self, _screen: Screen[object]) -> None:
        self.refresh()

    def render(self) -> Content:
        """Return the line."""
        active = [item for item in self.screen.active_bindings.values() if item.enabled]
        fixed = [self._hint(item) for key in ALWAYS for item in active if item.binding.key == key]
        right = Content("").join(fixed)
        room = self.size.width - right.cell_length
        line = Content("")
        for item in self._shown(active):
            hint = self._hint(item)
            if line.cell_length + hint.cell_length > room:
                break
            line = line + hint
        return Content("").join([line, Content(" " * (room - line.cell_length)), right])

    def _shown(self, active: list[ActiveBinding]) -> list[ActiveBinding]:
        seen: set[str] = set()
        result = []
        for item in active:
            binding = item.binding
            if binding.show and binding.key not in ALWAYS and binding.action not in seen and not self._typed(binding):
                seen.add(binding.action)
                result.append(item)
        # The way out comes first: it is what a stranger looks for.
        return sorted(result, key=lambda item: item.binding.key != "escape")

    def _typed(self, binding: Binding) -> bool:
        """Tell whether the key is a character that the focused text would take."""
        focused = self.screen.focused
        character = key_to_character(binding.key) or _SIGNS.get(binding.key)
        return focused is not None and character is not None and focused.check_consume_key(binding.key, character)

    def _hint(self, item: ActiveBinding) -> Content:
        click = Style.from_meta({"@click": f"app.simulate_key({item.binding.key!r})"})
        key = Content.styled(
            f" {self.app.get_key_display(item.binding)} ",
            self.get_visual_style("footerline--key", partial=True) + click,
        )
        label = Content.styled(
            f"{item.binding.description} ", self.get_visual_style("footerline--label", partial=True) + click
        )
        return key + label
