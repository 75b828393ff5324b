# SPDX-License-Identifier: Apache-2.0
"""Connections of other network namespaces, about which the daemon can't ask TCP."""

from __future__ import annotations

import contextlib
import socket
import time
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, MB, counted, dial, settled
from support.pods import PODS

from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.habits import Sink
    from support.namespaces import NetnsPair
    from support.rig import Daemon

    from mfsd.client import TupleSelector

pytestmark = [pytest.mark.netns, pytest.mark.parametrize("pod", PODS)]


def named(sock: socket.socket, pod: str) -> socket.socket | TupleSelector:
    """Routed packets have no socket."""
    return sock if pod == "bridged" else tuple_of(*sock.getpeername(), *sock.getsockname())


@contextlib.contextmanager
def cut(pair: NetnsPair) -> Iterator[None]:
    """Whatever leaves for ``b`` is thrown away there."""
    address = pair.run(pair.b, f"cat /sys/class/net/{pair.dev_b}/address").strip()
    pair.run(pair.b, f"ip link set {pair.dev_b} address 02:00:00:00:00:77")
    try:
        yield
    finally:
        pair.run(pair.b, f"ip link set {pair.dev_b} address {address}")


@pytest.mark.usefixtures("sink")
def test_what_has_left_and_is_not_acknowledged_is_not_done(daemon: Daemon, client: Client, pod: str) -> None:
    """The path loses all for three seconds, by when it is late."""
    with PODS[pod](daemon.pair) as inside, dial(inside) as s:
        client.transfer("before", named(s, pod), 100 * KB, stage=Stage.P2D, request="r")
        assert client.flush(5)
        s.sendall(bytes(100 * KB))
        settled(daemon, (1, 0, 0))
        client.request("q", ttft_left_s=1)
        with cut(daemon.pair):
            client.transfer("t", named(s, pod), 10 * KB, stage=Stage.P2D, request="q")
            assert client.flush(5)
            s.sendall(bytes(10 * KB))
            client.done(request="q")
            time.sleep(3)
            assert counted(daemon) == (1, 0, 0)
        settled(daemon, (2, 0, 1))


def test_what_the_peer_does_not_read_is_not_done(daemon: Daemon, client: Client, sink: Sink, pod: str) -> None:
    """Its window is closed: most of it waits in the socket, whatever the worker says."""
    sink.paused = True
    with PODS[pod](daemon.pair) as inside, dial(inside) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * MB)
        client.request("q", ttft_left_s=2)
        client.transfer("t", named(s, pod), 8 * MB, stage=Stage.P2D, request="q")
        assert client.flush(5)
        s.setblocking(False)
        written = s.send(bytes(8 * MB))
        client.done(request="q")
        time.sleep(4)
        assert counted(daemon) == (0, 0, 0)
        sink.paused = False
        sink.gets(written)
        settled(daemon, (1, 0, 1))


@pytest.mark.usefixtures("sink")
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_sizes_announced_too_large(daemon: Daemon, client: Client, share: float, pod: str) -> None:
    with PODS[pod](daemon.pair) as inside, dial(inside) as s:
        for i in range(3):
            client.request(f"q{i}", ttft_left_s=20)
            client.transfer(f"t{i}", named(s, pod), MB, stage=Stage.P2D, request=f"q{i}")
            assert client.flush(5)
            s.sendall(bytes(int(share * MB)))
            client.done(request=f"q{i}")
            settled(daemon, (i + 1, i + 1, 0))
