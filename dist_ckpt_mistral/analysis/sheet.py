"""A rich renderable with a title, facts, a table and notes, without markup."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dist_ckpt_mistral.messages import printable

if TYPE_CHECKING:
    from rich.console import JustifyMethod, RenderableType


def sheet(
    title: str,
    facts: Iterable[tuple[str, str]],
    columns: Iterable[tuple[str, JustifyMethod]],
    rows: Iterable[Sequence[str]],
    *,
    total: Sequence[str] = (),
    notes: Sequence[str] = (),
    notes_style: str = "",
    command: str = "",
) -> RenderableType:
    """Lay out texts, which may come from files: ``printable`` escapes each.

    ``total`` is a last row, in bold. ``command`` follows the notes on a line of its own, however long: it is to be
    copied.
    """
    from rich.console import Group  # noqa: PLC0415  (only tables need rich)
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def shown(text: str, style: str = "") -> Text:
        return Text(printable(text), style=style)

    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        grid.add_row(shown(name, "bold"), shown(value))
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in columns:
        table.add_column(shown(name), justify=justify, overflow="fold")  # a name is never cut
    for row in rows:
        table.add_row(*map(shown, row))
    if total:
        table.add_row(*map(shown, total), style="bold")
    space = [Text("")] if notes else []
    last = [Text(f"  {command}", no_wrap=True, overflow="ignore")] if command else []
    below = (shown(note, notes_style) for note in notes)
    return Group(shown(title, "bold"), grid, Text(""), table, *space, *below, *last)
