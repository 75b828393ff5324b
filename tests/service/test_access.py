# SPDX-License-Identifier: Apache-2.0
"""Who may do what: operators everything, workers hints about their own connections."""

from __future__ import annotations

import grp
import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.daemons import Api, Running, call_violation
from support.others import within_reach
from support.peers import Introduced
from support.waiting import WAIT_S, wait_for

from mfsd.api.identity import Peer, Rights
from mfsd.client.introduction import introduced
from mfsd.v1 import control_pb2, control_pb2_grpc
from mfsd.v1.hints_pb2 import STAGE_P2D, ConnectionMark, Hint, Request, Selector, Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

STRANGER = 61_234
CALLS = {
    method.name: method
    for method in control_pb2.DESCRIPTOR.services_by_name["Control"].methods
    if method.name != "Watch"
}


@pytest.fixture
def as_user(running: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Introduced]]:
    """Introduces this process as if another user's."""
    made: list[Introduced] = []
    admit = running.daemon._identities.admit

    def introduce(uid: int) -> Introduced:
        with monkeypatch.context() as m:
            m.setattr(running.daemon._identities, "admit", lambda pid, _uid, _groups: admit(pid, uid, frozenset({uid})))
            made.append(Introduced.to(running.socket))
        return made[-1]

    yield introduce
    for one in made:
        one.close()


def call(channel: grpc.Channel, name: str, metadata: Any = ()) -> grpc.StatusCode:
    """Status of a call of Control with an empty request."""
    method = CALLS[name]
    ask: Any = getattr(control_pb2_grpc.ControlStub(channel), name)
    try:
        answer = ask(getattr(control_pb2, method.input_type.name)(), timeout=WAIT_S, metadata=metadata)
        if method.server_streaming:
            next(answer)
            answer.cancel()
    except grpc.RpcError as e:
        code: grpc.StatusCode = e.code()
        return code
    return grpc.StatusCode.OK


@pytest.mark.parametrize("name", CALLS)
def test_control_is_for_operators(running: Running, as_user: Callable[[int], Introduced], name: str) -> None:
    with grpc.insecure_channel(running.target) as channel:
        assert call(channel, name) is grpc.StatusCode.UNAUTHENTICATED
        assert call(channel, name, as_user(STRANGER).metadata) is grpc.StatusCode.PERMISSION_DENIED
        assert call(channel, name, (("mfsd-token", "x"),)) is grpc.StatusCode.UNAUTHENTICATED
        assert not running.ask(lambda e: e.paused)
        ours = call(channel, name, as_user(os.geteuid()).metadata)
        assert ours not in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def test_watching_is_for_operators(running: Running, as_user: Callable[[int], Introduced]) -> None:
    with grpc.insecure_channel(running.target) as channel:
        watch = control_pb2_grpc.ControlStub(channel).Watch(
            control_pb2.WatchRequest(), timeout=WAIT_S, metadata=as_user(STRANGER).metadata
        )
        with pytest.raises(grpc.RpcError) as e:
            next(watch)
        assert e.value.code() is grpc.StatusCode.PERMISSION_DENIED
    with introduced(running.target) as channel:
        watch = control_pb2_grpc.ControlStub(channel).Watch(control_pb2.WatchRequest(), timeout=WAIT_S)
        assert next(watch).status.epoch
        watch.cancel()


def test_reflection_is_for_operators_and_health_for_all(running: Running, as_user: Callable[[int], Introduced]) -> None:
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(running.target) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        for metadata in ((), as_user(STRANGER).metadata):
            with pytest.raises(grpc.RpcError):
                list(stub.ServerReflectionInfo(iter([ask]), timeout=WAIT_S, metadata=metadata))
        (answer,) = stub.ServerReflectionInfo(iter([ask]), timeout=WAIT_S, metadata=as_user(0).metadata)
        assert "mfsd.v1.Control" in {s.name for s in answer.list_services_response.service}
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_who_operates() -> None:
    rights = Rights(operators=frozenset({50}), trusted=frozenset({7}))
    assert rights.operator(0, frozenset())
    assert rights.operator(os.geteuid(), frozenset())
    assert rights.operator(STRANGER, frozenset({1, 50}))
    assert not rights.operator(STRANGER, frozenset({1, 51}))
    assert not rights.operator(7, frozenset())
    assert (rights.speaks_for_all(7), rights.speaks_for_all(STRANGER)) == (True, False)


AS = """
import os, sys
from mfsd.client.introduction import introduced
from mfsd.v1 import control_pb2, control_pb2_grpc
import grpc
os.setgroups([int(g) for g in sys.argv[2:]]); os.setgid(65534); os.setuid(65534)
with introduced(sys.argv[1]) as channel:
    try:
        print(control_pb2_grpc.ControlStub(channel).Pause(control_pb2.PauseRequest(), timeout=20).paused)
    except grpc.RpcError as e:
        print(e.code().name)
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="takes other users' places")
def test_the_kernel_says_who_is_a_member_of_the_operators_group(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(daemon={"operator_group": "daemon"})
    for path in (tmp_path, *tmp_path.parents[:3]):
        path.chmod(path.stat().st_mode | 0o055)
    for path in (running.socket, running.socket.with_name("mfsd.sock.id")):
        path.chmod(0o666)

    def pause(*groups: int) -> str:
        argv = [*within_reach(), sys.executable, "-c", AS, running.target, *map(str, groups)]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()

    member = grp.getgrnam("daemon").gr_gid
    assert pause() == pause(*range(60_000, 60_200)) == "PERMISSION_DENIED"
    assert not running.ask(lambda e: e.paused)
    assert pause(*range(60_000, 60_200), member) == "True"


# --- whose connections ------------------------------------------------------------------------------------------------


def test_others_connections_are_not_to_be_named(
    running: Running, as_user: Callable[[int], Introduced], connection: tuple[socket.socket, socket.socket]
) -> None:
    cookie = int.from_bytes(connection[0].getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)
    (here, sport), (there, dport) = connection[0].getsockname(), connection[0].getpeername()
    by_cookie, by_tuple = Selector(cookie=cookie), Selector()
    by_tuple.tuple.src_addr, by_tuple.tuple.dst_addr = here, there
    by_tuple.tuple.src_port.first = by_tuple.tuple.src_port.last = sport
    by_tuple.tuple.dst_port.first = by_tuple.tuple.dst_port.last = dport
    by_port = Selector()
    by_port.tuple.dst_addr = there
    by_port.tuple.dst_port.first = by_port.tuple.dst_port.last = dport

    def say(who: Introduced, session: str) -> Any:
        with grpc.insecure_channel(running.target) as channel:
            api = Api(channel, session=session)
            hints = [Hint(request=Request(id="r", ttft_left_us=60_000_000))]
            for i, selector in enumerate((by_cookie, by_tuple, by_port)):
                transfer = Transfer(id=str(i), request_id="r", stage=STAGE_P2D, bytes=1 << 40, selector=selector)
                hints += [Hint(transfer=transfer), Hint(connection=ConnectionMark(selector=selector, stage=STAGE_P2D))]
            return api.hints.Send(api.batch(*hints), timeout=WAIT_S, metadata=who.metadata)

    def effect() -> list[tuple[int, int]]:
        return running.ask(
            lambda e: [(len(c.marks), len(c.streams)) for c in e.connections.by_slot.values() if c.cookie == cookie]
        )

    reply = say(as_user(STRANGER), "stranger")
    wait_for(lambda: not effect())  # by port nothing of ours is found, and by cookie it is soon dropped
    codes = {r.index: r.status.code for r in reply.rejected}
    assert set(codes) <= {1, 2, 3, 4}
    say(as_user(os.geteuid()), "own")
    wait_for(lambda: effect() and effect()[0][0] >= 3)


def test_a_cookie_that_turns_out_to_be_anothers_is_dropped(
    running: Running, as_user: Callable[[int], Introduced]
) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.socket() as sock,
        grpc.insecure_channel(running.target) as channel,
    ):
        cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), sys.byteorder)
        api = Api(channel)
        mark = Hint(connection=ConnectionMark(selector=Selector(cookie=cookie), stage=STAGE_P2D))
        assert api.hints.Send(api.batch(mark), timeout=WAIT_S, metadata=as_user(STRANGER).metadata).accepted == 1
        sock.connect(listener.getsockname())
        wait_for(lambda: running.ask(lambda e: not len(e.connections)))
        assert running.ask(lambda e: [len(s.marks) for s in e.books.sessions.values()]) == [0]


# --- shares -----------------------------------------------------------------------------------------------------------


def test_a_user_at_its_limits_costs_others_nothing(start: Callable[..., Running]) -> None:
    running = start(limits={"max_sessions_per_user": 2, "max_transfers_per_user": 10, "max_mb_per_user": 0.02})
    identities = running.daemon._identities
    users: dict[int, list[Peer]] = {}
    for uid in (1001, 1002):
        admitted = [identities.admit(1, uid) for _ in range(3)]
        assert isinstance(admitted[2], str)
        users[uid] = [p for p in admitted if isinstance(p, Peer)]
    with grpc.insecure_channel(running.target) as channel:
        for uid, peers in users.items():
            accepted = 0
            for n, peer in enumerate(peers):
                api = Api(channel, session=f"{uid}-{n}")
                hints = [Hint(request=Request(id=f"r{i}", ttft_left_us=60_000_000)) for i in range(40)]
                reply = api.hints.Send(api.batch(*hints), timeout=WAIT_S, metadata=(("mfsd-token", peer.token),))
                accepted += reply.accepted
                for rejection in reply.rejected:
                    assert rejection.status.code == 8
                    assert "max_mb_per_user" in rejection.status.message
            assert accepted == 20_000 // (640 + 3) or accepted == 20_000 // (640 + 2)
        api = Api(channel, session="third")
        metadata = (("mfsd-token", users[1001][0].token),)
        with pytest.raises(grpc.RpcError) as e:
            api.hints.Send(api.batch(), timeout=WAIT_S, metadata=metadata)
        assert call_violation(e.value)[0] == 8


def test_names_of_sessions_are_bounded(api: Api) -> None:
    with pytest.raises(grpc.RpcError) as e:
        api.hints.Send(api.batch(session="x" * 1_000_000), timeout=WAIT_S)
    assert call_violation(e.value) == (3, "session", "is too long; at most 256 bytes (limits.max_id_bytes)")


# --- from afar --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """PEM by name: of a CA, a server, a client, and somebody else's client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*args: str) -> None:
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1")
    for ca in ("ca", "other"):
        openssl(*new, "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")
    for name, ca in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        by = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        openssl(*new, *by, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"folder": os.fsencode(folder)}


def test_from_afar_only_with_a_certificate(start: Callable[..., Running], certificates: dict[str, bytes]) -> None:
    folder = os.fsdecode(certificates["folder"])
    with socket.create_server(("127.0.0.1", 0)) as free:
        target = f"127.0.0.1:{free.getsockname()[1]}"
    tls = {"tls_cert": f"{folder}/server.pem", "tls_key": f"{folder}/server.key", "tls_client_ca": f"{folder}/ca.pem"}
    start(daemon={"listen": target} | tls)
    ask = control_pb2.GetStatusRequest()

    def status(credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
        channel = grpc.insecure_channel(target) if credentials is None else grpc.secure_channel(target, credentials)
        with channel:
            try:
                control_pb2_grpc.ControlStub(channel).GetStatus(ask, timeout=5)
            except grpc.RpcError as e:
                code: grpc.StatusCode = e.code()
                return code
        return grpc.StatusCode.OK

    def shown(name: str) -> grpc.ChannelCredentials:
        pem = certificates[f"{name}.key"], certificates[f"{name}.pem"]
        return grpc.ssl_channel_credentials(certificates["ca.pem"], *pem)

    assert status(shown("client")) is grpc.StatusCode.OK
    assert status(shown("stranger")) is grpc.StatusCode.UNAVAILABLE
    assert status(grpc.ssl_channel_credentials(certificates["ca.pem"])) is grpc.StatusCode.UNAVAILABLE
    assert status(None) is grpc.StatusCode.UNAVAILABLE

    def mfsctl(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mfsd.cli", "--socket", target, *words]
        return subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)

    files = {
        name: f"{folder}/{file}" for name, file in (("ca", "ca.pem"), ("cert", "client.pem"), ("key", "client.key"))
    }
    given = [word for name, file in files.items() for word in (f"--tls-{name}", file)]
    assert "policy" in mfsctl(*given, "status").stdout
    assert "policy" in mfsctl("status", *given).stdout
    by_environment = {f"MFSD_TLS_{name.upper()}": file for name, file in files.items()}
    assert mfsctl("pause", **by_environment).returncode == 0
    for words, code, expected in (
        (("status",), 3, "no answer from mfsd"),
        (("--tls-ca", files["ca"], "status"), 2, "--tls-cert (or $MFSD_TLS_CERT) is missing"),
        ((*given[:-1], f"{folder}/none", "status"), 1, f"--tls-key {folder}/none: No such file"),
        ((*given[:-1], "/dev/null", "status"), 1, "--tls-key /dev/null: is no PEM file"),
    ):
        done = mfsctl(*words)
        assert (done.returncode, done.stderr.count("Traceback")) == (code, 0), done.stderr
        assert expected in done.stderr
