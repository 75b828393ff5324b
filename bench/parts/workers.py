# SPDX-License-Identifier: Apache-2.0
"""Workers of different users on one shaped link, honest and hostile; each is a process: ``... workers KIND ...``.

``honest`` has one connection that is marked as a collective, sends at a steady rate below its even part, and says how
many bytes TCP has taken and what its longest wait was. The hostile ones take what they can get:

* ``collectives``: thirty saturating connections marked as collectives;
* ``flips``: eight that are marked as collective and as background in turns;
* ``deadlines``: eight whose transfers are always due at once;
* ``phantoms``: transfers that are due soon and never sent, beside eight saturating connections;
* ``tiny``: hinted UDP packets that are small enough for the control band.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import selectors
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from mfsd.client import Client, Stage
from mfsd.client.selectors import tuple_of
from mfsd.lab.hosts.enter import enter
from mfsd.lab.hosts.tcp import reset_at_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PORT: Final = 6000
HOSTILE_UID: Final = 65_534
HONEST_UID: Final = 1002
CHUNK: Final = bytes(1 << 20)
STEP_S: Final = 0.01


def dial(there: str) -> socket.socket:
    """A connection that is reset when it is closed."""
    s = socket.create_connection((there, PORT))
    reset_at_close(s)
    s.setblocking(False)
    return s


def sink(there: str) -> None:
    """Read whatever comes."""
    listener = socket.create_server((there, PORT), backlog=4096)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind((there, PORT))
    poll = selectors.DefaultSelector()
    poll.register(listener, selectors.EVENT_READ)
    poll.register(datagrams, selectors.EVENT_READ)
    print("ready", flush=True)
    while True:
        for key, _ in poll.select():
            sock: Any = key.fileobj
            if sock is listener:
                poll.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            with contextlib.suppress(OSError):
                if sock.recv(1 << 18) or sock is datagrams:
                    continue
            poll.unregister(sock)
            sock.close()


def honest(there: str, client: Client, until: float, rate: float) -> None:
    """Send ``rate`` bytes/s until then; print what TCP took and the longest time that it took nothing."""
    sock = dial(there)
    client.mark(sock, Stage.COLLECTIVE)
    client.flush(5)
    began = last = time.monotonic()
    sent, longest = 0, 0.0
    while (now := time.monotonic()) < until:
        owed = int((now - began) * rate) - sent
        if owed > 0:
            try:
                sent += sock.send(CHUNK[:owed])
                longest, last = max(longest, now - last), now
            except BlockingIOError:
                pass
        time.sleep(STEP_S)
    print(json.dumps({"bytes": sent, "seconds": time.monotonic() - began, "longest_s": longest}), flush=True)


def saturate(socks: list[socket.socket], until: float, meanwhile: Callable[[], object], every: float) -> None:
    """Send what TCP takes, and do something else now and then."""
    due = time.monotonic()
    while time.monotonic() < until:
        if time.monotonic() >= due:
            due = time.monotonic() + every
            meanwhile()
        for s in select.select([], socks, [], STEP_S)[1]:
            with contextlib.suppress(BlockingIOError):
                s.send(CHUNK)


def collectives(there: str, client: Client, until: float) -> None:
    """See the module."""
    socks = [dial(there) for _ in range(30)]
    for s in socks:
        client.mark(s, Stage.COLLECTIVE)
    saturate(socks, until, lambda: None, 1.0)


def flips(there: str, client: Client, until: float) -> None:
    """See the module."""
    socks, turn = [dial(there) for _ in range(8)], itertools.cycle((Stage.COLLECTIVE, Stage.BACKGROUND))

    def flip() -> None:
        stage = next(turn)
        for s in socks:
            client.mark(s, stage)

    saturate(socks, until, flip, 0.05)


def deadlines(there: str, client: Client, until: float) -> None:
    """See the module."""
    socks, count = [dial(there) for _ in range(8)], itertools.count()

    def due() -> None:
        n = next(count)
        client.request(f"r{n}", ttft_left_s=0.3)
        for i, s in enumerate(socks):
            client.transfer(f"{n}/{i}", s, 1 << 18, stage=Stage.P2D, request=f"r{n}")

    saturate(socks, until, due, 0.05)


def phantoms(there: str, client: Client, until: float) -> None:
    """See the module."""
    socks, idle, count = [dial(there) for _ in range(8)], [dial(there) for _ in range(64)], itertools.count()
    for s in socks:
        client.mark(s, Stage.COLLECTIVE)

    def due() -> None:
        n = next(count)
        client.request(f"r{n}", ttft_left_s=0.5)
        for i, s in enumerate(idle):
            client.transfer(f"{n}/{i}", s, 1 << 20, stage=Stage.P2D, request=f"r{n}")

    saturate(socks, until, due, 0.5)


def tiny(there: str, client: Client, until: float) -> None:
    """See the module."""
    socks = []
    for _ in range(4):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.connect((there, PORT))
        s.setblocking(False)
        here, port = s.getsockname()
        client.mark(tuple_of(there, PORT, here, port, protocol=17), Stage.COLLECTIVE)
        socks.append(s)
    small = bytes(60)
    while time.monotonic() < until:
        for s in select.select([], socks, [], STEP_S)[1]:
            with contextlib.suppress(OSError):
                for _ in range(256):
                    s.send(small)


HOSTILE: Final[dict[str, Callable[[str, Client, float], None]]] = {
    f.__name__: f for f in (collectives, flips, deadlines, phantoms, tiny)
}


@contextlib.contextmanager
def started(kind: str, namespace: str, there: str, target: str = "", seconds: float = 0.0, rate: float = 0.0,
            ) -> Iterator[subprocess.Popen[str]]:  # fmt: skip
    """A worker as a process, killed afterwards."""
    words = [kind, namespace, there, target, str(seconds), str(rate)]
    command = [sys.executable, "-m", "bench.parts.workers", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if kind == "sink":
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n", "the sink has failed"
            yield process
        finally:
            process.kill()


def main() -> None:
    """Be one of them."""
    kind, namespace, there, target, seconds, rate = sys.argv[1:]
    enter(namespace)
    if kind == "sink":
        sink(there)
    uid = HONEST_UID if kind == "honest" else HOSTILE_UID
    "".encode("idna")  # looked up while this user may still read the library
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    client = Client(target=target)  # which says who it is when it connects
    until = time.monotonic() + float(seconds)
    if kind == "honest":
        honest(there, client, until, float(rate))
    else:
        HOSTILE[kind](there, client, until)


if __name__ == "__main__":
    main()
