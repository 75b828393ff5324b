# SPDX-License-Identifier: Apache-2.0
"""Parameters of policies: declared once as dataclass fields, checked by name, type and range when read."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

Value = float | int | bool | str


def option(
    default: Value, doc: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A dataclass field that a config may set. ``low`` and ``high`` are inclusive; ``choices`` are for strings."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices}
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


def check(policy: str, cls: type, params: Mapping[str, Value]) -> dict[str, Value]:
    """Return ``params`` as keyword arguments of ``cls``. Raises ValueError naming key, value and what is allowed."""
    known = options(cls)
    out: dict[str, Value] = {}
    for key, value in params.items():
        if key not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ValueError(f"{key} = {value!r}: policy {policy!r} has no such parameter; it has: {names}")
        out[key] = _checked(key, value, known[key])
    return out


def _checked(key: str, value: Value, f: dataclasses.Field[Any]) -> Value:
    default, meta = f.default, f.metadata
    if isinstance(default, bool) or isinstance(value, bool):
        ok = isinstance(default, bool) and isinstance(value, bool)
    elif isinstance(default, str):
        ok = value in meta["choices"]
    elif isinstance(default, int):
        ok = isinstance(value, int)
    else:
        ok = isinstance(value, (int, float))
        value = float(value) if ok else value
    if ok and not isinstance(value, (bool, str)):
        # Comparisons are written so that a NaN fails them.
        low, high = meta["low"], meta["high"]
        ok = (low is None or value >= low) and (high is None or value <= high) and value == value  # noqa: PLR0124 (NaN)
    if not ok:
        raise ValueError(f"{key} = {value!r}: must be {allowed(f)}")
    return value
