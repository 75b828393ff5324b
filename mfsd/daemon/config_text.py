# SPDX-License-Identifier: Apache-2.0
"""Configuration in words: what is wrong with a file, the resolved view, the commented example.

Everything is derived from the models in config.py (types, bounds, descriptions), so that no text can go stale. The
functions take the model (class or instance) as an argument and know no section by name.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin

from pydantic import BaseModel

if TYPE_CHECKING:
    from pydantic import ValidationError

Location = tuple[int | str, ...]
"""Keys and list indices from the root, as pydantic gives them."""
_SHOWN: Final = 200
"""Characters of a wrong value, and elements of a list or table, that an error shows."""
_DEPTH: Final = 3
_TOLD: Final = 50
"""Problems that are named; who has more mends these first."""
_WIDTH: Final = 118
"""Of the lines of systemd/mfsd.toml."""


# --- problems ---------------------------------------------------------------------------------------------------------


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One line per problem: ``section.key = value: what is allowed``."""
    problems: list[str] = []
    errors = error.errors()
    for e in errors[:_TOLD]:
        loc = e["loc"]
        cause = e.get("ctx", {}).get("error")
        if cause is not None and hasattr(cause, "problems"):  # our own check across keys: already in words
            problems += cause.problems
        elif e["type"] == "extra_forbidden":
            known = _keys_at(root, loc[:-1])
            near = difflib.get_close_matches(str(loc[-1])[:_SHOWN], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{_where(loc)} = {shown(e['input'])}: unknown key; {hint}")
        elif e["type"] == "missing":
            problems.append(f"{_where(loc)} = (unset): required; must be {_allowed(root, loc)}")
        else:
            problems.append(
                f"{_where(loc)} = {shown(e['input'])}: must be {getattr(cause, 'allowed', '') or _allowed(root, loc)}"
            )
    problems = list(dict.fromkeys(problems))
    more = max(len(errors) - _TOLD, 0) + max(len(problems) - _TOLD, 0)
    return problems[:_TOLD] + ([f"and {more} more"] if more else [])


def _where(loc: Location) -> str:
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f".{shown_key(part)}" if out else shown_key(part)
    return out


def _section_at(root: type[BaseModel], loc: Location) -> type[BaseModel] | None:
    """The section that a location names, or None if it names a value."""
    model = root
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        inner = next((t for t in _classes(field.annotation) if issubclass(t, BaseModel)), None) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _classes(annotation: Any) -> list[type]:
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return [annotation]
    return [t for a in get_args(annotation) for t in _classes(a)]


def _keys_at(root: type[BaseModel], loc: Location) -> list[str]:
    section = _section_at(root, loc)
    return list(section.model_fields) if section else []


def _allowed(root: type[BaseModel], loc: Location) -> str:
    """What may stand at a location, in words, from the field's own note or its type and bounds."""
    if _section_at(root, loc):
        last = next(p for p in reversed(loc) if isinstance(p, str))
        return f"a section: [[{last}]]" if _is_list(root, loc) else f"a section: [{last}]"
    # The field is the first part that names no section; what follows are places inside its value.
    depth = next(d for d in range(1, len(loc) + 1) if _section_at(root, loc[:d]) is None)
    section = _section_at(root, loc[: depth - 1])
    field = section.model_fields.get(str(loc[depth - 1])) if section else None
    if field is None:
        return "left out"
    note = _note(field.json_schema_extra)
    return note or _describe(field.annotation, field.metadata)


def _is_list(root: type[BaseModel], loc: Location) -> bool:
    field = root.model_fields.get(str(loc[0]))
    return field is not None and get_origin(field.annotation) is tuple


def _note(extra: Any) -> str:
    return str(extra.get("allowed", "")) if isinstance(extra, dict) else ""


def _describe(annotation: Any, metadata: list[Any]) -> str:
    if get_origin(annotation) is Annotated:
        annotation, *more = get_args(annotation)
        metadata = [m for x in more for m in getattr(x, "metadata", [x])]
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(toml(a) for a in args)
    if origin is tuple:
        return f"a list; each element {_describe(args[0], [])}"
    if origin is dict:
        return f"a table; each value {_describe(args[1], [])}"
    if annotation in (int, float):
        bounds = {name: getattr(m, name) for m in metadata for name in ("ge", "gt", "le") if hasattr(m, name)}
        low = f"from {bounds['ge']:g}" if "ge" in bounds else f"above {bounds['gt']:g}"
        high = str(bounds["le"]) if annotation is int else f"{bounds['le']:g}"
        return f"a {'whole ' if annotation is int else ''}number {low}, at most {high}"
    return {bool: "true or false", str: "a text"}[annotation]


# --- TOML -------------------------------------------------------------------------------------------------------------


def key(name: str) -> str:
    """A key as TOML writes it: bare if it can be."""
    bare = name.replace("_", "").replace("-", "")
    return name if bare.isalnum() and bare.isascii() else json.dumps(name)


def shown_key(name: str) -> str:
    """A key, of whatever length, as problems name it."""
    return _cut(key(name))


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(toml(v) for v in value)}]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key(k)} = {toml(v)}" for k, v in value.items()) + " }" if value else "{}"
    return json.dumps(str(value), ensure_ascii=False)


def shown(value: Any, depth: int = _DEPTH) -> str:
    """A wrong value, of whatever size: as TOML writes it, up to where nobody reads on."""
    if isinstance(value, list | tuple | dict) and value and not depth:
        return "..."
    if isinstance(value, list | tuple):
        return _cut(f"[{', '.join(shown(v, depth - 1) for v in value[:_SHOWN])}]")
    if isinstance(value, dict):
        some = list(value.items())[:_SHOWN]
        return (
            _cut("{ " + ", ".join(f"{shown_key(k)} = {shown(v, depth - 1)}" for k, v in some) + " }") if some else "{}"
        )
    if isinstance(value, int) and value.bit_length() > 3 * _SHOWN:  # Python writes no integer of thousands of digits
        return f"({'a negative' if value < 0 else 'an'} integer of some {value.bit_length() * 3 // 10} digits)"
    return _cut(toml(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text)} characters)"


def _table(header: str, section: BaseModel) -> list[str]:
    lines = [header]
    for name in type(section).model_fields:
        value = getattr(section, name)
        note = "" if name in section.model_fields_set else "  # default"
        lines.append(f"# {name} is unset" if value is None else f"{name} = {toml(value)}{note}")
    lines += [f"{key(k)} = {toml(v)}" for k, v in (section.__pydantic_extra__ or {}).items()]
    return [*lines, ""]


def render(config: BaseModel) -> str:
    """The resolved configuration as TOML that reads back to the same; values nobody wrote are noted as default."""
    lines: list[str] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, tuple):
            lines += [line for part in value for line in _table(f"[[{name}]]", part)]
        else:
            lines += _table(f"[{name}]", value)
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class KeyText:
    """A key in words."""

    name: str
    what: str
    allowed: str
    default: str | None
    """As TOML; None: unset."""
    required: bool


@dataclass(frozen=True, slots=True)
class SectionText:
    """A section in words."""

    name: str
    repeated: bool
    """[[name]]"""
    what: str
    keys: list[KeyText]


def sections(root: type[BaseModel]) -> list[SectionText]:
    """All sections with their keys."""
    out = []
    for name in root.model_fields:
        section = _section_at(root, (name,))
        if section is None:
            continue
        keys = [
            KeyText(
                field_name,
                field.description or "",
                _allowed(root, (name, field_name)),
                None if field.is_required() or field.default is None else toml(field.default),
                field.is_required(),
            )
            for field_name, field in section.model_fields.items()
        ]
        what = (section.__doc__ or "").partition(": ")[2]
        out.append(SectionText(name, _is_list(root, (name,)), what[:1].upper() + what[1:], keys))
    return out


def example(root: type[BaseModel]) -> str:
    """The commented example file: every key with its meaning and default, all commented out."""
    lines = [
        "# mfsd.toml - what mfsd does when this file says nothing: every key below shows its default.",
        "# `mfsd --check-config --config FILE` checks a file and prints the resolved values.",
        "# Generated by `python -m mfsd.daemon.config`; a test compares.",
        "",
    ]
    for section in sections(root):
        lines += _wrap(section.what)
        lines.append(f"#[[{section.name}]]" if section.repeated else f"[{section.name}]")
        for k in section.keys:
            lines += _wrap(f"{k.what} Allowed: {k.allowed}.")
            lines.append(f"#{k.name} =" + ("" if k.default is None else f" {k.default}"))
        lines.append("")
    return "\n".join(lines)


def _wrap(text: str) -> list[str]:
    lines, line = [], "#"
    for word in text.split():
        if len(line) + 1 + len(word) > _WIDTH:
            lines.append(line)
            line = "#"
        line += f" {word}"
    return [*lines, line]
