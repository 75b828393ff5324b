# SPDX-License-Identifier: Apache-2.0
"""Sentences and commands as lines, JSON with the proto's own names. Tables: mfsd/ground/tables.py."""

from __future__ import annotations

import json
import math
import sys
import textwrap
from typing import TYPE_CHECKING, Any, Final, cast

import click

from mfsd.ground import tables

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message


def as_dict(message: Message) -> dict[str, Any]:
    """Protobuf's JSON mapping with names as in the .proto and fields without presence always there.

    64-bit integers are strings, as the mapping wants: a socket cookie does not fit into a double.
    """
    from google.protobuf import json_format  # noqa: PLC0415 - takes 10 ms, and tables don't need it

    return json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def print_json(value: Message | dict[str, Any] | list[Any], *, lines: bool = False) -> None:
    """One JSON document; with ``lines`` in one line, for streams of them."""
    data = value if isinstance(value, (dict, list)) else as_dict(value)
    click.echo(_shown(json.dumps(data, indent=None if lines else 2, ensure_ascii=False)))


def _shown(document: str) -> str:
    """The same JSON, in which no name is anything that a terminal obeys, or that can't be written."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    if document.isprintable() and (unicode or document.isascii()):
        return document

    def shown(c: str) -> str:
        return c if c == "\n" or (c.isprintable() and (unicode or c.isascii())) else json.dumps(c)[1:-1]

    return "".join(map(shown, document))


def echo(text: str = "", *, err: bool = False) -> None:
    """Lines for people. Names in them come from anybody: none may move the cursor."""
    click.echo("\n".join(map(tables.printable, text.split("\n"))), err=err)


def print_rows(name: str, rows: Sequence[Message]) -> None:
    """A JSON object with one list of many messages of one kind, a line each: as ``as_dict``, but many times as fast."""
    click.echo(f'{{"{name}": [', nl=not rows)
    if rows:
        fields = [_field(cast("FieldDescriptor", f)) for f in rows[0].DESCRIPTOR.fields]
        texts = (
            _shown(
                json.dumps(
                    {f: to_json(getattr(m, f)) for f, to_json, optional in fields if not optional or m.HasField(f)},
                    ensure_ascii=False,
                )
            )
            for m in rows
        )
        click.echo("\n  " + ",\n  ".join(texts))
    click.echo("]}")


def _field(field: FieldDescriptor) -> tuple[str, Callable[[Any], Any], bool]:
    """Name, how its values become JSON, and whether it may be absent. Scalar fields only."""
    as_text = (field.TYPE_INT64, field.TYPE_UINT64, field.TYPE_SINT64, field.TYPE_FIXED64, field.TYPE_SFIXED64)
    how: Callable[[Any], Any] = _same
    if field.type in as_text:
        how = str
    elif field.enum_type is not None:
        names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
        how = lambda number: names.get(number, number)  # noqa: E731 - one of several
    elif field.type == field.TYPE_DOUBLE:
        how = _double
    return field.name, how, field.has_presence


def _same(value: Any) -> Any:
    return value


def _double(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def paragraph(text: str, first: str = "") -> str:
    """A sentence after ``first``: wrapped words on a terminal, which continue under the first one; else one line."""
    width = tables.columns()
    if width is None:
        return first + " ".join(text.split())
    return textwrap.fill(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
        break_long_words=False,
    )


def shell(text: str, indent: str) -> str:
    """A command; on a terminal over several lines that a shell still reads as one."""
    width = tables.columns()
    if width is None:
        return indent + text
    lines = textwrap.wrap(
        text,
        width - 2,
        initial_indent=indent,
        subsequent_indent=f"{indent}  ",
        break_on_hyphens=False,
        break_long_words=False,
    )
    return " \\\n".join(lines)


STAGES: Final = {0: "-", 1: "kv-reuse", 2: "collective", 3: "p2d", 4: "background"}


def level(number: int) -> str:
    """Number of a level; what is no level in words."""
    return {-1: "none", -2: "scavenger", -3: "background"}.get(number, str(number))
