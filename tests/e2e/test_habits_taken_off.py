# SPDX-License-Identifier: Apache-2.0
"""Somebody takes off the programs that tell of connections, as `bpftool link detach` does, or undoes what they do."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, KIB, PORT, WRONG, Grown, Sink, band, dial, settled
from support.waiting import wait_for

from mfsd.client import Client, Stage, tuple_of
from mfsd.datapath.bpf import cgroup, syscall

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.rig import Daemon

pytestmark = pytest.mark.netns


def take_off(daemon: Daemon) -> None:
    """All that the daemon has hung on a cgroup."""
    links = [
        text for f in Path(f"/proc/{daemon.pid}/fdinfo").iterdir() if "link_type:\tcgroup" in (text := f.read_text())
    ]
    assert len(links) == 2
    for text in links:
        (number,) = re.findall(r"^link_id:\t(\d+)", text, flags=re.MULTILINE)
        daemon.pair.run(daemon.pair.a, f"bpftool link detach id {number}")


def test_what_tells_of_connections_is_put_back(daemon: Daemon, client: Client, sink: Sink) -> None:
    """What was connected meanwhile is found, and what is connected later is in its band from the first packet on."""
    client.mark(tuple_of(daemon.pair.addr_b, PORT), Stage.COLLECTIVE)
    assert client.flush(5)
    take_off(daemon)
    with dial(daemon.pair) as s:
        s.sendall(bytes(100 * KB))
        assert daemon.mfsctl("--socket", str(daemon.socket), "enforce").returncode == 0  # it looks after all at once
        wait_for(lambda: band(daemon, s) == "level 0", "the one that nobody had told of")
    grown = Grown(daemon)
    for _ in range(20):
        with dial(daemon.pair) as s:
            s.sendall(bytes(64 * KIB))
    wait_for(lambda: sink.received == 100 * KB + 20 * 64 * KIB, "arrival")
    assert grown.wrong(20 * 64 * KIB, right="level 0") <= WRONG
    with dial(daemon.pair) as s:
        client.transfer("t", s, 100 * KB, stage=Stage.P2D, request="r")
        s.sendall(bytes(100 * KB))
    settled(daemon, (1, 0, 0))


ELSEWHERE = 6500
"""A port of no other test's: what hangs on the root of cgroup v2 sees all connections of the host."""


@contextlib.contextmanager
def forgetful() -> Iterator[int]:
    """A program that takes away the flags of connections to ELSEWHERE at each event."""
    remote_port, set_flags = 64, 59  # offset in struct bpf_sock_ops, BPF_FUNC_bpf_sock_ops_cb_flags_set
    insns = (
        (0x61, 0x12, remote_port, 0),
        (0x55, 0x02, 2, socket.htons(ELSEWHERE) << 16),
        (0xB7, 2, 0, 0),
        (0x85, 0, 0, set_flags),
        (0xB7, 0, 0, 1),
        (0x95, 0, 0, 0),
    )
    code = b"".join(struct.pack("=BBhi", *insn) for insn in insns)
    program = syscall.prog_load(13, "forgetful", code, "GPL")  # BPF_PROG_TYPE_SOCK_OPS
    try:
        yield program
    finally:
        os.close(program)


@contextlib.contextmanager
def hung_on_the_root(program: int) -> Iterator[None]:
    root = cgroup.open_root()
    link = syscall.link_create(program, root, cgroup.SOCK_OPS, 0)
    try:
        yield
    finally:
        os.close(link)
        os.close(root)


def test_somebody_comes_behind_what_tells_of_connections(daemon: Daemon, client: Client) -> None:
    """And undoes it; the peer closes first, so that nothing but the kernel's word says that all has arrived."""
    pair = daemon.pair
    with (
        forgetful() as program,
        hung_on_the_root(program),
        pair.call(pair.b, lambda: socket.create_server((pair.addr_b, ELSEWHERE))) as listener,
    ):
        assert daemon.mfsctl("--socket", str(daemon.socket), "enforce").returncode == 0  # it looks after all at once
        for i in range(10):
            with pair.call(pair.a, lambda: socket.create_connection((pair.addr_b, ELSEWHERE))) as s:
                client.request(f"q{i}", ttft_left_s=60)
                client.transfer(f"t{i}", s, 100 * KB, stage=Stage.P2D, request=f"q{i}")
                assert client.flush(5)
                with listener.accept()[0] as there:
                    there.shutdown(socket.SHUT_WR)
                    assert s.recv(1) == b""
                    with daemon.held_up():
                        s.sendall(bytes(100 * KB))
                        s.close()
                        assert len(there.recv(100 * KB, socket.MSG_WAITALL)) == 100 * KB
                client.done(request=f"q{i}")
        settled(daemon, (10, 10, 0))
        assert not any("hangs behind mfsd's" in n for n in daemon.status().notices)
        with hung_on_the_root(program):
            assert daemon.mfsctl("--socket", str(daemon.socket), "enforce").returncode == 0
            assert any("hangs behind mfsd's" in n for n in daemon.status().notices)
