"""A rich renderable with a title, facts, a table and notes, without markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dist_ckpt_mistral.messages import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
    from rich.table import Table

#: Wider than any terminal: a table's width does not depend on more.
_WIDEST: Final = 100_000


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
    copied. Where the table is too wide, each row has a line for its first cell, and the others below it.
    """
    from rich.console import Group  # noqa: PLC0415  (only tables need rich)
    from rich.padding import Padding  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    def shown(text: str, style: str = "") -> Text:
        return Text(printable(text), style=style)

    grid = Table.grid(padding=(0, 2))
    for name, value in facts:
        grid.add_row(shown(name, "bold"), shown(value))
    columns = [*columns]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name, justify in columns:
        table.add_column(shown(name), justify=justify, overflow="fold")  # a name is never cut
    stacked: list[RenderableType] = []
    for row, style in [*((row, "") for row in rows), *([(total, "bold")] if total else [])]:
        table.add_row(*map(shown, row), style=style)
        others = [f"{name} {cell}".strip() for (name, _), cell in zip(columns[1:], row[1:], strict=True) if cell]
        stacked += [shown(row[0], "bold"), Padding(shown(", ".join(others)), (0, 0, 0, 2))]
    space = [Text("")] if notes else []
    last = [Text(f"  {command}", no_wrap=True, overflow="ignore")] if command else []
    below = (shown(note, notes_style) for note in notes)
    return Group(shown(title, "bold"), grid, Text(""), _Fitting(table=table, stacked=stacked), *space, *below, *last)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Fitting:
    """A table where it fits between the margins, and the same ``stacked`` row by row where it does not."""

    table: Table
    stacked: Sequence[RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Choose: rich calls this with the width that there is."""
        width = console.measure(self.table, options=options.update(width=_WIDEST)).maximum
        yield from [self.table] if width <= options.max_width else self.stacked
