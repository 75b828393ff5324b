# SPDX-License-Identifier: Apache-2.0
"""Numbers in words, tables below 100 columns, JSON with the proto's own names."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Final

import click
from google.protobuf import json_format
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from google.protobuf.message import Message

WIDTH: Final = 99


def as_dict(message: Message) -> dict[str, Any]:
    """Protobuf's JSON mapping with names as in the .proto and fields without presence always there.

    64-bit integers are strings, as the mapping wants: a socket cookie does not fit into a double.
    """
    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def print_json(value: Message | dict[str, Any] | list[Any], *, lines: bool = False) -> None:
    """One JSON document; with ``lines`` in one line, for streams of them."""
    data = value if isinstance(value, (dict, list)) else as_dict(value)
    click.echo(json.dumps(data, indent=None if lines else 2, ensure_ascii=False))


def console(*, err: bool = False) -> Console:
    """At most 99 columns; colours and lines only on a terminal, and no colours with NO_COLOR (no-color.org)."""
    stream = sys.stderr if err else sys.stdout
    tty = stream.isatty()
    width = min(os.get_terminal_size(stream.fileno()).columns, WIDTH) if tty else WIDTH
    return Console(
        file=stream, width=max(width, 40), highlight=False, emoji=False, soft_wrap=False, force_terminal=tty and None
    )


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]]) -> Table:
    """A table. Columns are (head, "left"|"right"|"fold"); fold: left, may wrap anywhere.

    Cells are plain text: rich's markup in them is not interpreted.
    """
    t = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, show_edge=False)
    for head, how in columns:
        if how == "fold":
            t.add_column(escape(head), overflow="fold", ratio=None)
        else:
            t.add_column(escape(head), justify="right" if how == "right" else "left", no_wrap=True)
    for row in rows:
        t.add_row(*(escape(cell) for cell in row))
    return t


def paragraph(text: str, first: str = "", rest: str | None = None) -> str:
    """Wrapped words; ``first`` stands before the first line, ``rest`` (default: as many blanks) before the others."""
    rest = " " * len(first) if rest is None else rest
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def shell(text: str, indent: str) -> str:
    """A command over several lines that a shell still reads as one."""
    lines = textwrap.wrap(
        text,
        WIDTH - 2,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return " \\\n".join(lines)


STAGES: Final = {0: "-", 1: "kv-reuse", 2: "collective", 3: "p2d"}


def level(number: int) -> str:
    """Number of a level; none and scavenger in words."""
    return {-1: "none", -2: "scavenger"}.get(number, str(number))
