# SPDX-License-Identifier: Apache-2.0
"""Parameters of policies: declared once as dataclass fields, checked by name, type and range when read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that keeps a policy from being made. As text: ``field = value: allowed``."""

    field: str
    """Name of a parameter; else "policy" (its name) or "levels"."""
    value: Any
    allowed: str
    """What must be instead, in words."""
    parameter: bool = True

    def __str__(self) -> str:
        # Whole numbers as people write them, whether they are kept as floats or not.
        return f"{self.field} = {repr(self.value).removesuffix('.0')}: {self.allowed}"


def option(
    default: Value,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    at_least: str = "",
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that a config may set. ``low`` and ``high`` are inclusive; ``choices`` are for strings.

    ``at_least`` names another option, which this one must not be below.
    """
    metadata = {"doc": doc, "low": low, "high": high, "at_least": at_least, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def options(cls: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a policy class that a config may set, by name."""
    return {f.name: f for f in dataclasses.fields(cls) if "doc" in f.metadata}


def allowed(f: dataclasses.Field[Any]) -> str:
    """What an option accepts, in words."""
    meta = f.metadata
    if isinstance(f.default, bool):
        return "true or false"
    if isinstance(f.default, str):
        return "one of " + ", ".join(repr(c) for c in meta["choices"])
    kind = "an integer" if isinstance(f.default, int) else "a number"
    low, high = meta["low"], meta["high"]
    if low is not None and high is not None:
        return f"{kind} from {low:g} to {high:g}"
    return f"{kind} of at least {low:g}" if low is not None else kind


def check(policy: str, cls: type, given: Mapping[str, Value]) -> tuple[dict[str, Any], list[Problem]]:
    """What of ``given`` can be keyword arguments of ``cls``, and every problem that there is with it.

    Options that depend on each other are compared if both of them are right by themselves.
    """
    known = options(cls)
    good: dict[str, Any] = {}
    found: list[Problem] = []
    for key, value in given.items():
        f = known.get(key)
        if f is None:
            names = ", ".join(sorted(known)) or "none"
            found.append(Problem(key, value, f"policy {policy!r} has no such parameter; it has: {names}"))
        elif not _fits(value, f):
            found.append(Problem(key, value, f"must be {allowed(f)}"))
        else:
            good[key] = float(value) if isinstance(f.default, float) else value
    faulty = {p.field for p in found}
    for key, f in known.items():
        other = f.metadata["at_least"]
        if other and not {key, other} & faulty:
            value, least = good.get(key, f.default), good.get(other, known[other].default)
            if value < least:
                found.append(Problem(key, value, f"must be at least {other} ({least:g})"))
    return good, found


def _fits(value: Any, f: dataclasses.Field[Any]) -> bool:
    if isinstance(f.default, bool) or isinstance(value, bool):
        return isinstance(f.default, bool) and isinstance(value, bool)
    if isinstance(f.default, str):
        return value in f.metadata["choices"]
    if not isinstance(value, int if isinstance(f.default, int) else (int, float)):
        return False
    # Comparisons are written so that a NaN fails them.
    low, high = f.metadata["low"], f.metadata["high"]
    return (low is None or value >= low) and (high is None or value <= high) and value == value  # noqa: PLR0124 (NaN)
