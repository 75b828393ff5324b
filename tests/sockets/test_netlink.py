# SPDX-License-Identifier: Apache-2.0
"""Requests that the kernel answers, refuses, or leaves unanswered; and bytes that are no messages."""

from __future__ import annotations

import errno
import socket
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Iterator

RTM_GETLINK, RTM_NEWQDISC, RTM_GETROUTE = 18, 36, 26
IFLA_IFNAME, TCA_KIND = 3, 1
IFINFOMSG = struct.Struct("=BxHiII")
TCMSG = struct.Struct("=BBHiIII")


def get_link(index: int, flags: int = 0) -> bytes:
    return nl.request(RTM_GETLINK, flags, IFINFOMSG.pack(0, 0, index, 0, 0))


def name(m: nl.Message) -> str:
    return nl.attrs(m.data, m.body + IFINFOMSG.size, m.end)[IFLA_IFNAME].rstrip(b"\0").decode()


@pytest.fixture
def sock() -> Iterator[nl.NetlinkSocket]:
    with nl.NetlinkSocket(socket.NETLINK_ROUTE, in_flight=16) as s:
        yield s


def test_answers_come_in_the_order_of_the_requests(sock: nl.NetlinkSocket) -> None:
    """Over several system calls, with refusals in between."""
    index = socket.if_nametoindex("lo")
    wanted = [index if n % 3 else 2**30 + n for n in range(100)]
    answers = sock.batch([get_link(i) for i in wanted])
    for i, answer in zip(wanted, answers, strict=True):
        if i == index:
            assert name(answer) == "lo"
        else:
            assert (answer.kind, answer.code) == (nl.NLMSG_ERROR, errno.ENODEV)
    assert sock.batch([]) == []


def test_a_refused_request_is_over_at_once(sock: nl.NetlinkSocket) -> None:
    """Nothing is waited for: what the kernel has to say is there when the request has been sent."""
    assert not sock._sock.getblocking()
    assert sock._sock.gettimeout() == 0.0
    for _ in range(3):
        with pytest.raises(nl.NetlinkError, match="look for it: No such device") as caught:
            sock.ask(get_link(2**30), "look for it")
        assert caught.value.errno == errno.ENODEV
        assert name(sock.ask(get_link(socket.if_nametoindex("lo")), "lo")) == "lo"


def test_a_request_without_an_answer_is_over_at_once(sock: nl.NetlinkSocket) -> None:
    """Without the flag of a request the kernel passes over a message in silence (netlink_rcv_skb)."""
    silent = bytearray(get_link(1))
    struct.pack_into("=H", silent, 6, 0)
    for requests in ([bytes(silent)], [get_link(1), bytes(silent), get_link(1)]):
        with pytest.raises(nl.NetlinkError, match="unanswered") as caught:
            sock.batch(requests)
        assert caught.value.errno == errno.EPROTO
    assert name(sock.ask(get_link(1), "lo")) == "lo"


def test_the_kernels_words_are_kept(sock: nl.NetlinkSocket) -> None:
    tcm = TCMSG.pack(0, 0, 0, socket.if_nametoindex("lo"), 0x12340000, 0xFFFFFFFF, 0)
    body = tcm + nl.attr(TCA_KIND, b"mfsd_none\0")
    (answer,) = sock.batch([nl.request(RTM_NEWQDISC, nl.NLM_ACK | nl.NLM_CREATE, body)])
    assert answer.kind == nl.NLMSG_ERROR
    # Without privileges it does not come so far.
    assert (answer.code, bool(answer.note)) in ((errno.ENOENT, True), (errno.EPERM, False))


def test_an_answer_that_nobody_has_read_is_not_taken_for_another(sock: nl.NetlinkSocket) -> None:
    sock._send([get_link(1), get_link(1)])
    with pytest.raises(nl.NetlinkError, match="No such device"):
        sock.ask(get_link(2**30), "look for it")
    sock._send([get_link(2**30)])
    assert "lo" in [name(m) for m in sock.dump(get_link(0, nl.NLM_DUMP), "list devices")]
    sock._send([get_link(2**30)])
    sock._seq = 0xFFFFFFFE
    assert [name(m) for m in sock.batch([get_link(1)] * 5)] == ["lo"] * 5


@pytest.mark.netns
@pytest.mark.usefixtures("own_netns")
def test_a_dump_that_was_given_up_does_not_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel answers EBUSY while a dump on the same socket has not been read to its end."""
    routes = "".join(f"route add blackhole 10.1.{n >> 8}.{n & 255}\n" for n in range(2000))
    subprocess.run(["ip", "-batch", "-"], input=routes.encode(), check=True)
    raw = nl.request(RTM_GETROUTE, nl.NLM_DUMP, struct.pack("=B11x", socket.AF_INET))
    real, parts = nl.messages, 0

    def counted(data: bytes) -> list[nl.Message]:
        nonlocal parts
        parts += 1
        return real(data)

    def broken(_: bytes) -> list[nl.Message]:
        raise KeyboardInterrupt

    with nl.NetlinkSocket(socket.NETLINK_ROUTE, in_flight=1) as sock:
        monkeypatch.setattr(nl, "messages", counted)
        assert len(sock.dump(raw, "list routes")) >= 2000
        assert parts > 2
        monkeypatch.setattr(nl, "messages", broken)
        with pytest.raises(KeyboardInterrupt):
            sock.dump(raw, "list routes")
        monkeypatch.undo()
        assert len(sock.dump(raw, "list routes")) >= 2000
        with pytest.raises(BlockingIOError):
            sock._sock.recv(1 << 16)  # nothing is left


def test_a_refused_dump_says_why(sock: nl.NetlinkSocket) -> None:
    with pytest.raises(nl.NetlinkError, match="list what is not there: ") as caught:
        sock.dump(nl.request(0x7FF0, nl.NLM_DUMP, bytes(12)), "list what is not there")
    assert caught.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize(("changes", "torn"), [(4, False), (5, True), (5, False)])
def test_tables_that_change_during_a_dump(
    sock: nl.NetlinkSocket, monkeypatch: pytest.MonkeyPatch, *, changes: int, torn: bool
) -> None:
    """It is asked anew as often as it may help."""
    real, tries = sock._dump, []

    def changing(raw: bytes, what: str) -> tuple[list[nl.Message], bool]:
        tries.append(what)
        return real(raw, what)[0], len(tries) > changes

    monkeypatch.setattr(sock, "_dump", changing)
    if changes == 5 and not torn:
        with pytest.raises(nl.NetlinkError, match="keep changing") as caught:
            sock.dump(get_link(0, nl.NLM_DUMP), "list devices")
        assert caught.value.errno == errno.EINTR
    else:
        assert sock.dump(get_link(0, nl.NLM_DUMP), "list devices", torn=torn)
    assert len(tries) == 5


def test_threads_get_their_own_answers(sock: nl.NetlinkSocket) -> None:
    index = socket.if_nametoindex("lo")
    wrong: list[object] = []
    interval = sys.getswitchinterval()

    def ask(wanted: list[int]) -> None:
        for _ in range(300):
            try:
                got = [m.kind == nl.NLMSG_ERROR for m in sock.batch([get_link(i) for i in wanted])]
            except OSError as e:
                wrong.append(e)
            else:
                if got != [i != index for i in wanted]:
                    wrong.append(got)

    threads = [threading.Thread(target=ask, args=(w,)) for w in ([index] * 5, [2**30] * 3, [index, 2**30])]
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert wrong == []


def test_a_closed_socket_is_an_oserror(sock: nl.NetlinkSocket) -> None:
    sock.close()
    sock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        sock.ask(get_link(1), "lo")


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40)), max_size=8), st.integers(0, 300))
def test_attributes_are_read_back_as_far_as_they_go(written: list[tuple[int, bytes]], cut: int) -> None:
    data = b"".join(nl.attr(kind, payload) for kind, payload in written)
    assert nl.attrs(data) == dict(written)
    short = data[:cut]
    whole, at = {}, 0
    for kind, payload in written:
        if at + 4 + len(payload) > len(short):
            break
        whole[kind] = payload
        at += len(nl.attr(kind, payload))
    assert nl.attrs(short) == whole
    for kind, payload in written:
        start, length = nl.find(short, 0, len(short), kind)
        first = next((p for k, p in written if k == kind), payload)
        assert (short[start + 4 : start + length] == first) if kind in whole else ((start, length) == (0, 0))
        for other, _ in written:
            both = nl.find_two(short, 0, len(short), kind, other)
            wanted = nl.find(short, 0, len(short), other) if other != kind else (0, 0)
            assert both == ((start, length), wanted)


LYING = st.lists(
    st.tuples(st.integers(0, 80), st.lists(st.tuples(st.integers(0, 24), st.binary(max_size=20)), max_size=4)),
    max_size=4,
).map(
    lambda found: b"".join(
        nl.HEADER.pack(length, 16, 0, 0, 0) + b"".join(nl.ATTR.pack(n, i) + b for i, (n, b) in enumerate(body))
        for length, body in found
    )
)
"""Messages and attributes that are shorter or longer than they say."""


@given(st.binary(max_size=200) | LYING)
def test_garbled_messages_stay_inside_their_bytes(data: bytes) -> None:
    for m in nl.messages(data):
        assert 16 <= m.body <= m.end <= len(data)
        for at, length in nl.positions(m.data, m.body, m.end).values():
            assert m.body <= at
            assert at + length <= m.end
