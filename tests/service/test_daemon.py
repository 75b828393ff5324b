# SPDX-License-Identifier: Apache-2.0
"""The daemon as a process, without devices: command line, signals, lock, socket, notes to systemd."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.waiting import WAIT_S, wait_for

from mfsd.client import Client
from mfsd.client.introduction import introduced
from mfsd.daemon.config import Config, parse, render
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.daemon

COMMAND = [sys.executable, "-m", "mfsd.daemon"]


def mfsd(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        check=False,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=os.environ | environment,
    )


@dataclass
class Process:
    """A daemon that runs with ``config``."""

    popen: subprocess.Popen[str]
    config: Path
    path: Path
    """Of its socket."""
    notes: socket.socket

    def status(self) -> pb.Status:
        with introduced(f"unix:{self.path}") as channel:
            return control_pb2_grpc.ControlStub(channel).GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)

    def next_note(self) -> str:
        """What it told systemd, one datagram."""
        return self.notes.recv(4096).decode()

    def note_with(self, text: str) -> str:
        while text not in (note := self.next_note()):
            pass
        return note

    def end(self, number: signal.Signals = signal.SIGTERM) -> tuple[int, str]:
        """Signal it and wait; exit code and log."""
        self.popen.send_signal(number)
        log = self.popen.communicate(timeout=WAIT_S)[1]
        return self.popen.returncode, log


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mfsd.toml"
    path.write_text(f'[daemon]\nsocket = "{tmp_path}/run/mfsd.sock"\nstate_dir = "{tmp_path}/run"\n')
    return path


@pytest.fixture
def spawn(tmp_path: Path, config: Path) -> Iterator[Callable[[], Process]]:
    """Starts daemons; waits until each is ready."""
    with contextlib.ExitStack() as stack:
        notes = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        notes.bind(str(tmp_path / "notify"))
        notes.settimeout(WAIT_S)

        def make() -> Process:
            environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "60000000"}
            popen = subprocess.Popen(
                [*COMMAND, "--config", str(config)], stderr=subprocess.PIPE, text=True, env=environment
            )
            stack.callback(_gone, popen)
            process = Process(popen, config, tmp_path / "run" / "mfsd.sock", notes)
            process.note_with("READY=1")
            return process

        yield make


def _gone(popen: subprocess.Popen[str]) -> None:
    if popen.poll() is None:
        popen.kill()
        popen.wait()
    if popen.stderr is not None:
        popen.stderr.close()


# --- command line -----------------------------------------------------------------------------------------------------


def test_check_config_prints_the_resolved_view(config: Path) -> None:
    done = mfsd("--check-config", "--config", config)
    assert (done.returncode, done.stderr) == (0, "")
    assert "slots = 16384  # default" in done.stdout
    assert f'socket = "{config.parent}/run/mfsd.sock"\n' in done.stdout
    with open("/dev/full", "w") as full:  # noqa: PTH123 - no path is needed
        command = [*COMMAND, "--check-config", "--config", str(config)]
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "mfsd: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("more", [["--check-config"], []])
def test_a_faulty_config_is_78_and_every_problem(config: Path, more: list[str]) -> None:
    config.write_text("[daemon]\nslots = 1\nmode = 3\n[zoo]\n")
    done = mfsd("--config", config, *more)
    assert done.returncode == 78
    assert [line.partition(": ")[2].partition(" = ")[0] for line in done.stderr.splitlines()] == [
        "daemon.mode",
        "daemon.slots",
        "zoo",
    ]


def test_a_missing_config_is_78(tmp_path: Path) -> None:
    done = mfsd("--config", tmp_path / "none.toml")
    assert done.returncode == 78
    assert "can't be read: No such file or directory" in done.stderr


def test_version_and_usage() -> None:
    assert mfsd("--version").stdout.startswith("mfsd 0.")
    assert mfsd("--nonsense").returncode == 2


# --- life -------------------------------------------------------------------------------------------------------------


def test_life_from_ready_to_stopped(spawn: Callable[[], Process]) -> None:
    process = spawn()
    assert process.status().mode == pb.MODE_OBSERVE
    mode = process.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o660
    process.note_with("WATCHDOG=1")
    code, log = process.end()
    assert code == 0, log
    assert "stopped" in log
    assert not process.path.exists()
    process.note_with("STOPPING=1")


def test_a_manager_that_does_not_read_stops_nobody(spawn: Callable[[], Process]) -> None:
    process = spawn()
    for _ in range(20):
        process.popen.send_signal(signal.SIGHUP)  # three notes each; a datagram queue takes about ten
        assert process.status().version
    wait_for(lambda: process.status().uptime_s > 2.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_other_ends(spawn: Callable[[], Process], number: signal.Signals) -> None:
    code, log = spawn().end(number)
    assert code == 0, log
    assert ("qdiscs=kept" in log) == (number is signal.SIGUSR1)


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGTERM])
def test_who_is_told_to_end_and_to_hand_over_puts_things_back(
    spawn: Callable[[], Process], first: signal.Signals
) -> None:
    """Whichever comes first: nobody may come to whom they could be handed."""
    process = spawn()
    process.popen.send_signal(first)
    code, log = process.end(signal.SIGTERM if first is signal.SIGUSR1 else signal.SIGUSR1)
    assert code == 0, log
    assert "qdiscs=restored" in log


def test_a_second_instance_is_refused(spawn: Callable[[], Process], config: Path) -> None:
    first = spawn()
    done = mfsd("--config", config)
    assert done.returncode == 1
    assert f"another mfsd (pid {first.popen.pid})" in done.stderr
    assert first.status().version


def test_a_killed_daemon_leaves_nothing_in_the_way(spawn: Callable[[], Process]) -> None:
    first = spawn()
    first.popen.kill()
    first.popen.wait()
    assert first.path.exists()
    assert spawn().status().version


def test_a_file_in_the_place_of_the_socket_is_left_alone(config: Path) -> None:
    path = config.parent / "run" / "mfsd.sock"
    path.parent.mkdir()
    path.write_text("precious")
    done = mfsd("--config", config)
    assert done.returncode == 1
    assert "no socket; remove it or choose another name" in done.stderr
    assert path.read_text() == "precious"


@pytest.mark.root
def test_the_socket_may_belong_to_a_group(spawn: Callable[[], Process], config: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give a socket to any group")
    group = next(g for g in grp.getgrall() if g.gr_gid not in (0, os.getegid()))
    config.write_text(config.read_text() + f'socket_group = "{group.gr_name}"\n')
    assert spawn().path.stat().st_gid == group.gr_gid


def test_an_unknown_group_is_named(config: Path) -> None:
    config.write_text(config.read_text() + 'socket_group = "no-such-group"\n')
    done = mfsd("--config", config)
    assert done.returncode == 1
    assert "there is no such group on this host" in done.stderr


def test_tcp_where_it_is_configured(spawn: Callable[[], Process], config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config.write_text(config.read_text() + f'listen = "127.0.0.1:{port}"\n')
    process = spawn()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (
            health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status
            == health_pb2.HealthCheckResponse.SERVING
        )
        with pytest.raises(grpc.RpcError) as e:  # nobody can tell who that is
            control_pb2_grpc.ControlStub(channel).GetStatus(pb.GetStatusRequest(), timeout=WAIT_S)
    assert e.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert process.status().devices == []


def test_a_taken_port_is_named(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config.write_text(config.read_text() + f'listen = "127.0.0.1:{port}"\n')
        done = mfsd("--config", config)
    assert done.returncode == 1
    assert f"daemon.listen = '127.0.0.1:{port}': can't be opened" in done.stderr


def test_json_logs(spawn: Callable[[], Process], config: Path) -> None:
    config.write_text(config.read_text() + 'log_format = "json"\n')
    _, log = spawn().end()
    events = [json.loads(line) for line in log.splitlines()]
    assert [e["event"] for e in events][-1] == "stopped"
    assert {"timestamp", "level", "logger"} <= set(events[0])


# --- reload -----------------------------------------------------------------------------------------------------------


def test_reload_changes_what_can_change_and_names_the_rest(spawn: Callable[[], Process], config: Path) -> None:
    process = spawn()
    with Client(target=f"unix:{process.path}") as client:
        client.request("r", ttft_left_s=60.0)
        assert client.flush(WAIT_S)
        config.write_text(
            config.read_text()
            + 'mode = "enforce"\nslots = 32\n[policy]\ngive_up = 0.1\n[limits]\nmax_requests_per_session = 1\n'
            + '[bands]\ndscp = { "level 0" = 46 }\nlanes = 4\n[[peer]]\nnetwork = "10.0.0.0/8"\nrate = "1gbit"\n'
        )
        process.popen.send_signal(signal.SIGHUP)
        note = process.note_with("RELOADING=1")
        assert "MONOTONIC_USEC=" in note
        process.note_with("READY=1")
        status = process.status()
        assert status.mode == pb.MODE_ENFORCE
        assert status.requests == 1
        assert set(status.notices) >= {
            "daemon.slots: changed in the file, takes effect at the next restart",
            "bands.lanes: changed in the file, takes effect at the next restart",
            "peer: changed in the file, takes effect at the next restart",
        }
        assert not any("give_up" in n or "max_requests" in n or "dscp" in n for n in status.notices)
        client.request("r2", ttft_left_s=60.0)  # one too many by now
        assert client.flush(WAIT_S)
        assert client.stats.rejected == 1


def test_a_policy_that_needs_other_bands_waits_for_a_restart(spawn: Callable[[], Process], config: Path) -> None:
    process = spawn()
    config.write_text(config.read_text() + '[policy]\nname = "two-class"\n')
    process.popen.send_signal(signal.SIGHUP)
    process.note_with("RELOADING=1")
    process.note_with("READY=1")
    status = process.status()
    assert status.policy == "demand-bound"
    assert list(status.notices)[-1] == "policy.name: changed in the file, takes effect at the next restart"


def test_a_faulty_file_changes_nothing(spawn: Callable[[], Process], config: Path) -> None:
    process = spawn()
    good = config.read_text()
    config.write_text(good + 'mode = "enforce"\ntick_ms = "often"\n')
    process.popen.send_signal(signal.SIGHUP)
    process.note_with("RELOADING=1")
    process.note_with("READY=1")
    status = process.status()
    assert status.mode == pb.MODE_OBSERVE
    assert list(status.notices)[-1] == (
        f'reload refused, nothing changed: {config}: daemon.tick_ms = "often": must be a number from 1, at most 1000'
    )
    config.write_text(good)
    process.popen.send_signal(signal.SIGHUP)
    wait_for(lambda: len(process.status().notices) == 1)


def test_the_rendered_view_starts_the_same_daemon(config: Path) -> None:
    assert parse({}) == Config()
    config.write_text(render(parse({"daemon": {"socket": str(config.parent / "x.sock")}})))
    assert mfsd("--check-config", "--config", config).returncode == 0


def test_a_file_that_is_cut_off_is_not_taken_for_one_that_wants_nothing(
    spawn: Callable[[], Process], config: Path
) -> None:
    """An editor, or a full disk, may leave it empty, or without its end."""
    process, whole = spawn(), config.read_text()

    def reloaded(text: str) -> pb.Status:
        config.write_text(text)
        process.popen.send_signal(signal.SIGHUP)
        process.note_with("RELOADING=1")
        process.note_with("READY=1")
        return process.status()

    assert reloaded(f'{whole}mode = "enforce"\n').mode == pb.MODE_ENFORCE
    for nothing in ("", "# empty\n"):
        status = reloaded(nothing)
        assert status.mode == pb.MODE_ENFORCE
        assert any("reload refused" in n and "says nothing" in n for n in status.notices)
    status = reloaded(whole)
    assert status.mode == pb.MODE_OBSERVE
    assert any("observe now, was enforce" in n and "cut off" in n for n in status.notices)
    status = reloaded(f'{whole}mode = "observe"\n')
    assert not any("observe now" in n for n in status.notices)
