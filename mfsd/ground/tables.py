# SPDX-License-Identifier: Apache-2.0
"""Tables and text for whoever reads: fitted to a terminal, whole everywhere else.

On a terminal nothing is wider than it; what doesn't fit goes on in the next line, names first. In a pipe, a file or a
log a row is a line, however long and whatever COLUMNS says: what is searched for or copied is in one piece.

What fits is written without rich, whose import takes longer than all else that a short command does.
"""

from __future__ import annotations

import os
import sys
import textwrap
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Literal

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.text import Text

    Side = Literal["left", "right"]

WIDEST: Final = 99
"""Columns that are used of a terminal at most: longer lines are hard to read."""
_NARROWEST: Final = 40
_WHOLE: Final = 1_000_000
"""Columns of what is no terminal, for rich, which wants a number."""
_LONG: Final = 500
"""Rows from which a table is never left to rich, which takes a millisecond and more for one."""
_CODES: Final = {"": "", "bold": "1", "yellow": "33"}
"""Of styles: parameters of SGR (ECMA-48, 8.3.117)."""


@dataclass(frozen=True, slots=True)
class Line:
    """Words of their own style, which may go on in the next line."""

    text: str
    style: Literal["", "bold", "yellow"] = ""

    def __rich__(self) -> Text:
        from rich.text import Text  # noqa: PLC0415 - see the module

        return Text(_clean(self.text), self.style)


def columns() -> int | None:
    """Columns to fit a text into, 40 to 99; None: it is for no terminal, so don't wrap."""
    if not sys.stdout.isatty():
        return None
    return max(_NARROWEST, min(os.get_terminal_size(sys.stdout.fileno()).columns, WIDEST))


def console() -> Console:
    """Where tables go; colours and lines only on a terminal, and no colours with NO_COLOR (no-color.org)."""
    from rich.console import Console  # noqa: PLC0415 - see the module

    width = columns()
    tty = None if width else False  # None: rich finds out what the terminal can do
    return Console(file=sys.stdout, width=width or _WHOLE, highlight=False, emoji=False, force_terminal=tty)


def write(*parts: RenderableType) -> None:
    """Print lines and tables to stdout, without rich if all of them fit."""
    if not all(isinstance(part, (str, Line, Plain)) for part in parts):
        console().print(*map(literal, parts), sep="\n")
        return
    width = columns()
    plain = width is None or "NO_COLOR" in os.environ or os.environ.get("TERM", "dumb") == "dumb"
    for part in parts:
        if isinstance(part, Plain):
            lines, style = part.lines, ""
        else:
            line = part if isinstance(part, Line) else Line(str(part))
            lines, style = _wrapped(line.text, width), "" if plain else _CODES[line.style]
        for text in lines:
            sys.stdout.write((f"\x1b[{style}m{text}\x1b[0m" if style and text else text) + "\n")


def literal(part: RenderableType) -> RenderableType:
    """For rich, which takes what is in brackets for markup."""
    return Line(part) if isinstance(part, str) else part


def _wrapped(text: str, width: int | None) -> list[str]:
    out: list[str] = []
    for line in text.split("\n"):
        fits = width is None or _width(line) <= width
        out += [printable(line)] if fits else textwrap.wrap(printable(line), width or _WHOLE, break_on_hyphens=False)
    return out


def table(heads: Sequence[tuple[str, Side]], rows: Iterable[Sequence[str]], title: str | None = None) -> RenderableType:
    """A table for ``write`` or ``console()``. Cells are plain text: rich's markup in them is not interpreted."""
    lines = [[head for head, _ in heads], *rows]
    width = columns()
    # Two blanks between columns; one where the terminal is too narrow, before anything has to go on in the next line.
    natural = _natural(lines)
    gap = 2 if width is None or natural <= width else 1
    if title is None and (width is None or natural - (len(heads) - 1) <= width or len(lines) > _LONG):
        return Plain([side for _, side in heads], lines, width, gap)
    return _folded(heads, lines[1:], title, width, gap)


def _natural(lines: Sequence[Sequence[str]]) -> int:
    """Columns that a table takes, with two blanks between its columns."""
    return sum(max(map(_width, column)) + 2 for column in zip(*lines, strict=True)) - 2


def _folded(
    heads: Sequence[tuple[str, Side]], rows: Iterable[Sequence[str]], title: str | None, width: int | None, gap: int
) -> RenderableType:
    from rich import box  # noqa: PLC0415 - see the module
    from rich.markup import escape  # noqa: PLC0415 - see the module
    from rich.table import Table  # noqa: PLC0415 - see the module

    t = Table(
        title=None if title is None else escape(printable(title)),
        title_justify="left",
        box=None if width is None else box.SIMPLE_HEAD,  # puts a blank between columns
        padding=(0, gap if width is None else gap - 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for head, side in heads:
        t.add_column(escape(head), justify=side, overflow="fold")
    for line in rows:
        t.add_row(*(escape(printable(cell)) for cell in line))
    return t


def parts(
    heads: Sequence[tuple[str, Side]], rows: Sequence[Sequence[str]], *groups: Sequence[str]
) -> list[RenderableType]:
    """One table, or, where the terminal is too narrow for it, one for each group of columns after the first column.

    Between two is an empty line.
    """
    width = columns()
    names = [head for head, _ in heads]
    if width is None or _natural([names, *rows]) - (len(heads) - 1) <= width:
        return [table(heads, rows)]
    out: list[RenderableType] = []
    for group in groups:
        chosen = [0, *(names.index(name) for name in group)]
        out += [""] if out else []
        out.append(table([heads[i] for i in chosen], [[row[i] for i in chosen] for row in rows]))
    return out


def phrases(words: Iterable[str]) -> str:
    """Short phrases in a row, two blanks between them; on a terminal no line ends within one."""
    width = columns() or _WHOLE
    lines: list[str] = []
    for phrase in words:
        if lines and _width(lines[-1]) + 2 + _width(phrase) <= width:
            lines[-1] += f"  {phrase}"
        else:
            lines.append(phrase)
    return "\n".join(lines)


class Plain:
    """A table as lines. Where it is long and the terminal too narrow, names, on the left, go on in the next line."""

    def __init__(self, sides: Sequence[Side], lines: Sequence[Sequence[str]], width: int | None, gap: int) -> None:
        """``lines``: the head first. ``width``: of the terminal; None: there is none, and no rule under the head."""
        self._sides, self._gap, self._rule = sides, " " * gap, width is not None
        self._lines = [[printable(cell) for cell in line] for line in lines]
        self._widths = [max(map(_width, column)) for column in zip(*self._lines, strict=True)]
        if width is not None:
            self._squeeze(width - gap * (len(sides) - 1))

    def _squeeze(self, room: int) -> None:
        names = sorted((i for i, side in enumerate(self._sides) if side == "left"), key=lambda i: self._widths[i])
        room -= sum(w for i, w in enumerate(self._widths) if i not in names)
        for n, i in enumerate(names):
            # Those that need little take no more; the others share the rest.
            self._widths[i] = min(self._widths[i], max(room // (len(names) - n), 2))
            room -= self._widths[i]

    @property
    def lines(self) -> list[str]:
        """As they are printed."""
        out = []
        for line in self._lines:
            pieces = [_pieces(cell, width) for cell, width in zip(line, self._widths, strict=True)]
            out += [self._line(part) for part in zip_longest(*pieces, fillvalue="")]
            if self._rule and len(out) >= 1 and line is self._lines[0]:
                out.append("─" * (sum(self._widths) + len(self._gap) * (len(self._widths) - 1)))
        return out

    def __rich_console__(self, _console: Console, _options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment  # noqa: PLC0415 - see the module

        for line in self.lines:
            yield Segment(line)
            yield Segment.line()

    def _line(self, cells: Sequence[str]) -> str:
        out = []
        for cell, side, width in zip(cells, self._sides, self._widths, strict=True):
            pad = " " * (width - _width(cell))
            out.append(pad + cell if side == "right" else cell + pad)
        return self._gap.join(out).rstrip()


def _pieces(cell: str, width: int) -> list[str]:
    if _width(cell) <= width:
        return [cell]
    if cell.isascii():
        return [cell[i : i + width] for i in range(0, len(cell), width)]
    from rich.cells import chop_cells  # noqa: PLC0415 - see the module

    return chop_cells(cell, width)


def printable(cell: str) -> str:
    """Names come from anybody: none may move the cursor."""
    return cell if cell.isprintable() else "".join(c if c.isprintable() else "?" for c in cell)


def _clean(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    from rich.cells import cell_len  # noqa: PLC0415 - see the module

    return cell_len(text)
