# SPDX-License-Identifier: Apache-2.0
"""What can't be hinted, or said to nobody, is told in the log, once."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from support.others import within_reach
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client, Fd, Rejected, Stage, Transfer, tuple_of
from mfsd.client.selectors import IPPROTO_MPTCP
from mfsd.ground.model import Endpoints
from mfsd.ground.wire import BESIDE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.daemons import Running


def test_an_mptcp_socket_is_named_and_the_way_out_is_told(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Rejected] = []
    try:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    except OSError:
        pytest.skip("this kernel has no MPTCP")
    with (
        listener,
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP) as sock,
        Client(target=running.target, on_rejected=seen.append) as client,
        caplog.at_level(logging.WARNING, "mfsd.client"),
    ):
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        sock.connect(listener.getsockname())
        assert client.flush(WAIT_S)
        for i in range(3):
            client.transfer(f"t{i}", sock, 10, stage=Stage.BACKGROUND)
        client.mark(sock, Stage.COLLECTIVE)
        assert client.stats.rejected == 4
        assert all("MPTCP" in r.message and "tuple_of" in r.message for r in seen)
        assert len([r for r in caplog.records if "MPTCP" in r.message]) == 1
        # The way out: its subflow has the same addresses.
        host, port = sock.getpeername()
        client.transfer("t", tuple_of(host, port), 10, stage=Stage.BACKGROUND)
        assert client.flush(WAIT_S)
        own = sock.getsockname()
        found = running.ask(lambda e: [c.endpoints for c in e.connections.by_slot.values()])
    assert any(isinstance(e, Endpoints) and (str(e.src), e.sport) == own for e in found)


NOT_IN_THE_GROUP = """
import logging, os, sys, time
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from mfsd.client import Client, Cookie, Stage
import mfsd.v1.hints_pb2_grpc
os.setgroups([]); os.setgid(65534); os.setuid(65534)
client = Client(target=f"unix:{sys.argv[1]}")
for i in range(8):
    client.transfer(f"t{i}", Cookie(1), 10, stage=Stage.BACKGROUND)
    time.sleep(0.2)
assert not client.flush(0.1)
client.close()
"""


@pytest.mark.root
@pytest.mark.parametrize("closed", ["socket", "group", "folder"])
def test_who_may_not_use_the_socket_is_told_once(running: Running, closed: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    folder = running.socket.parent
    for outer in list(running.socket.parents)[:-2]:  # pytest makes its folders 0700
        outer.chmod(0o755)
    if closed == "folder":
        folder.chmod(0o750)
    elif closed == "group":
        os.chown(f"{running.socket}{BESIDE}", -1, 12_345)
    done = subprocess.run(
        [*within_reach(), sys.executable, "-c", NOT_IN_THE_GROUP, str(running.socket)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"WARNING no hints are sent: this process may not use {running.socket}")
    if closed == "socket":
        assert line.endswith("it is for root until daemon.socket_group names a group")
    elif closed == "group":
        assert line.endswith("join the group (usermod -aG 12345 nobody) and start it again")
    else:
        assert line.endswith("its folder is closed")


def test_a_daemon_that_stays_away_is_told_once(
    tmp_path: Path, start: Callable[..., Running], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mfsd.client.link.AWAY_S", 0.3)
    target = f"unix:{tmp_path / 'mfsd.sock'}"

    def told() -> int:
        return len([r for r in caplog.records if r.message == f"no mfsd at {target} for 0 s; hints are kept for it"])

    with caplog.at_level(logging.WARNING, "mfsd.client"), Client(target=target) as client:
        wait_for(told)
        daemon = start()
        wait_for(lambda: client.flush(1))
        assert told() == 1
        daemon.stop()
        wait_for(lambda: told() == 2)  # it has been there meanwhile


def test_a_socket_without_its_fellow_is_told_and_works_if_anybody_is_believed(
    start: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    """As where only the one file is mounted into a container."""
    running = start(daemon={"anonymous": True})
    running.socket.with_name("mfsd.sock.id").unlink()
    with caplog.at_level(logging.WARNING, "mfsd.client"), Client("worker", running.target) as client:
        client.request("r", ttft_left_s=60.0)
        assert client.flush(WAIT_S)
        assert running.ask(lambda e: (e.books.sessions["worker"].pid, e.books.sessions["worker"].uid)) == (0, -1)
    assert len([r for r in caplog.records if "mount their folder as a whole" in r.message]) == 1


def test_somebody_elses_session_is_told(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    with Client("worker", running.target) as first, caplog.at_level(logging.WARNING, "mfsd.client"):
        assert first.flush(WAIT_S)
        with Client("worker", running.target):
            wait_for(lambda: [r for r in caplog.records if "session 'worker' is that of process" in r.message])


GEVENT = """
from gevent import monkey
monkey.patch_all(thread={thread})
import os
from mfsd.client import Client
Client(target="").close()
try:
    with Client(target="unix:/nowhere") as client:
        client.request("r", ttft_left_s=1.0)
        print("works")
except RuntimeError as e:
    print(e)
"""


@pytest.mark.daemon
def test_patched_threads_are_refused_in_words() -> None:
    def said(*, thread: bool) -> str:
        code = GEVENT.format(thread=thread)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert said(thread=True).startswith(
        "mfsd.client needs real threads, but gevent has patched them: patch with thread=False"
    )
    assert said(thread=False) == "works\n"


ANY: Any = Client
ANY_FD: Any = Fd


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda _: ANY(target=5), "target: 5 is neither"),
        (lambda _: ANY(target="unix:/nowhere", queue="5"), "queue: '5' is no whole number; give how many hints"),
        (lambda _: ANY(target="unix:/nowhere", on_event=5), "on_event: 5 can't be called"),
        (lambda c: c.flush("soon"), "timeout: 'soon' is no number of seconds"),
        (lambda c: c.close(None), "timeout: None is no number of seconds"),
        (
            lambda c: c.transfer("t", ANY_FD("5"), 1, stage=Stage.BACKGROUND),
            r"Fd\('5'\): a descriptor is a whole number",
        ),
        (lambda c: c.transfers([("t", 5)]), r"transfers: \('t', 5\) is no Transfer; give Transfer\("),
    ],
)
def test_what_is_called_wrongly_is_told_by_its_name(call: Callable[[Any], object], words: str) -> None:
    with Client(target="unix:/nowhere") as client, pytest.raises((TypeError, ValueError), match=words):
        call(client)


@pytest.mark.parametrize("requests", ["r", b"r", None, 5])
def test_a_batch_of_no_list_is_refused_and_the_worker_goes_on(requests: Any) -> None:
    seen: list[Rejected] = []
    with Client(target="unix:/nowhere", on_rejected=seen.append) as client:
        client.batch("b", requests)
        assert [r.message for r in seen] == [f"requests: {requests!r} is no list; give a list of strings"]


def test_one_transfer_may_be_given_for_a_list(running: Running) -> None:
    with Client(target=running.target) as client:
        one: Any = Transfer("t", tuple_of("10.0.0.1", 1), 5, Stage.BACKGROUND)
        client.transfers(one)
        assert client.flush(WAIT_S)
    assert (client.stats.accepted, client.stats.connected) == (1, False)  # which may be asked after it is closed


@pytest.mark.parametrize("target", ["localhost", "run/mfsd.sock", "http://localhost:80"])
def test_a_target_that_can_not_be_is_warned_of(target: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "mfsd.client"):
        Client(target=target).close()
    (record,) = caplog.records
    assert record.message.startswith(f"mfsd: target {target!r} is no absolute path")
