# SPDX-License-Identifier: Apache-2.0
"""How much a peer of another host may take: a few sessions, whatever it calls them."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import grpc
import pytest
from support.relays import SENDER, Hosts
from support.waiting import WAIT_S

from mfsd.relay.incoming import SESSIONS
from mfsd.v1 import hints_pb2 as pb
from mfsd.v1 import hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.daemon


def test_a_peer_has_a_few_sessions_and_no_more(hosts: Hosts) -> None:
    pem = [path.read_bytes() for path in (hosts.papers.ca, hosts.own.key, hosts.own.cert)]
    over = threading.Event()

    def batch(name: str) -> pb.HintBatch:
        hint = pb.Hint(request=pb.Request(id="r", ttft_left_us=60_000_000))
        return pb.HintBatch(session=name, seq=1, hints=[hint])

    def theirs() -> list[str]:
        return hosts.sender.ask(lambda e: [name[-2:] for name in e.books.sessions if name.startswith("relay:")])

    def stays(name: str) -> Iterator[pb.HintBatch]:
        yield batch(name)
        over.wait(WAIT_S)

    with grpc.secure_channel(f"{SENDER}:{hosts.port}", grpc.ssl_channel_credentials(*pem)) as channel:
        said = hints_pb2_grpc.HintsStub(channel)
        for n in range(3 * SESSIONS):
            said.Send(batch(f"{n:02}"), timeout=WAIT_S)  # each is left at once
        assert theirs() == [f"{n:02}" for n in range(2 * SESSIONS, 3 * SESSIONS)]
        streams = [said.Stream(stays(f"o{n}")) for n in range(SESSIONS)]
        try:
            for stream in streams:
                next(stream)
            assert theirs() == [f"o{n}" for n in range(SESSIONS)]
            with pytest.raises(grpc.RpcError) as e:
                said.Send(batch("x1"), timeout=WAIT_S)
            assert e.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert said.Send(batch("o1"), timeout=WAIT_S).accepted == 1
        finally:
            over.set()
            for stream in streams:
                stream.cancel()
