# SPDX-License-Identifier: Apache-2.0
"""Messages that are large: parsed hint by hint, and not at all where they are too many."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from support.waiting import WAIT_S

from mfsd.api.access import BATCHES
from mfsd.api.turns import Turn
from mfsd.api.whole import SMALL, Large
from mfsd.engine.settings import LimitsConfig
from mfsd.v1.hints_pb2 import Batch, Hint, HintBatch, HintReply, ProgressColumns, Request

if TYPE_CHECKING:
    from collections.abc import Iterable

    from support.daemons import Api

HINT = bytes([4 << 3 | 2])
"""Tag of a hint in a batch; a zero behind it, and the hint means nothing."""
TRANSFERS = bytes([6 << 3 | 2])
MANY = 2_000_000
"""Of what takes two bytes: less than gRPC takes in a message."""


def length(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(tag: bytes, content: bytes) -> bytes:
    return tag + length(len(content)) + content


def send(api: Api, raw: bytes, path: str = BATCHES[0]) -> HintReply:
    ask: Any = api.channel.unary_unary(path, response_deserializer=HintReply.FromString)
    reply: HintReply = ask(raw, timeout=WAIT_S)
    return reply


def refusal(api: Api, raw: bytes, path: str = BATCHES[0]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as e:
        send(api, raw, path)
    return e.value.code(), str(e.value.details())


MEMBERS = field(Hint(batch=Batch()).SerializeToString()[:1], b"\x12\x00" * MANY)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ((HINT + b"\x00") * MANY, "hints: more than 1024 hints"),
        (b"\x1a\x00" * MANY, "hints: more than 1024 hints, or 64 other fields"),
        (field(TRANSFERS, b"\x0a\x00" * MANY), "transfers: 4000005 bytes"),
        (field(HINT, MEMBERS), "hints[0]: 4000005 bytes"),
    ],
    ids=["hints", "unknown", "columns", "members"],
)
def test_what_is_too_much_is_refused_before_it_is_parsed(api: Api, raw: bytes, words: str) -> None:
    code, why = refusal(api, raw)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert why.startswith(words)


def test_nothing_but_hints_is_large(api: Api) -> None:
    for path in ("/mfsd.v1.Hints/Advise", "/mfsd.v1.Control/Explain", "/grpc.health.v1.Health/Check"):
        code, why = refusal(api, bytes([1 << 3 | 2]) + field(b"", bytes(SMALL)), path)
        assert (code, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, f"the message has more than {SMALL} bytes")


def large(hints: Iterable[Hint]) -> HintBatch:
    """With something on both sides of the hints, and in an order that protobuf does not write."""
    progress = ProgressColumns(batch_ids=["r0"], current_layer=[3])
    return HintBatch(session="large", seq=7, hints=hints, progress=progress)


class Hasty(Turn):
    """Is over as soon as it has begun."""

    given = 0

    @property
    def until(self) -> float:
        return 0.0

    async def give(self, *, contended: bool) -> None:
        assert not contended
        self.given += 1


def test_a_large_batch_is_what_it_says_and_others_have_their_turns(api: Api) -> None:
    hints = [Hint(request=Request(id=f"r{i}", ttft_left_us=60_000_000)) for i in range(1000)]
    hints += [Hint(batch=Batch(id="b", request_ids=[f"r{i}".ljust(250, "x") for i in range(1000)])), Hint()]
    raw = large(hints).SerializeToString()
    assert len(raw) > SMALL
    turn = Hasty()
    assert asyncio.run(Large(raw).parsed(LimitsConfig(), turn, lambda: False)) == HintBatch.FromString(raw)
    assert turn.given == len(hints)
    reply = send(api, raw)
    assert (reply.seq, reply.accepted, [r.index for r in reply.rejected]) == (7, 1002, [1001])
    tail = (
        large([]).SerializeToString() + b"\x78\x05" + b"\x7d\x01\x02\x03\x04" + b"\x79" + bytes(8)
    )  # nobody knows these
    mixed = b"".join(field(HINT, h.SerializeToString()) for h in hints) + tail
    assert send(api, mixed).accepted == 1002
    talk: Any = api.channel.stream_stream(BATCHES[1], response_deserializer=HintReply.FromString)
    assert [r.accepted for r in talk(iter([raw]), timeout=WAIT_S) if r.seq] == [1002]


@pytest.mark.parametrize(
    "end", [HINT, HINT + b"\x05", b"\x0b", b"\xff" * 12, b"\x08", b"\x09\x00", field(HINT, b"\xff")], ids=bytes.hex
)
def test_a_large_one_that_is_none(api: Api, end: bytes) -> None:
    raw = large([Hint(request=Request(id="r".ljust(200, "x")))] * 300).SerializeToString()
    assert len(raw) > SMALL
    assert refusal(api, raw + end) == (grpc.StatusCode.INVALID_ARGUMENT, "the message is malformed")
