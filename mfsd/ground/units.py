# SPDX-License-Identifier: Apache-2.0
"""Rates, sizes, durations and places: one type where units could be confused, and one wording for people.

Sizes are bytes, durations seconds, rates bytes/s; words are decimal, as link rates are.
"""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_BITS: Final = {"tbit": Decimal(10**12), "gbit": Decimal(10**9), "mbit": Decimal(10**6), "kbit": Decimal(1000)}
_RATE_UNITS: Final = {"bit": Decimal(1), **dict(reversed(_BITS.items())), "bps": Decimal(8)}
"""Bits per second."""
_RATE_RE: Final = re.compile(r"\s*(?P<value>[0-9]{1,40}(?:\.[0-9]{1,400})?)\s*(?P<unit>[A-Za-z]+)\s*", re.ASCII)
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_PORT: Final = re.compile(r"[0-9]{1,5}")


class Unfit(ValueError):  # noqa: N818 - of a value, not of the program
    """A value that can't be. ``allowed`` is what must be instead."""

    def __init__(self, allowed: str) -> None:
        super().__init__(allowed)
        self.allowed = allowed


@dataclass(frozen=True, slots=True, order=True)
class Rate:
    """A data rate. One type, so that bits and bytes can't be confused.

    Text form as tc's: ``100mbit``, ``2.5gbit``; ``bps`` means bytes per second, as in tc.
    """

    bytes_per_s: float

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Read a tc-style rate. Raises ValueError naming what is allowed."""
        m = _RATE_RE.fullmatch(text)
        unit = _RATE_UNITS.get(m["unit"].lower()) if m else None
        if m is None or unit is None:
            raise ValueError(
                f"{text!r} is not a rate; write a number and one of {', '.join(_RATE_UNITS)}, e.g. '10gbit'"
            )
        value = float(Decimal(m["value"]) * unit / 8)
        if value <= 0:
            raise ValueError(f"{text!r}: a rate must be above zero")
        return cls(value)

    @property
    def bits_per_s(self) -> float:
        """The same in bit/s."""
        return self.bytes_per_s * 8

    def __str__(self) -> str:
        """In the largest unit of which it is not a fraction, exactly: `parse` reads it back to the same."""
        bits = Decimal(repr(self.bits_per_s))
        if not bits.is_finite():
            return f"{bits}bit"
        unit, size = next(((u, s) for u, s in _BITS.items() if bits >= s), ("bit", Decimal(1)))
        return f"{(bits / size).normalize():f}{unit}"


# --- words ------------------------------------------------------------------------------------------------------------


def _scaled(value: float, units: Sequence[str]) -> str:
    n = 0
    while abs(value) >= 999.5 and n < len(units) - 1:
        value /= 1000
        n += 1
    text = f"{value:.0f}" if n == 0 or abs(value) >= 99.95 else f"{value:.3g}"
    return f"{text} {units[n]}"


def size(octets: float) -> str:
    """1.5 MB; decimal, as link rates are."""
    return _scaled(octets, ("B", "kB", "MB", "GB", "TB", "PB"))


def rate(bytes_per_s: float, nothing: str = "-") -> str:
    """940 Mbit/s; ``nothing`` for 0, by default what stands for unknown."""
    if not bytes_per_s:
        return nothing
    return _scaled(bytes_per_s * 8, ("bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"))


def count(n: int) -> str:
    """12345, then 1.23 M."""
    return str(n) if abs(n) < 100_000 else _scaled(n, ("", "k", "M", "G", "T"))


def of(n: int, what: str) -> str:
    """So many of something, e.g. "1 transfer", "0 transfers"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def duration(seconds: float) -> str:
    """180 ms, 2.5 s, 1 h 03 min; "for ever" and "never" for the infinities."""
    if math.isinf(seconds):
        return "for ever" if seconds > 0 else "never"
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


def host_port(text: str) -> tuple[str, int]:
    """(host, port) of "host:port", of which an IPv6 address stands in brackets. Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise ValueError("not host:port")
    if host.startswith("[") or host.endswith("]") or ":" in host:
        if not (host.startswith("[") and host.endswith("]")):
            raise Unfit('"host:port", an IPv6 address in brackets: "[::1]:50551"')
        return str(ipaddress.IPv6Address(host[1:-1])), int(port)
    if not _HOST.fullmatch(host):
        raise ValueError("not a host")
    return host, int(port)
