# SPDX-License-Identifier: Apache-2.0
"""Who speaks is what the kernel says: sessions belong to processes, and end with them."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from support.daemons import Api, Running
from support.others import within_reach
from support.peers import Introduced, worker
from support.waiting import WAIT_S, wait_for

from mfsd.api.identity import RESERVED, Identities
from mfsd.client import Client
from mfsd.v1.hints_pb2 import Hint, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def introduce() -> Iterator[Callable[[Running], Introduced]]:
    """Introduces this process to daemons, again and again."""
    made: list[Introduced] = []

    def make(daemon: Running) -> Introduced:
        made.append(Introduced.to(daemon.socket))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def running(start: Callable[..., Running]) -> Running:
    """A daemon that believes also those who say nothing of themselves."""
    return start(daemon={"anonymous": True})


@pytest.fixture
def api(running: Running) -> Iterator[Api]:
    """Stubs that say nothing of themselves."""
    with grpc.insecure_channel(running.target) as channel:
        yield Api(channel)


@pytest.fixture
def me(running: Running, introduce: Callable[[Running], Introduced]) -> Introduced:
    """This process, introduced."""
    return introduce(running)


def say(api: Api, metadata: Any = (), session: str = "s") -> Any:
    """Announce a request."""
    hint = Hint(request=Request(id="r", ttft_left_us=60_000_000))
    return api.hints.Send(api.batch(hint, session=session), timeout=WAIT_S, metadata=metadata)


def refused(api: Api, metadata: Any = (), session: str = "s") -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as e:
        say(api, metadata, session)
    return e.value.code(), str(e.value.details())


def sessions(daemon: Running) -> dict[str, tuple[int, int]]:
    """(pid, uid) by name."""
    return daemon.ask(lambda e: {s.name: (s.pid, s.uid) for s in e.books.sessions.values()})


def test_a_session_has_the_pid_and_uid_of_its_maker(api: Api, running: Running, me: Introduced) -> None:
    batch = api.batch(session="s", pid=1)  # what a message says of itself means nothing
    api.hints.Send(batch, timeout=WAIT_S, metadata=me.metadata)
    say(api, session="anybody")
    assert sessions(running) == {"s": (os.getpid(), os.geteuid()), "anybody": (0, -1)}


def test_a_session_is_nobody_elses(
    api: Api, running: Running, me: Introduced, introduce: Callable[[Running], Introduced]
) -> None:
    say(api, me.metadata)
    say(api, session="anybody")
    other = introduce(running)
    why = f"session 's' is that of process {os.getpid()} of user {os.geteuid()}; choose another name"
    assert refused(api, other.metadata) == (grpc.StatusCode.PERMISSION_DENIED, why)
    assert refused(api) == (grpc.StatusCode.PERMISSION_DENIED, why)
    code, why = refused(api, me.metadata, "anybody")
    assert (code, why) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "session 'anybody' is that of somebody without a token; choose another name",
    )
    with pytest.raises(grpc.RpcError) as e:
        list(api.hints.Stream(iter([api.batch(session="s")]), timeout=WAIT_S, metadata=other.metadata))
    assert e.value.code() is grpc.StatusCode.PERMISSION_DENIED
    say(api, me.metadata)
    assert len(sessions(running)) == 2


def test_the_end_of_the_connection_ends_the_sessions(
    api: Api, running: Running, me: Introduced, introduce: Callable[[Running], Introduced]
) -> None:
    for name in ("s", "t"):
        say(api, me.metadata, name)
    say(api, session="anybody")
    stream = api.hints.Stream(iter([api.batch(session="u")]), timeout=WAIT_S, metadata=me.metadata)
    next(stream)
    me.close()
    wait_for(lambda: set(sessions(running)) == {"anybody"})
    assert running.ask(lambda e: e.books.requests.n) == 1
    code, why = refused(api, me.metadata)
    assert (code, why) == (
        grpc.StatusCode.UNAUTHENTICATED,
        "its token is not known; connect to the socket ending in .id again",
    )
    say(api, introduce(running).metadata)  # the names are free


def test_a_stream_ends_with_its_token(api: Api, running: Running, me: Introduced) -> None:
    goes_on = threading.Event()

    def batches() -> Iterator[Any]:
        yield api.batch(session="s")
        assert goes_on.wait(WAIT_S)
        yield api.batch(session="s")

    stream = api.hints.Stream(batches(), timeout=WAIT_S, metadata=me.metadata)
    assert next(stream).seq == 1
    me.close()
    wait_for(lambda: not sessions(running))
    goes_on.set()
    with pytest.raises(grpc.RpcError) as e:
        next(stream)
    assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not sessions(running)


def test_a_closed_client_ends_its_session(running: Running) -> None:
    for _ in range(300):
        with Client(target=running.target) as client:
            client.request("r", ttft_left_s=60.0)
            assert client.flush(WAIT_S)
            assert client.stats.rejected == 0
    wait_for(lambda: not sessions(running))
    assert running.daemon._identities._by_uid == {}


def test_a_killed_process_ends_its_session(running: Running) -> None:
    with worker(running.target) as (process, said):
        assert said == ["True", str(process.pid), "0"]
        assert sessions(running) == {"worker": (process.pid, os.geteuid())}
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: not sessions(running))


HEIR = """
import os, socket, sys, time
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
s.recv(100)
if os.fork():
    print(os.getpid(), flush=True)
    input()
    os._exit(0)
time.sleep(60)
"""


def test_a_process_ends_although_its_child_has_the_connection(running: Running) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HEIR, f"{running.socket}.id"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == str(process.pid).encode()
            assert len(running.daemon._identities) == 1
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.wait(WAIT_S) == 0
            wait_for(lambda: not len(running.daemon._identities))
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its child lives on


@pytest.mark.root
def test_a_client_in_a_pid_namespace_of_its_own(running: Running) -> None:
    """Where it is number 1."""
    if os.geteuid() != 0:
        pytest.skip("needs root to make a pid namespace")
    unshare = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    with worker(running.target, wrapper=unshare) as (process, said):
        assert said == ["True", "1", "0"]
        ((pid, _),) = sessions(running).values()
        assert pid not in (1, process.pid)
        assert Path(f"/proc/{pid}/ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not sessions(running))


HIDDEN = """
mount -t proc -o hidepid=2 proc /proc
exec setpriv --reuid=12345 --regid=12345 --clear-groups --bounding-set=-all "$@"
"""


@pytest.mark.root
def test_a_daemon_that_does_not_see_its_clients_in_proc(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to hide processes from somebody else")
    tmp_path.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    os.chown(run, 12345, 12345)
    for folder in list(tmp_path.parents)[:-2]:  # pytest makes its folders 0700
        folder.chmod(0o755)
    config = tmp_path / "mfsd.toml"
    config.write_text(f'[daemon]\nsocket = "{run}/mfsd.sock"\nstate_dir = "{run}"\nanonymous = true\n')
    command = [sys.executable, "-m", "mfsd.daemon", "--config", str(config)]
    daemon = [*within_reach(), "unshare", "--mount", "sh", "-c", HIDDEN, "sh", *command]
    with subprocess.Popen(daemon, stderr=subprocess.PIPE) as process:
        try:
            wait_for((run / "mfsd.sock").exists)
            as_other = (*within_reach(), "setpriv", "--reuid=54321", "--regid=12345", "--clear-groups")
            with worker(f"unix:{run}/mfsd.sock", wrapper=as_other) as (_, said):
                assert (said[0], said[2]) == ("True", "0")
                with grpc.insecure_channel(f"unix:{run}/mfsd.sock") as channel:
                    code, why = refused(Api(channel), session="worker")
                assert (code, why) == (
                    grpc.StatusCode.PERMISSION_DENIED,
                    f"session 'worker' is that of process {said[1]} of user 54321; choose another name",
                )
        finally:
            process.terminate()
            process.communicate()


# --- the socket itself ------------------------------------------------------------------------------------------------


def test_it_has_the_mode_of_the_other_and_goes_with_it(start: Callable[..., Running]) -> None:
    daemon = start()
    path = daemon.socket.with_name("mfsd.sock.id")
    assert path.stat().st_mode == daemon.socket.stat().st_mode
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    daemon.stop()
    assert not path.exists()
    with socket.socket(socket.AF_UNIX) as leftover:  # of a daemon that was killed
        leftover.bind(str(path))
    assert start().target
    assert path.exists()


def test_connections_are_bounded_by_user_and_the_reason_is_said(
    start: Callable[..., Running], introduce: Callable[[Running], Introduced]
) -> None:
    daemon = start(limits={"max_sessions_per_user": 3})
    some = [introduce(daemon) for _ in range(3 + RESERVED)]  # we are an operator
    fourth = introduce(daemon)
    assert fourth.line == f"!user {os.geteuid()} has 3 connections open already (limits.max_sessions_per_user)"
    assert fourth.hung_up()
    some[0].close()
    wait_for(lambda: len(daemon.daemon._identities) == 2 + RESERVED)
    some[0] = introduce(daemon)
    assert len(some[0].line) == 32
    for one in some:
        one.close()
    wait_for(lambda: not len(daemon.daemon._identities))
    everybody = daemon.daemon._identities
    others = [everybody.admit(1, uid) for uid in range(10_000, 10_020)]
    assert sum(isinstance(o, str) for o in others) == 20 - 4 * 3
    assert others[-1] == "12 connections are open already (4 times limits.max_sessions_per_user)"
    assert not isinstance(everybody.admit(1, 0), str)


@pytest.mark.parametrize("name", ["mfsd:rules", "relay:other-host:mfsd:relay"])
def test_nobody_opens_a_session_that_would_be_the_daemons_own(
    api: Api, running: Running, me: Introduced, name: str
) -> None:
    """Rules that a reload brings, or hints of another host, would be said in it, and end with who took it first."""
    for metadata in ((), me.metadata):
        code, why = refused(api, metadata, name)
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert why.endswith("as all that begin with mfsd: or relay:; choose another name")
    assert not sessions(running)


def test_whoever_connects_as_very_many_users_has_nobody_wait() -> None:
    """In a user namespace anybody has 65,536: what is remembered of them is not gone through for each."""
    identities = Identities(256)
    paces, through = identities._paces, 0
    for uid in range(1, 20_001):
        assert not identities._too_fast(uid, 1.0)
        if identities._paces is not paces:
            paces, through = identities._paces, through + 1
    assert through < 20


def test_a_peer_that_speaks_is_hung_up_on_and_a_silent_one_costs_nothing(
    running: Running, me: Introduced, introduce: Callable[[Running], Introduced]
) -> None:
    chatty = introduce(running)
    chatty.sock.send(b"x" * 1000)
    assert chatty.hung_up()
    assert len(running.daemon._identities) == 1
    assert me.sock.fileno() > 0


def test_the_daemon_closes_all_when_it_stops(running: Running, me: Introduced) -> None:
    running.stop()
    assert me.hung_up()


def test_what_an_operator_says_by_hand_outlives_the_command(running: Running) -> None:
    """``mfsctl hint``, one command after the other; a worker's single call does not."""

    def by_hand(*words: str) -> None:
        command = [sys.executable, "-m", "mfsd.cli", "--socket", str(running.socket), "hint", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def sessions() -> dict[str, list[str]]:
        return running.ask(lambda e: {s.name: list(s.requests) for s in e.books.sessions.values()})

    by_hand("request", "a", "--ttft-left", "60s")
    by_hand("request", "b", "--ttft-left", "60s")
    assert sessions() == {"mfsctl": ["a", "b"]}
    with worker(running.target) as (_, said):
        assert said[0] == "True"
    wait_for(lambda: "worker" not in sessions())
    by_hand("done", "request", "a")
    by_hand("done", "request", "b")
    assert not sessions()["mfsctl"]
