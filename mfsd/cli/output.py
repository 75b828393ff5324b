# SPDX-License-Identifier: Apache-2.0
"""Sentences and commands as lines, JSON with the proto's own names. Tables: mfsd/tables.py."""

from __future__ import annotations

import json
import textwrap
from typing import TYPE_CHECKING, Any, Final

import click
from google.protobuf import json_format

from mfsd import tables

if TYPE_CHECKING:
    from google.protobuf.message import Message


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


STAGES: Final = {0: "-", 1: "kv-reuse", 2: "collective", 3: "p2d"}


def level(number: int) -> str:
    """Number of a level; what is no level in words."""
    return {-1: "none", -2: "scavenger", -3: "background"}.get(number, str(number))
