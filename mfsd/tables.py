# SPDX-License-Identifier: Apache-2.0
"""Tables and text for whoever reads: fitted to a terminal, whole everywhere else.

On a terminal nothing is wider than it; what doesn't fit goes on in the next line, names first. In a pipe, a file or a
log a row is a line, however long and whatever COLUMNS says: what is searched for or copied is in one piece.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Literal, TextIO

    Side = Literal["left", "right"]

WIDEST: Final = 99
"""Columns that are used of a terminal at most: longer lines are hard to read."""
_NARROWEST: Final = 40
_WHOLE: Final = 1_000_000
"""Columns of what is no terminal, for rich, which wants a number."""


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


def table(heads: Sequence[tuple[str, Side]], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table for ``console()``. Cells are plain text: rich's markup in them is not interpreted."""
    lines = [[head for head, _ in heads], *rows]
    width = columns()
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
