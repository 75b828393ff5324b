# SPDX-License-Identifier: Apache-2.0
"""Tables and text for whoever reads: fitted to a terminal, whole everywhere else.

On a terminal nothing is wider than it; what doesn't fit goes on in the next line, names first. In a pipe, a file or a
log a row is a line, however long and whatever COLUMNS says: what is searched for or copied is in one piece.
"""

from __future__ import annotations

import os
import sys
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Literal, TextIO

    from rich.console import ConsoleOptions, RenderableType, RenderResult

    Side = Literal["left", "right"]

WIDEST: Final = 99
"""Columns that are used of a terminal at most: longer lines are hard to read."""
_NARROWEST: Final = 40
_WHOLE: Final = 1_000_000
"""Columns of what is no terminal, for rich, which wants a number."""
_LONG: Final = 500
"""Rows from which a table is drawn by ``_Long``."""


def columns(stream: TextIO | None = None) -> int | None:
    """Columns to fit a text into, 40 to 99; None: it is for no terminal, so don't wrap. ``stream``: default stdout."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return None
    return max(_NARROWEST, min(os.get_terminal_size(stream.fileno()).columns, WIDEST))


def console(*, err: bool = False) -> Console:
    """Where tables go; colours and lines only on a terminal, and no colours with NO_COLOR (no-color.org)."""
    stream = sys.stderr if err else sys.stdout
    width = columns(stream)
    tty = None if width else False  # None: rich finds out what the terminal can do
    return Console(file=stream, width=width or _WHOLE, highlight=False, emoji=False, force_terminal=tty)


def table(heads: Sequence[tuple[str, Side]], rows: Iterable[Sequence[str]], title: str | None = None) -> RenderableType:
    """A table for ``console()``. Cells are plain text: rich's markup in them is not interpreted."""
    lines = [[head for head, _ in heads], *rows]
    width = columns()
    if len(lines) > _LONG and title is None:
        return _Long([side for _, side in heads], lines, width)
    # Two blanks between columns; one where the terminal is too narrow, before anything has to go on in the next line.
    natural = sum(max(map(len, column)) + 2 for column in zip(*lines, strict=True)) - 2
    t = Table(
        title=None if title is None else escape(title),
        title_justify="left",
        box=None if width is None else box.SIMPLE_HEAD,  # puts a blank between columns
        padding=(0, 2 if width is None else int(natural <= width), 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for head, side in heads:
        t.add_column(escape(head), justify=side, overflow="fold")
    for line in lines[1:]:
        t.add_row(*map(escape, line))
    return t


class _Long:
    """A table of many rows: rich takes a millisecond and more for one, this some microseconds.

    Names, which are on the left, are what goes on in the next line where the terminal is too narrow.
    """

    def __init__(self, sides: Sequence[Side], lines: Sequence[Sequence[str]], width: int | None) -> None:
        self._sides = sides
        self._lines = [[_printable(cell) for cell in line] for line in lines]
        self._widths = [max(map(_width, column)) for column in zip(*self._lines, strict=True)]
        if width is not None:
            self._squeeze(width - 2 * (len(sides) - 1))

    def _squeeze(self, room: int) -> None:
        names = sorted((i for i, side in enumerate(self._sides) if side == "left"), key=lambda i: self._widths[i])
        room -= sum(w for i, w in enumerate(self._widths) if i not in names)
        for n, i in enumerate(names):
            # Those that need little take no more; the others share the rest.
            self._widths[i] = min(self._widths[i], max(room // (len(names) - n), 2))
            room -= self._widths[i]

    def __rich_console__(self, _console: Console, _options: ConsoleOptions) -> RenderResult:
        for line in self._lines:
            pieces = [_pieces(cell, width) for cell, width in zip(line, self._widths, strict=True)]
            for part in zip_longest(*pieces, fillvalue=""):
                yield Segment(self._line(part))
                yield Segment.line()

    def _line(self, cells: Sequence[str]) -> str:
        out = []
        for cell, side, width in zip(cells, self._sides, self._widths, strict=True):
            pad = " " * (width - _width(cell))
            out.append(pad + cell if side == "right" else cell + pad)
        return "  ".join(out).rstrip()


def _pieces(cell: str, width: int) -> list[str]:
    if _width(cell) <= width:
        return [cell]
    return [cell[i : i + width] for i in range(0, len(cell), width)] if cell.isascii() else chop_cells(cell, width)


def _printable(cell: str) -> str:
    """Names come from anybody: none may move the cursor."""
    return cell if cell.isprintable() else "".join(c if c.isprintable() else "?" for c in cell)


def _width(text: str) -> int:
    return len(text) if text.isascii() else cell_len(text)
