# SPDX-License-Identifier: Apache-2.0
"""Sockets whose files somebody deletes, or puts something else in the place of, while the daemon runs."""

from __future__ import annotations

import contextlib
import shutil
import socket
from typing import TYPE_CHECKING, Any, Final

import grpc
import pytest
from support.ctl import run
from support.daemons import Api, Running
from support.waiting import wait_for

from mfsd.api import server
from mfsd.api.places import Places, ServerError
from mfsd.client.introduction import introduced
from mfsd.daemon.config import DaemonConfig
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc
from mfsd.v1.hints_pb2 import Hint, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.daemon
ALL: Final = ("mfsd.sock", "mfsd.sock.id", "mfsd.sock.metrics")


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A daemon that looks for its sockets often. Nothing of it may be left in their folder."""
    monkeypatch.setattr(server, "LOOK_S", 0.05)
    folder = tmp_path / "run"
    out = Running(tmp_path, daemon={"socket": str(folder / "mfsd.sock")}, metrics={"listen": "unix"})
    out.socket, out.target = folder / "mfsd.sock", f"unix:{folder}/mfsd.sock"
    yield out
    out.stop()
    assert not folder.exists() or not [p for p in folder.iterdir() if p.is_socket()]


def status(target: str) -> pb.Status | None:
    """What whoever comes now is told; None: nothing."""
    with contextlib.suppress(OSError, grpc.RpcError), introduced(target) as channel:
        answer: pb.Status = control_pb2_grpc.ControlStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5)
        return answer
    return None


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def findings(config: Path) -> dict[str, str]:
    """What the doctor has to say that is neither fine nor a mere remark: title and detail by id."""
    found: list[dict[str, str]] = run("--json", "doctor", "--config", str(config)).json["findings"]
    return {f["id"]: f"{f['title']}: {f['detail']}" for f in found if f["severity"] in ("warn", "fail")}


@pytest.mark.parametrize("names", [*((n,) for n in ALL), ALL, ()], ids=lambda n: "+".join(n) or "folder")
def test_a_deleted_socket_is_made_again_and_nobody_is_cut_off(running: Running, names: tuple[str, ...]) -> None:
    with introduced(running.target) as channel:
        api = Api(channel)
        hint = Hint(request=Request(id="r", ttft_left_us=60_000_000))
        assert api.send(hint).accepted == 1
        for _ in range(3):
            was = {name: (running.socket.parent / name).stat().st_mode for name in ALL}
            for name in names:
                (running.socket.parent / name).unlink()
            if not names:
                shutil.rmtree(running.socket.parent)
            wait_for(lambda: all(answers(running.socket.parent / name) for name in ALL))
            wait_for(lambda: status(running.target) is not None)
            assert {name: (running.socket.parent / name).stat().st_mode for name in ALL} == was
            assert api.send(hint).accepted == 1
        assert running.ask(lambda engine: [s.name for s in engine.books.sessions.values()]) == ["test"]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("put", [lambda p: p.write_text("precious"), lambda p: p.mkdir()], ids=["file", "folder"])
def test_what_is_in_the_place_of_a_socket_is_named_and_left(
    running: Running, tmp_path: Path, name: str, put: Callable[[Path], Any]
) -> None:
    path, config = running.socket.parent / name, tmp_path / "mfsd.toml"
    config.write_text(f'[daemon]\nsocket = "{running.socket}"\nstate_dir = "{tmp_path}"\n')
    with introduced(running.target) as channel:
        stub = control_pb2_grpc.ControlStub(channel)

        def notices() -> str:
            return " ".join(stub.GetStatus(pb.GetStatusRequest(), timeout=5).notices)

        assert "reach" not in notices()
        path.unlink()
        put(path)
        wait_for(lambda: f'"{path}": there is a file of this name that is no socket' in notices())
        said = " ".join(findings(config).values())
        assert "can't be reach" in said or "nobody can reach" in said
        assert path.read_text() == "precious" if path.is_file() else path.is_dir()
        path.unlink() if path.is_file() else path.rmdir()
        wait_for(lambda: "reach" not in notices())
    wait_for(lambda: status(running.target) is not None)
    assert "state.socket" not in findings(config)


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after it was made again"])
def test_somebody_else_who_listens_there_stays_when_the_daemon_ends(running: Running, *, again: bool) -> None:
    running.socket.unlink()
    if again:
        wait_for(lambda: answers(running.socket))
        running.socket.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(running.socket))
        other.listen()
        wait_for(lambda: "somebody listens there" in " ".join(running.daemon.notices()))
        running.stop()
        assert answers(running.socket)
    running.socket.unlink()


def bound(path: Path, *, listens: bool = True) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    if listens:
        sock.listen()
    return sock


def test_who_comes_while_a_socket_is_made_again_keeps_the_place(tmp_path: Path) -> None:
    path, places, opened = tmp_path / "mfsd.sock", Places(DaemonConfig()), contextlib.ExitStack()

    def slowly(where: Path) -> None:
        for here in (where, path):
            opened.enter_context(bound(here))

    with opened:
        places.make(path, lambda where: opened.enter_context(bound(where)))
        path.unlink()
        with pytest.raises(ServerError, match="exists"):
            places.make(path, slowly)
        theirs = path.stat().st_ino
        with pytest.raises(ServerError, match="somebody listens there"):
            places.make(path, slowly)
        assert path.stat().st_ino == theirs
        assert places.lost() == [path]
    path.unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("listens", [True, False])
def test_who_is_about_to_listen_there_has_time_for_it(tmp_path: Path, *, listens: bool) -> None:
    path, places = tmp_path / "mfsd.sock", Places(DaemonConfig())
    with contextlib.ExitStack() as opened:
        places.make(path, lambda where: opened.enter_context(bound(where)))
        path.unlink()
        other = opened.enter_context(bound(path, listens=False))
        theirs = path.stat().st_ino
        with pytest.raises(ServerError, match="nobody listens yet"):
            places.make(path, bound)
        if listens:
            other.listen()
            with pytest.raises(ServerError, match="somebody listens there"):
                places.make(path, bound)
            assert path.stat().st_ino == theirs
        else:  # what a daemon has left that was killed
            places.make(path, lambda where: opened.enter_context(bound(where)))
            assert answers(path)
            assert places.lost() == []


def test_what_the_daemon_has_noticed_is_a_finding(running: Running, tmp_path: Path) -> None:
    config = tmp_path / "mfsd.toml"
    config.write_text(f'[daemon]\nsocket = "{running.socket}"\nstate_dir = "{tmp_path}"\n')
    assert "state.notices:1" in findings(config)
    assert "no [[device]] is configured" in findings(config)["state.notices:1"]
    running.stop()
    assert not [name for name in findings(config) if name.startswith("state.notices")]


@pytest.mark.parametrize("name", ALL)
def test_who_may_use_a_socket_is_looked_at_again(running: Running, name: str) -> None:
    path = running.socket.parent / name
    before = path.stat().st_mode & 0o777

    def notices() -> str:
        answer = status(running.target)
        return "" if answer is None else " ".join(answer.notices)

    wait_for(notices)
    assert "who may use" not in notices()
    path.chmod(0o666)
    wait_for(lambda: f"somebody has changed who may use {path}: it is 0666" in notices())
    assert f"was {before:04o}" in notices()
    path.chmod(before)
    wait_for(lambda: "who may use" not in notices())
