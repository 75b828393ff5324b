# SPDX-License-Identifier: Apache-2.0
"""What people type: durations, sizes, addresses with ports."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from mfsd.ground.model import Address, Network

_TIME: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}
_SIZE: Final = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
DAY: Final = 86_400.0
_MOST: Final = 2**63 - 1
"""Bytes; as many as the API can say."""
_NUMBER: Final = re.compile(r"(?P<value>-?\d+(?:\.\d+)?)\s*(?P<unit>[a-zA-Z]*)")
_ENDPOINT: Final = re.compile(
    r"(?:\[(?P<v6>[0-9a-fA-F:.]+(?:/\d+)?)\]|(?P<v4>[0-9.]+(?:/\d+)?)|(?P<bare>[0-9a-fA-F]*:[0-9a-fA-F:.]*:[0-9a-fA-F.]*(?:/\d+)?))?"
    r"(?::(?P<first>\d+)(?:-(?P<last>\d+))?)?"
)


def _parse(text: str, units: dict[str, Any]) -> float | None:
    m = _NUMBER.fullmatch(text.strip())
    if m is None or m["unit"].lower() not in units:
        return None
    return float(m["value"]) * float(units[m["unit"].lower()])


class _Duration(click.ParamType[float]):
    """Seconds from "180ms"."""

    name = "duration"
    longest = 1e6 * DAY
    """As much as the API can say."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        seconds = _parse(str(value), _TIME)
        if seconds is None:
            self.fail(f"{value!r} is no duration; write a number and one of {', '.join(_TIME)}, e.g. 180ms", param, ctx)
        if abs(seconds) > self.longest:
            self.fail(f"{value!r} is more than {self.longest / DAY:.0f} days", param, ctx)
        return seconds


class _Span(_Duration):
    """Seconds from "180ms", not below 0."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = super().convert(value, param, ctx)
        if seconds < 0:
            self.fail(f"{value!r} is below 0; only deadlines can be in the past", param, ctx)
        return seconds


class Interval(_Duration):
    """Seconds from ``least`` to DAY between one look and the next."""

    longest = float("inf")

    def __init__(self, least: float) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Raises click.BadParameter."""
        seconds = super().convert(value, param, ctx)
        if not self._least <= seconds <= DAY:
            self.fail(f"{value!r} is not from {self._least * 1000:.0f}ms to {DAY / 3600:.0f}h", param, ctx)
        return seconds


class _Size(click.ParamType[int]):
    """Bytes from "10MB"."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        octets = _parse(str(value), _SIZE)
        if octets is None:
            self.fail(f"{value!r} is no size; write bytes, or a number with kB, MB, GB, KiB, MiB, GiB", param, ctx)
        if not 0 <= octets <= _MOST:
            self.fail(f"{value!r} is not from 0 to {_MOST} bytes", param, ctx)
        return round(octets)


class Endpoint:
    """An address or network (None: any) with ports ``first`` to ``last`` (0 and 0: any)."""

    def __init__(self, text: str) -> None:
        import ipaddress  # noqa: PLC0415 - only `hint` needs it

        m = _ENDPOINT.fullmatch(text)
        if m is None or not text:
            raise ValueError("is no ADDRESS[:PORT[-PORT]]; put IPv6 addresses into brackets, e.g. [fd00::1]:5000")
        host = m["v6"] or m["v4"] or m["bare"]
        try:
            self.network: Network | None = None if host is None else ipaddress.ip_network(host, strict=False)
        except ValueError:
            raise ValueError("has no IP address; write e.g. 10.0.0.2:5000 or [fd00::1]:5000") from None
        self.first = int(m["first"] or 0)
        self.last = int(m["last"] or 0)
        if max(self.first, self.last) > 65535 or (m["last"] is not None and self.last < self.first):
            raise ValueError("has wrong ports; write :PORT or :FIRST-LAST with 1 <= FIRST <= LAST <= 65535")
        if m["first"] is not None and self.first == 0 and not self.last:
            raise ValueError("has port 0; leave the port out to mean any")

    @property
    def address(self) -> Address | None:
        """The single address; ValueError for a network."""
        if self.network is None:
            return None
        if self.network.num_addresses != 1:
            raise ValueError("names a network; only --pid takes one")
        return self.network.network_address


class _EndpointType(click.ParamType[Endpoint]):
    name = "address[:ports]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Endpoint:
        if isinstance(value, Endpoint):
            return value
        try:
            return Endpoint(str(value))
        except ValueError as e:
            self.fail(f"{value!r} {e}", param, ctx)


COUNT: Final = click.IntRange(0, 2**32 - 1)
"""Of layers, rows and updates: as many as the API can say."""
COOKIE: Final = click.IntRange(1, 2**64 - 1)
PID: Final = click.IntRange(1, 2**31 - 1)
DURATION: Final = _Duration()
SPAN: Final = _Span()
SIZE: Final = _Size()
ENDPOINT: Final = _EndpointType()
