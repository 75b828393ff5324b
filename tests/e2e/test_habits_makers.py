# SPDX-License-Identifier: Apache-2.0
"""Connections of which the kernel can't say who made them.

They were accepted on listeners that are older than the daemon, or on those of Multipath TCP (Go's), below which the
kernel makes sockets of its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

import pytest
from support.habits import KB, MB, WRONG, Grown, Worker, counted, settled, worker
from support.rig import Daemon, running
from support.waiting import WAIT_S, wait_for

from mfsd.ground.wire import beside

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

USER: Final = 65534
LISTENS: Final = f"""
import threading
protocol, user, named = int(arguments[0]), arguments[1] == "user", arguments[2]
if user:
    import grpc
    grpc.insecure_channel("unix:/nowhere").close()  # imports more of itself, from folders that may be root's alone
    os.setgroups([]); os.setgid({USER}); os.setuid({USER})
listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, protocol)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("10.77.0.1", 7000))
listener.listen()
say("listens")
hear()
client = Client(target=target)
client.request("r", ttft_left_s=600)
if named == "addresses":
    client.mark(tuple_of("10.77.0.2", (1, 65535)), Stage.COLLECTIVE)
elif named == "process":
    client.mark(process_peer(os.getpid(), "10.77.0.2"), Stage.COLLECTIVE)
say(client.flush(20))
while True:
    s, _ = listener.accept()
    say("accepted", cookie_of(s))
    n = int(hear())
    if named == "socket":
        client.transfer("t", s, n, stage=Stage.COLLECTIVE, request="r")
    s.sendall(bytes(n))
    s.close()
"""


@contextlib.contextmanager
def pulled(pair: NetnsPair, size: int) -> Iterator[None]:
    """A peer that reads so much of a connection that it has opened."""
    with pair.call(pair.b, lambda: socket.create_connection((pair.addr_a, 7000), WAIT_S)) as s:
        s.settimeout(None)
        reader = threading.Thread(target=lambda: s.recv(size, socket.MSG_WAITALL), daemon=True)
        reader.start()
        yield
        reader.join(WAIT_S)
        assert not reader.is_alive()


def hints(daemon: Daemon, listening: Worker) -> None:
    """It has made its listener, and says now what it has to say to the daemon, whose sockets any user may reach."""
    for folder in (daemon.folder, *daemon.folder.parents):
        if folder.stat().st_uid == os.getuid() and str(folder).startswith("/tmp/"):  # noqa: S108 - pytest's own
            folder.chmod(folder.stat().st_mode | 0o711)
    for name in (daemon.socket, beside(daemon.socket)):
        name.chmod(0o777)
    listening.say()
    assert listening.hear() == ["True"]


@pytest.mark.parametrize("named", ["addresses", "process", "socket"])
@pytest.mark.parametrize("whose", ["user", "root"])
@pytest.mark.parametrize("listener", ["older than the daemon", "of Multipath TCP"])
def test_whose_it_is_is_found_out(netns_pair: NetnsPair, tmp_path: Path, listener: str, whose: str, named: str) -> None:
    older = listener.startswith("older")
    daemon = Daemon(netns_pair, tmp_path)
    protocol = str(socket.IPPROTO_TCP if older else 262)  # IPPROTO_MPTCP, include/uapi/linux/in.h
    with contextlib.ExitStack() as stack:
        if not older:
            stack.enter_context(running(daemon))
        w = stack.enter_context(worker(daemon, LISTENS, protocol, whose, named))
        assert w.hear() == ["listens"]
        if older:
            stack.enter_context(running(daemon))
        hints(daemon, w)
        with pulled(netns_pair, MB):
            cookie = int(w.hear()[1])
            if named != "socket":
                wait_for(
                    lambda: [c.band for c in daemon.connections() if c.cookie == cookie] == ["level 0"], "its band"
                )
            grown = Grown(daemon)
            w.say(str(MB))
        if named == "socket":
            settled(daemon, (1, 0, 0))
        wait_for(lambda: sum(grown.now().values()) >= MB, "what the bands have sent")
        if named != "socket":  # which is hinted without waiting
            assert grown.wrong(MB, right="level 0") <= WRONG


def test_one_that_is_over_before_its_hint_is_heard(netns_pair: NetnsPair, tmp_path: Path) -> None:
    daemon = Daemon(netns_pair, tmp_path)
    with worker(daemon, LISTENS, str(socket.IPPROTO_TCP), "user", "socket") as w:
        assert w.hear() == ["listens"]
        with running(daemon):
            hints(daemon, w)
            with pulled(netns_pair, 100 * KB):
                assert w.hear()[0] == "accepted"
                w.say(str(100 * KB))
            settled(daemon, (1, 0, 0))
            time.sleep(1.5)  # nothing is reported of it afterwards
            assert counted(daemon) == (1, 0, 0)


def test_those_of_others_stay_theirs(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """Root's connections, which nobody has noted, and a user whose addresses name all."""
    daemon = Daemon(netns_pair, tmp_path)
    with worker(daemon, LISTENS, str(socket.IPPROTO_TCP), "root", "socket") as w:
        assert w.hear() == ["listens"]
        with running(daemon):
            hints(daemon, w)
            stranger = LISTENS.replace("7000", "7001")
            with worker(daemon, stranger, str(socket.IPPROTO_TCP), "user", "addresses") as other:
                assert other.hear() == ["listens"]
                hints(daemon, other)
                with pulled(netns_pair, KB):
                    time.sleep(1)
                    assert not daemon.connections()
                    assert w.hear()[0] == "accepted"
                    w.say(str(KB))
