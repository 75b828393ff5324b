# SPDX-License-Identifier: Apache-2.0
"""Sockets that others are at: taken from nobody, left to whoever has them now, and with room for everybody."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import grpc
import pytest
from support.daemons import Running
from support.exhausted import no_descriptors
from support.rig import as_user
from support.waiting import wait_for

from mfsd.api.identity import Identities
from mfsd.api.places import ServerError
from mfsd.api.room import EACH, Room
from mfsd.client.introduction import introduced
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.daemon
NOBODY = 65_534
FILES = 256


def status(target: str) -> pb.Status:
    with introduced(target) as channel:
        return control_pb2_grpc.ControlStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5)


def lets_in(path: Path) -> bool:
    try:
        return bool(status(f"unix:{path}"))
    except (OSError, grpc.RpcError):
        return False


def test_a_socket_on_which_another_daemon_listens_is_left_to_it(running: Running, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ServerError, match="somebody listens there"):
        Running(other, daemon={"socket": str(running.socket)})
    assert status(running.target).version
    running.stop()
    assert not running.socket.exists()


def test_what_has_taken_the_place_of_a_socket_stays(running: Running) -> None:
    for path in (running.socket, running.socket.with_name("mfsd.sock.id")):
        path.unlink()
        path.write_text("somebody else's")
    running.stop()
    assert running.socket.read_text() == "somebody else's"


@pytest.fixture
def few_files(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """The socket of a daemon that may have few descriptors, ``FILES`` if the test does not say otherwise."""
    count = getattr(request, "param", FILES)
    config, path = tmp_path / "mfsd.toml", tmp_path / "mfsd.sock"
    config.write_text(f'[daemon]\nsocket = "{path}"\nstate_dir = "{tmp_path}"\n')

    command = ["bash", "-c", f'ulimit -n {count}; exec "$@"', "-", sys.executable, "-m", "mfsd.daemon"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--config", str(config)], stdout=log, stderr=log)
    try:
        wait_for(path.exists)
        for one in (tmp_path, *tmp_path.parents[:3], path, path.with_name("mfsd.sock.id")):
            one.chmod(one.stat().st_mode | 0o777)
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


@pytest.mark.root
def test_who_opens_connections_without_end_keeps_nobody_out(few_files: Path) -> None:
    assert status(f"unix:{few_files}")
    held: list[socket.socket] = []
    over = threading.Event()

    def hold() -> None:
        with as_user(NOBODY):
            while not over.is_set():
                one = socket.socket(socket.AF_UNIX)
                one.settimeout(0.1)
                held.append(one)
                try:
                    one.connect(str(few_files))
                except OSError:
                    time.sleep(0.01)
                if len(held) > 2 * FILES:
                    held.pop().close()

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        wait_for(lambda: len(held) > FILES)
        log = few_files.parent / "log"
        wait_for(lambda: b"too many connections" in log.read_bytes())
        wait_for(lambda: lets_in(few_files))
    finally:
        over.set()
        thread.join()
        for one in held:
            one.close()
    assert log.read_bytes().count(b"Traceback") <= 4


HOLDS = """
import socket, sys, time
held = []
for _ in range(60):
    one = socket.socket(socket.AF_UNIX)
    one.settimeout(0.1)
    held.append(one)
    try:
        one.connect(sys.argv[1])
    except OSError:
        pass
print("held", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("few_files", [64], indirect=True)
@pytest.mark.parametrize("name", ["mfsd.sock", "mfsd.sock.id"])
def test_a_process_of_the_daemons_own_user_keeps_nobody_out_either(few_files: Path, name: str) -> None:
    """It has lost count of its connections, and holds as many as the daemon has descriptors."""
    command = [sys.executable, "-c", HOLDS, str(few_files.with_name(name))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            for _ in range(3):
                wait_for(lambda: lets_in(few_files))
        finally:
            other.kill()


@pytest.mark.root
def test_the_newest_connections_beyond_a_users_part_are_hung_up_on(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for folder in path.parents[:4]:
        folder.chmod(folder.stat().st_mode | 0o755)

    def opened(uid: int, count: int) -> list[tuple[socket.socket, socket.socket]]:
        out = []
        with as_user(uid):
            for _ in range(count):
                one = socket.socket(socket.AF_UNIX)
                one.connect(str(path))
                out.append((one, listener.accept()[0]))
        return out

    def over(one: socket.socket) -> bool:
        one.settimeout(0)
        try:
            return one.recv(1) == b""
        except BlockingIOError:
            return False

    with socket.socket(socket.AF_UNIX) as listener, contextlib.closing(Room({str(path)}, Identities(4))) as room:
        listener.bind(str(path))
        listener.listen(64)
        path.chmod(0o777)
        first, ours = opened(NOBODY, 4 * EACH), opened(0, 5 * EACH)
        assert room.make() == {}
        second = opened(NOBODY, 5)
        assert room.make() == {NOBODY: 5}
        assert all(over(one) for one, _ in second)
        assert not any(over(one) for one, _ in first + ours)
        for one, other in first + ours + second:
            one.close()
            other.close()
        assert room.make() == {}


@pytest.mark.root
def test_who_connects_again_and_again_is_told_to_wait_and_others_are_not(start: Callable[..., Running]) -> None:
    running = start(limits={"max_sessions_per_user": 8})
    path = running.socket.with_name("mfsd.sock.id")
    path.chmod(0o777)
    for folder in path.parents[:4]:
        folder.chmod(folder.stat().st_mode | 0o755)

    def answers(uid: int) -> list[bytes]:
        out = []
        for _ in range(200):
            with as_user(uid):
                one = socket.socket(socket.AF_UNIX)
                one.connect(str(path))
            with one:
                out.append(one.recv(200))
        return out

    strangers = answers(NOBODY)
    assert strangers[0][:1] != b"!"
    assert f"!user {NOBODY} connects too often\n".encode() in strangers
    assert not any(b"too often" in answer for answer in answers(0))
    wait_for(lambda: not len(running.daemon._identities))


def test_without_descriptors_accepting_is_tried_again_in_peace(
    running: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    with no_descriptors(1):
        one = socket.socket(socket.AF_UNIX)
        one.settimeout(20)
        one.connect(f"{running.socket}.id")
        time.sleep(0.2)
        assert len(running.daemon._identities) == 0
    with one:
        assert len(one.recv(100)) == 33
    assert "Traceback" not in capsys.readouterr().out


# --- certificates -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate and its key, a key with a password, somebody else's key, and what is none."""
    folder = tmp_path_factory.mktemp("pems")
    new = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=x -days 2"
    for name in ("right", "other"):
        command = f"{new} -keyout {folder}/{name}.key -out {folder}/{name}.pem"
        subprocess.run(command.split(), check=True, capture_output=True)
    secret = f"openssl ec -in {folder}/right.key -aes256 -passout pass:secret -out {folder}/secret.key"
    subprocess.run(secret.split(), check=True, capture_output=True)
    (folder / "text").write_text("nothing of the kind")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    ("cert", "key", "ca", "problem"),
    [
        ("right.pem", "other.key", "right.pem", 'tls_cert = "[^"]*/right.pem": must be PEM, and the certificate of'),
        ("right.pem", "secret.key", "right.pem", 'tls_cert = .*/secret.key"\\), which has no password'),
        ("text", "right.key", "right.pem", 'tls_cert = "[^"]*/text": must be PEM'),
        ("right.pem", "right.key", "text", 'tls_client_ca = "[^"]*/text": must be certificates in PEM'),
        ("right.pem", "pipe", "right.pem", 'tls_key = "[^"]*/pipe": is no regular file'),
        ("right.pem", "right.key", "/dev/zero", 'tls_client_ca = "/dev/zero": is no regular file'),
        ("right.pem", "none", "right.pem", 'tls_key = "[^"]*/none": can\'t be read: No such file'),
    ],
)
@pytest.mark.parametrize("section", ["daemon", "metrics"])
def test_what_is_wrong_with_certificates_is_named(
    tmp_path: Path, pems: Path, section: str, cert: str, key: str, ca: str, problem: str
) -> None:
    tls = {"tls_cert": str(pems / cert), "tls_key": str(pems / key), "tls_client_ca": str(pems / ca)}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(ServerError, match=f"{section}.{problem}"):
        Running(tmp_path, **{section: tls | {"listen": listen}})


# --- reload -----------------------------------------------------------------------------------------------------------


def test_however_often_a_reload_is_asked_for_meanwhile_it_is_done_once_more(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon, count, proceed = running.daemon, [0], asyncio.Event()
    reload = daemon.reload

    async def counted() -> None:
        count[0] += 1
        await proceed.wait()
        await reload()

    monkeypatch.setattr(daemon, "reload", counted)
    before = len(daemon._tasks)
    running.loop.call_soon_threadsafe(daemon.reload_soon)
    wait_for(lambda: count[0])
    for _ in range(1000):
        running.loop.call_soon_threadsafe(daemon.reload_soon)
    running.loop.call_soon_threadsafe(proceed.set)
    wait_for(lambda: len(daemon._tasks) == before)
    assert count[0] == 2


@pytest.mark.parametrize("name", ["mfsd.toml", "conf.d/10-pipe.toml"])
def test_a_pipe_in_the_place_of_the_configuration_is_not_waited_for(
    running: Running, tmp_path: Path, name: str
) -> None:
    daemon = running.daemon
    daemon.path = tmp_path / "mfsd.toml"
    (tmp_path / "conf.d").mkdir()
    if name != "mfsd.toml":
        daemon.path.write_text("")
    os.mkfifo(tmp_path / name)
    running.loop.call_soon_threadsafe(daemon.reload_soon)
    wait_for(lambda: any("it is no regular file" in notice for notice in status(running.target).notices))
