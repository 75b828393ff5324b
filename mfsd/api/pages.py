# SPDX-License-Identifier: Apache-2.0
"""Long lists, page by page: a page costs some milliseconds, however long the list.

A token says behind what the next page begins: the last row's place in the order, not its number, so that what comes and
goes meanwhile neither repeats nor hides other rows.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import struct
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from mfsd.api import messages
from mfsd.ground.model import HintError
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from mfsd.engine.engine import Engine

PAGE: Final = 1000
"""Rows at most."""
_CONNECTION: Final = struct.Struct("<BI")
"""Band, slot."""
_TRANSFER: Final = struct.Struct("<hdQ")
"""Level, deadline, number."""
_SALT: Final = secrets.randbits(64)
"""So that numbers say nothing about this process."""


def connections(engine: Engine, now: float, request: pb.ListConnectionsRequest) -> pb.ListConnectionsReply:
    """Known connections, most urgent first. Raises HintError for a token that isn't one."""
    known, high = engine.connections, engine.connections.table.high
    slots = np.flatnonzero(known.table.used[:high]).astype(np.int64)
    place = known.table.band[slots].astype(np.int64) << 32 | slots
    if request.page_token:
        band, slot = _unpack(_CONNECTION, request.page_token)
        place = place[place > (int(band) << 32 | int(slot))]
    size = _size(request.page_size)
    page = np.sort(place)[:size]
    shown = messages.connections(engine, now, [known.by_slot[int(p) & 0xFFFFFFFF] for p in page.tolist()])
    more = len(place) > size
    token = _pack(_CONNECTION, int(page[-1]) >> 32, int(page[-1]) & 0xFFFFFFFF) if more else ""
    return pb.ListConnectionsReply(connections=shown, next_page_token=token)


def transfers(engine: Engine, now: float, request: pb.ListTransfersRequest) -> pb.ListTransfersReply:
    """Unfinished transfers, most urgent first. Raises HintError for a token that isn't one."""
    rows = engine.books.transfers
    level, deadline = rows.live("level"), rows.live("deadline")
    # Transfers of one request have the same level and deadline; anything that stays will do to tell them apart.
    number = np.fromiter(map(id, rows.objects), np.uint64, rows.n) ^ np.uint64(_SALT)
    if request.page_token:
        at = _unpack(_TRANSFER, request.page_token)
        rest = np.flatnonzero(_behind((level, deadline, number), at))
    else:
        rest = np.arange(rows.n)
    size = _size(request.page_size)
    page = rest[np.lexsort((number[rest], deadline[rest], level[rest]))[:size]]
    token = ""
    if len(rest) > size:
        last = page[-1]
        token = _pack(_TRANSFER, int(level[last]), float(deadline[last]), int(number[last]))
    return pb.ListTransfersReply(transfers=messages.transfers(engine, now, page.tolist()), next_page_token=token)


def _behind(columns: tuple[npt.NDArray[np.generic], ...], at: tuple[float, ...]) -> npt.NDArray[np.bool_]:
    """Which rows stand behind a place, compared column by column."""
    out = np.zeros(len(columns[0]), dtype=np.bool_)
    for column, value in zip(reversed(columns), reversed(at), strict=True):
        bound = column.dtype.type(value)
        out = (column > bound) | ((column == bound) & out)
    return out


def _size(wanted: int) -> int:
    return min(wanted or PAGE, PAGE)


def _pack(kind: struct.Struct, *values: float) -> str:
    return base64.urlsafe_b64encode(kind.pack(*values)).decode()


def _unpack(kind: struct.Struct, token: str) -> tuple[float, ...]:
    try:
        return kind.unpack(base64.urlsafe_b64decode(token))
    except (binascii.Error, ValueError, struct.error):
        raise HintError("page_token", f"{token!r} is none", "give next_page_token of the page before") from None
