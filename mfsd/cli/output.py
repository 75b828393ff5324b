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


def _scaled(value: float, units: Sequence[str], step: float) -> str:
    n = 0
    while abs(value) >= step * 0.9995 and n < len(units) - 1:
        value /= step
        n += 1
    text = f"{value:.0f}" if n == 0 or abs(value) >= 99.95 else f"{value:.3g}"
    return f"{text} {units[n]}"


def size(octets: float) -> str:
    """1.5 MB; decimal, as link rates are."""
    return _scaled(octets, ("B", "kB", "MB", "GB", "TB", "PB"), 1000)


def rate(bytes_per_s: float) -> str:
    """940 Mbit/s; a dash when unknown."""
    return _scaled(bytes_per_s * 8, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"), 1000) if bytes_per_s else "-"


def count(n: int) -> str:
    """12345, then 1.23 M."""
    return str(n) if abs(n) < 100_000 else _scaled(n, ("", "k", "M", "G", "T"), 1000)


def duration(seconds: float) -> str:
    """180 ms, 2.5 s, 1 h 03 min."""
    sign, s = ("-" if seconds < 0 else ""), abs(seconds)
    if s < 0.9995:
        return f"{sign}{s * 1e3:.3g} ms" if s >= 0.001 or s == 0 else f"{sign}{s * 1e6:.0f} us"
    if s < 99.95:
        return f"{sign}{s:.3g} s"
    minutes = round(s / 60)
    if minutes < 100:
        return f"{sign}{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{sign}{hours} h {minutes:02d} min" if hours < 48 else f"{sign}{hours // 24} d {hours % 24} h"


STAGES: Final = {0: "-", 1: "kv-reuse", 2: "collective", 3: "p2d"}


def level(number: int) -> str:
    """Number of a level; none and scavenger in words."""
    return {-1: "none", -2: "scavenger"}.get(number, str(number))
