# SPDX-License-Identifier: Apache-2.0
"""Who says what, and whose sockets are meant: pid namespaces, hidepid, users, children, clients that come and go."""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from support.habits import KB, MB, WRONG, Grown, Sink, band, dial, settled, worker
from support.others import within_reach
from support.rig import Daemon, running
from support.waiting import wait_for

from mfsd.client import cookie_of

if TYPE_CHECKING:
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns


MARKS_ITS_SOCKET = """
client = Client(target=target)
s = dial()
client.mark(s, Stage.COLLECTIVE)
client.mark(process_peer(int(hear())), Stage.COLLECTIVE)
say(client.flush(20), os.getpid(), client.stats.rejected, cookie_of(s))
hear()
"""


@pytest.mark.parametrize(
    "wrap",
    [(), ("unshare", "--pid", "--fork", "--mount-proc"), ("unshare", "--pid", "--fork", "--mount-proc", "--user")],
    ids=["host", "pid namespace", "user namespace"],
)
def test_a_session_lives_as_long_as_the_process_that_the_kernel_names(
    daemon: Daemon, sink: Sink, wrap: tuple[str, ...]
) -> None:
    with worker(daemon, MARKS_ITS_SOCKET, wrap=wrap) as one:
        one.say(str(one.popen.pid))
        flushed, pid, rejected, cookie = one.hear()
        assert (flushed, rejected) == ("True", "0")
        assert (pid == str(one.popen.pid)) == (not wrap)
        assert [c.band for c in daemon.connections() if c.cookie == int(cookie)] == ["level 0"]
        assert daemon.status().sessions == 1
        one.end()
        wait_for(lambda: daemon.status().sessions == 0, "the session to end with its process")
        wait_for(lambda: daemon.status().connections == 0, "its slots to be free")
    sink.gets(0)


def test_clients_that_come_and_go(daemon: Daemon) -> None:
    for i in range(300):
        with daemon.client() as client:
            client.request(f"r{i}", ttft_left_s=60)
            assert client.flush(20), i
            assert client.stats.rejected == 0
    wait_for(lambda: daemon.status().sessions == 0, "their sessions to end")


def test_a_client_that_is_killed_ends_what_it_said(daemon: Daemon, sink: Sink) -> None:
    body = """
client = Client(target=target)
client.mark(tuple_of(host, port), Stage.COLLECTIVE)
say(client.flush(20))
hear()
"""
    with worker(daemon, body) as one, dial(daemon.pair) as sock:
        assert one.hear() == ["True"]
        wait_for(lambda: band(daemon, sock) == "level 0", "its mark")
        one.kill()
        wait_for(lambda: band(daemon, sock) == "", "the end of its mark")
        with dial(daemon.pair) as later:
            grown = Grown(daemon)
            later.sendall(bytes(MB))
            wait_for(lambda: sink.received == MB, "arrival")
            assert grown.now()["default"] >= MB


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_the_sockets_of_event_loops(daemon: Daemon, sink: Sink, loop: str) -> None:
    body = """
import asyncio, uvloop
async def work():
    reader, writer = await asyncio.open_connection(host, port)
    sock = writer.get_extra_info("socket")
    client.request("r", ttft_left_s=60)
    client.transfer("a", sock, 1_000_000, stage=Stage.P2D, request="r")
    assert await asyncio.to_thread(client.flush, 20)
    writer.write(bytes(1_000_000))
    await writer.drain()
    client.transfer("b", Fd(sock.fileno()), 1_000_000, stage=Stage.P2D, request="r")
    assert await asyncio.to_thread(client.flush, 20)
    writer.write(bytes(1_000_000))
    await writer.drain()
    try:
        client.transfer("c", sock.fileno(), 1, stage=Stage.P2D, request="r")
    except TypeError as e:
        say(e)
    client.done(request="r")
    await asyncio.to_thread(client.flush, 20)
    writer.close()
    await writer.wait_closed()
    hear()
with Client(target=target) as client, asyncio.Runner(
    loop_factory=uvloop.new_event_loop if arguments[0] == "uvloop" else None
) as runner:
    runner.run(work())
"""
    grown = Grown(daemon)
    with worker(daemon, body, loop) as one:
        assert "write" in one.hear()
        settled(daemon, (2, 1, 0))
        assert grown.now()["default"] < 0.005 * 2 * MB
    sink.gets(2 * MB)


HIDDEN = (
    "unshare", "--mount", "sh", "-ec",
    ('mount -t proc -o hidepid=2 proc /proc; grep -q " - cgroup2 " /proc/self/mountinfo || '
     'mount -t cgroup2 none /mnt; exec "$@"'),
    "hidden",
)  # fmt: skip
"""The daemon may not mount anything itself there."""
TWO = ("setpriv", "--bounding-set=-all,+bpf,+net_admin", "--inh-caps=-all,+bpf,+net_admin")
OTHER = (*within_reach(), "setpriv", "--reuid=54321", "--regid=0", "--clear-groups")


def test_a_daemon_that_can_see_no_process_of_others(netns_pair: NetnsPair, tmp_path: Path, sink: Sink) -> None:
    """hidepid=2 on /proc, two capabilities, and a client of another user."""
    for folder in list(tmp_path.parents)[:-2]:  # pytest makes its folders 0700
        folder.chmod(0o755)
    tmp_path.chmod(0o755)
    body = """
with Client(target=target) as client:
    s = dial()
    client.request("r", ttft_left_s=60)
    client.transfer("t", s, 1_000_000, stage=Stage.P2D, request="r")
    say(client.flush(20), client.stats.rejected)
    s.sendall(bytes(1_000_000))
    client.done(request="r")
    client.flush(20)
    client.mark(process_peer(os.getpid(), host, port), Stage.COLLECTIVE)
    say(client.flush(20), client.stats.rejected)
    later = dial()
    say(cookie_of(later))
    hear()
"""
    with (
        running(Daemon(netns_pair, tmp_path, wrap=(*HIDDEN, *TWO))) as daemon,
        worker(daemon, body, wrap=OTHER) as one,
    ):
        assert one.hear() == ["True", "0"]
        settled(daemon, (1, 1, 0))
        assert one.hear() == ["True", "0"]
        cookie = int(one.hear()[0])
        wait_for(lambda: [c.band for c in daemon.connections() if c.cookie == cookie] == ["level 0"], "the mark")
        one.kill()
        wait_for(lambda: daemon.status().sessions == 0, "the end of its session")
    sink.gets(MB)


def test_a_client_outside_the_group_is_warned_once(daemon: Daemon) -> None:
    for folder in list(daemon.folder.parents)[:-2]:
        folder.chmod(0o755)
    daemon.folder.chmod(0o755)
    body = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s")
client = Client(target=target)
for i in range(8):
    client.transfer(f"t{i}", Cookie(1), 10, stage=Stage.BACKGROUND)
    time.sleep(0.1)
say(client.flush(0.1))
client.close()
"""
    nobody = (*within_reach(), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with worker(daemon, body, wrap=nobody) as one:
        out, err = one.result()
    assert out.split() == ["False"]
    (line,) = err.splitlines()
    assert line.startswith(f"WARNING no hints are sent: this process may not use {daemon.socket}")
    assert "it is for root until daemon.socket_group names a group" in line


FORKS = """
listener = None
child = os.fork()
if not child:
    s = dial()
    say(os.getpid(), cookie_of(s))
    hear()
    later = dial()
    say(cookie_of(later))
    time.sleep(60)
os.wait()
"""


def test_mfsctl_marks_a_parent_whose_child_owns_the_sockets(daemon: Daemon, sink: Sink) -> None:
    with worker(daemon, FORKS) as parent:
        _, first = parent.hear()
        done = daemon.mfsctl(
            "--socket", str(daemon.socket), "hint", "mark", "--stage", "collective", "--pid", str(parent.popen.pid)
        )
        assert done.returncode == 0, done.stderr
        assert "1 connection" in done.stdout, done.stdout
        assert [c.band for c in daemon.connections() if c.cookie == int(first)] == ["level 0"]
        parent.say()
        (later,) = parent.hear()
        wait_for(lambda: [c.band for c in daemon.connections() if c.cookie == int(later)] == ["level 0"], "the next")
        with subprocess.Popen(["sleep", "60"]) as idle:
            none = daemon.mfsctl(
                "--socket", str(daemon.socket), "hint", "mark", "--stage", "collective", "--pid", str(idle.pid)
            )
            idle.kill()
        assert "no connection" in none.stdout + none.stderr, none.stdout + none.stderr
    sink.gets(0)


def test_a_fork_after_a_mark_by_process(daemon: Daemon, sink: Sink) -> None:
    """A child that is younger than the mark, and whose parent ends."""
    body = """
client = Client(target=target)
client.mark(process_peer(os.getpid(), host, port), Stage.COLLECTIVE)
say(client.flush(20))
hear()
if not os.fork():
    time.sleep(2.5)
    s = dial()
    say(cookie_of(s))
    time.sleep(60)
hear()
"""
    with worker(daemon, body) as one:
        assert one.hear() == ["True"]
        one.say()
        (cookie,) = one.hear()
        wait_for(lambda: [c.band for c in daemon.connections() if c.cookie == int(cookie)] == ["level 0"], "the mark")
    sink.gets(0)


def test_the_sockets_of_another_user_are_not_meant(daemon: Daemon, sink: Sink) -> None:
    for folder in list(daemon.folder.parents)[:-2]:
        folder.chmod(0o755)
    daemon.folder.chmod(0o755)
    body = """
s = dial()
client = Client(target=target)
client.mark(tuple_of(host, port), Stage.COLLECTIVE)
say(client.flush(20), cookie_of(s))
hear()
"""
    with dial(daemon.pair) as before, worker(daemon, body, wrap=OTHER) as one:
        flushed, own = one.hear()
        assert flushed == "True"
        with dial(daemon.pair) as after:
            shown = {c.cookie: c.band for c in daemon.connections()}
            assert shown.get(int(own)) == "level 0"
            assert {cookie_of(before), cookie_of(after)}.isdisjoint(k for k, b in shown.items() if b == "level 0")
    sink.gets(0)


def test_hints_by_a_session_without_an_owner_end_with_its_stream(netns_pair: NetnsPair, tmp_path: Path) -> None:
    """Over TCP nobody vouches for a client, so the end of its stream must do."""
    daemon = Daemon(netns_pair, tmp_path)
    daemon.write_config("[limits]\ndefault_ttl_s = 1.0", daemon='listen = "127.0.0.1:7171"\nanonymous = true')
    body = """
client = Client(target="127.0.0.1:7171")
client.mark(tuple_of(host, port), Stage.COLLECTIVE)
say(client.flush(20))
hear()
"""
    with running(daemon), Sink(netns_pair), dial(netns_pair) as sock, worker(daemon, body) as one:
        assert one.hear() == ["True"]
        wait_for(lambda: band(daemon, sock) == "level 0", "its mark")
        time.sleep(2.5)  # longer than anything that is not held lives
        assert band(daemon, sock) == "level 0"
        one.kill()
        wait_for(lambda: band(daemon, sock) == "", "the end of its mark")
        wait_for(lambda: daemon.status().sessions == 0, "the end of its session")


NAMES_A_PROCESS = """
ready, go = os.pipe(), os.pipe()
child = os.fork()
if not child:
    os.read(go[0], 1)
    s = dial()
    s.sendall(bytes(100_000))
    os.write(ready[1], b"x")
    time.sleep(60)
client = Client(target=target)
client.mark(process_peer(os.getpid() if arguments[0] == "itself" else child, host), Stage.COLLECTIVE)
say(client.flush(20), client.stats.rejected, os.getpid())
hear()
if arguments[0] == "itself":
    s = dial()
    s.sendall(bytes(100_000))
else:
    os.write(go[1], b"x")
    os.read(ready[0], 1)
say("sent")
hear()
"""


@pytest.mark.parametrize("who", ["itself", "its child"])
def test_a_container_names_a_process_as_it_calls_it(daemon: Daemon, sink: Sink, who: str) -> None:
    """What its number 1 is elsewhere, and whoever descends from that, is not meant."""
    with worker(daemon, NAMES_A_PROCESS, who, wrap=("unshare", "--pid", "--fork", "--mount-proc")) as one:
        assert one.hear() == ["True", "0", "1"]
        grown = Grown(daemon)
        one.say()
        assert one.hear() == ["sent"]
        sink.gets(100 * KB)
        assert grown.wrong(100 * KB, right="level 0") <= WRONG
        with dial(daemon.pair) as stranger:
            stranger.sendall(bytes(100 * KB))
            sink.gets(200 * KB)
            assert band(daemon, stranger) == ""
