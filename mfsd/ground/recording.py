# SPDX-License-Identifier: Apache-2.0
"""A record of hints and decisions: what `mfsctl record` writes and `mfsd-lab replay` reads.

gzip (RFC 1952) of JSON lines (RFC 8259). The first line says what it is; each other one is one thing that happened,
with ``t``, seconds since the record began:

    {"mfsd-record": 1, "version": "0.2.0", "policy": "demand-bound", "parameters": {}, "levels": 5,
     "devices": [{"name": "eth0", "rate": 3e9}]}
    {"t": 0.1, "hint": 7, "id": "r/kv/3", "session": "w", "request": "r", "stage": 3, "bytes": 100, "left": 100,
     "due": 0.3, "compute": 0.0, "device": 0}
    {"t": 0.1, "level": 7, "to": 2}
    {"t": 0.2, "end": 7, "delivered": true}
    {"t": 1.0, "rates": [2.9e9]}
    {"t": 1.0, "lost": 12}

``due`` and ``compute`` are seconds from ``t`` on, ``due`` null without a deadline; rates are bytes/s. ``lost`` counts
things that happened but are not in the record, because nobody took them in time.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from typing import Self

FORMAT: Final = "mfsd-record"
VERSION: Final = 1


class RecordError(ValueError):
    """No record, or not one that can be read; the text says why."""


@dataclass(slots=True)
class Recorded:
    """One transfer. Times are seconds since the record began."""

    at: float
    """When it was announced; 0 for those that were there already."""
    id: str
    session: str
    request: str
    """Empty: of none."""
    stage: int
    left: float
    """Payload bytes at ``at``."""
    deadline: float
    """inf: none."""
    compute: float
    """Seconds of compute left before its request's first token, at ``at``."""
    device: int
    levels: list[tuple[float, int]] = field(default_factory=list)
    """When which level was decided."""
    ended: float = math.nan
    """nan: not in the record's time."""
    delivered: bool = False


@dataclass(slots=True)
class Record:
    """A whole one."""

    version: str
    policy: str
    parameters: Mapping[str, Any]
    levels: int
    devices: Sequence[str]
    rates: list[float]
    """Bytes/s of each device, the most that was measured; 0: unknown."""
    transfers: list[Recorded] = field(default_factory=list)
    seconds: float = 0.0
    lost: int = 0
    cut: bool = False
    """Its end is missing, as after a kill; what is there is read."""


def head(version: str, policy: str, parameters: Mapping[str, Any], levels: int, devices: Mapping[str, float]) -> str:
    """The first line. ``devices``: bytes/s by name."""
    named = [{"name": name, "rate": rate} for name, rate in devices.items()]
    return line({FORMAT: VERSION, "version": version, "policy": policy, "parameters": dict(parameters),
                 "levels": levels, "devices": named})  # fmt: skip


def line(event: Mapping[str, Any]) -> str:
    """One line, without its end."""
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False)


class Writer:
    """Writes lines up to so many bytes on disk. A context manager."""

    def __init__(self, path: Path, limit: int) -> None:
        """The file must not exist: FileExistsError. It is for its owner only: it has the names of requests."""
        self._raw = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
        self._file = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=6)
        self._limit = limit
        self.lines = 0

    def write(self, lines: Iterable[str]) -> bool:
        """False, when the file has come to its limit; whole lines are written only."""
        for text in lines:
            self._file.write(text.encode(errors="replace") + b"\n")
            self.lines += 1
        self._file.flush(zlib.Z_SYNC_FLUSH)  # so that what is there can be read after a kill, and the size is known
        return self._raw.tell() < self._limit

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._raw.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        self._raw.close()


def read(path: Path) -> Record:
    """Read a record. Raises RecordError, OSError."""
    cut = False
    texts: list[bytes] = []
    try:
        with gzip.open(path) as file:
            try:
                texts.extend(file)
            except (EOFError, zlib.error):
                cut = True
    except gzip.BadGzipFile as e:
        raise RecordError(f"{path} is no record of mfsctl: {e}") from None
    if texts and not texts[-1].endswith(b"\n"):
        cut = True
        texts.pop()
    if not texts:
        raise RecordError(f"{path} is no record of mfsctl: it is empty")
    record = _head(path, _parsed(path, 1, texts[0]))
    record.cut = cut
    numbered: dict[int, Recorded] = {}
    for number, text in enumerate(texts[1:], 2):
        event = _parsed(path, number, text)
        try:
            _take(record, numbered, event)
        except (KeyError, TypeError, ValueError, IndexError) as e:
            raise RecordError(f"{path}, line {number}: {type(e).__name__}: {e}") from None
    record.transfers = list(numbered.values())
    return record


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError as e:
        raise RecordError(f"{path}, line {number}: {e}") from None
    if not isinstance(event, dict):
        raise RecordError(f"{path}, line {number}: no object")
    return event


def _head(path: Path, first: dict[str, Any]) -> Record:
    if FORMAT not in first:
        raise RecordError(f"{path} is no record of mfsctl: its first line does not say {FORMAT}")
    if first[FORMAT] != VERSION:
        raise RecordError(
            f"{path} is a record of format {first[FORMAT]}, and this mfsd reads {VERSION}: "
            f"take the version that made it, {first.get('version', '?')}"
        )
    try:
        devices = [(str(d["name"]), float(d["rate"])) for d in first["devices"]]
        return Record(
            str(first["version"]), str(first["policy"]), dict(first["parameters"]), int(first["levels"]),
            [name for name, _ in devices] or ["-"], [rate for _, rate in devices] or [0.0],
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as e:
        raise RecordError(f"{path}, line 1: {type(e).__name__}: {e}") from None


def _take(record: Record, known: dict[int, Recorded], event: dict[str, Any]) -> None:
    at = float(event["t"])
    record.seconds = max(record.seconds, at)
    if "hint" in event:
        due = event["due"]
        known[int(event["hint"])] = Recorded(
            at, str(event["id"]), str(event["session"]), str(event["request"]), int(event["stage"]),
            max(float(event["left"]), 1.0), math.inf if due is None else at + float(due), float(event["compute"]),
            int(event["device"]),
        )  # fmt: skip
        if not 0 <= int(event["device"]) < len(record.rates):
            raise ValueError(f"device {event['device']} is not in the first line")
    elif "level" in event:
        known[int(event["level"])].levels.append((at, int(event["to"])))
    elif "end" in event:
        one = known[int(event["end"])]
        one.ended, one.delivered = at, bool(event["delivered"])
    elif "rates" in event:
        record.rates = [max(a, float(b)) for a, b in zip(record.rates, event["rates"], strict=True)]
    elif "lost" in event:
        record.lost += int(event["lost"])
