# SPDX-License-Identifier: Apache-2.0
"""Large messages of hints, taken apart before they are parsed.

Two bytes can be a hint that means nothing, which takes a hundred once it is parsed: 4 MB of these would stand on the
loop for most of a second, and take a gigabyte, before anybody could say that they are too many. So a message that is
not small is cut at its outermost fields, each with a look at the next one, and parsed hint by hint, with turns for
others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError
from google.rpc import code_pb2

from mfsd.api import errors
from mfsd.ground.model import HintError
from mfsd.v1 import hints_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mfsd.api.turns import Turn
    from mfsd.engine.settings import LimitsConfig

SMALL: Final = 32 << 10
"""Bytes of a message that is parsed at once, which takes a few milliseconds at most."""
OTHERS: Final = 64
"""Fields beside the hints: there are five, and more of them mean nothing new."""
FRAME: Final = 64
"""Bytes of a row or name beside the name itself, at most."""
_SESSION, _HINTS = (pb.HintBatch.DESCRIPTOR.fields_by_name[name].number << 3 | 2 for name in ("session", "hints"))
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Wire types (protobuf.dev/programming-guides/encoding)."""
_FIXED: Final = {_FIXED64: 8, _FIXED32: 4}


@dataclass(frozen=True, slots=True)
class Large:
    """A batch that is not parsed yet."""

    raw: bytes

    async def parsed(self, limits: LimitsConfig, turn: Turn, contended: Callable[[], bool]) -> pb.HintBatch:
        """The batch. Raises HintError, and errors.Refused for what is none."""
        try:
            hints, rest = self._cut(limits)
            batch = pb.HintBatch.FromString(rest)
            for hint in hints:
                if time.perf_counter() > turn.until:
                    await turn.give(contended=contended())
                batch.hints.add().MergeFromString(hint)
        except (DecodeError, IndexError):
            raise errors.Refused(code_pb2.INVALID_ARGUMENT, "the message is malformed") from None
        return batch

    def _cut(self, limits: LimitsConfig) -> tuple[list[bytes], bytes]:
        """Hints, and all the rest. Raises HintError for too many or too long ones, DecodeError, IndexError."""
        raw, hints, rest = self.raw, list[bytes](), list[bytes]()
        longest = limits.max_requests_per_batch * (limits.max_id_bytes + FRAME) + SMALL
        for tag, begin, at, end in _fields(raw):
            if tag == _HINTS:
                if end - at > longest:
                    raise _too_long(f"hints[{len(hints)}]", end - at, longest)
                hints.append(raw[at:end])
            else:
                rest.append(raw[begin:end])
            if tag == _SESSION and end - at > limits.max_id_bytes:
                fix = f"at most {limits.max_id_bytes} bytes (limits.max_id_bytes)"
                raise HintError("session", "is too long", fix)
            if len(hints) > limits.max_hints_per_batch or len(rest) > OTHERS:
                what = f"more than {limits.max_hints_per_batch} hints, or {OTHERS} other fields, in one batch"
                fix = f"send at most {limits.max_hints_per_batch} at a time (limits.max_hints_per_batch)"
                raise HintError("hints", what, fix, exhausted=True)
        columns, most = sum(map(len, rest)), limits.max_hints_per_batch * (2 * limits.max_id_bytes + FRAME) + SMALL
        if columns > most:
            raise _too_long("transfers", columns, most)
        return hints, b"".join(rest)


def _fields(raw: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Outermost fields: tag, and where it, its content and the next one begin. Raises DecodeError, IndexError."""
    at = 0
    while at < len(raw):
        begin = at
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == _BYTES:
            size, at = _varint(raw, at)
            end = at + size
        elif kind == _VARINT:
            end = _varint(raw, at)[1]
        elif kind in _FIXED:
            end = at + _FIXED[kind]
        else:
            raise DecodeError("a group")
        if end > len(raw):
            raise DecodeError("cut off")
        yield tag, begin, at, end
        at = end


def _too_long(field: str, size: int, most: int) -> HintError:
    return HintError(field, f"{size} bytes", f"at most {most} go with the limits of hints and names", exhausted=True)


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """(value, where it ends). Raises IndexError, DecodeError."""
    value = shift = 0
    while True:
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise DecodeError("no number")
