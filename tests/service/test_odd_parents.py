# SPDX-License-Identifier: Apache-2.0
"""A daemon that was started oddly: nobody reads its log, descriptors or threads are few, signals are blocked."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.waiting import WAIT_S, wait_for

from mfsd.client.introduction import introduced
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.daemon


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    return tmp_path / "mfsd.sock"


@pytest.fixture
def start(tmp_path: Path, socket_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a daemon with these arguments for Popen; it is gone afterwards."""
    config, log = tmp_path / "mfsd.toml", tmp_path / "log"
    config.write_text(f'[daemon]\nsocket = "{socket_path}"\nstate_dir = "{tmp_path}"\nlog_level = "debug"\n')
    command = [sys.executable, "-m", "mfsd.daemon", "--config", str(config)]
    with contextlib.ExitStack() as stack:

        def started(environment: dict[str, str] | None = None, **more: object) -> subprocess.Popen[bytes]:
            with log.open("ab") as file:
                values = {"stdout": file, "stderr": file, "env": os.environ | (environment or {})} | more
                process: subprocess.Popen[bytes] = subprocess.Popen(command, **values)  # type: ignore[call-overload]
            stack.callback(process.wait)
            stack.callback(process.kill)
            wait_for(lambda: socket_path.exists() or process.poll() is not None, "its socket")
            assert process.poll() is None, log.read_text()
            return process

        yield started


def status(path: Path) -> pb.Status:
    with introduced(f"unix:{path}") as channel:
        answer: pb.Status = control_pb2_grpc.ControlStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5)
    return answer


def ended(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(WAIT_S)


def test_whoever_does_not_read_the_log_holds_up_nobody(
    start: Callable[..., subprocess.Popen[bytes]], socket_path: Path
) -> None:
    mine, its = os.pipe()
    try:
        size = fcntl.fcntl(its, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(its, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(its, bytes(size))
                size = max(size // 2, 1)
        os.set_blocking(its, True)
        process = start(stderr=its)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: bool(status(socket_path).version), "an answer")
        assert ended(process) == 0
    finally:
        os.close(mine)
        os.close(its)


def test_standard_descriptors_that_are_closed(start: Callable[..., subprocess.Popen[bytes]], socket_path: Path) -> None:
    process = start(preexec_fn=lambda: os.closerange(0, 3))
    assert status(socket_path).version
    assert [os.readlink(f"/proc/{process.pid}/fd/{fd}") for fd in range(3)] == ["/dev/null"] * 3  # noqa: PTH115
    assert ended(process) == 0


def test_signals_that_whoever_started_it_has_blocked(
    start: Callable[..., subprocess.Popen[bytes]], socket_path: Path
) -> None:
    every = set(signal.Signals)
    process = start(preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, every))
    assert status(socket_path).version
    assert ended(process) == 0


@pytest.mark.parametrize("count", ["", "x", "-1", "1.5", "\u0663", "9" * 30])
def test_counts_of_a_service_manager_that_are_none(
    start: Callable[..., subprocess.Popen[bytes]], socket_path: Path, count: str
) -> None:
    # `exec` keeps the pid, which LISTEN_PID must name.
    code = 'export LISTEN_PID=$$; exec "$@"'
    process = start({"WATCHDOG_USEC": count, "LISTEN_FDS": count, "LISTEN_FDNAMES": "mfsd_host"})
    assert status(socket_path).version
    assert ended(process) == 0
    done = subprocess.run(
        ["sh", "-c", code, "-", sys.executable, "-m", "mfsd.daemon", "--check-config"],
        env=os.environ | {"WATCHDOG_USEC": count, "LISTEN_FDS": count, "LISTEN_FDNAMES": "mfsd_host:a"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_as_many_descriptors_as_may_be(start: Callable[..., subprocess.Popen[bytes]]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    process = start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, min(hard, 512))))
    assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] == min(hard, 512)
    assert ended(process) == 0


@pytest.mark.parametrize(
    ("limit", "count", "words"),
    [
        ("nofile", 8, "8 open files, and needs 64"),
        ("nofile", 12, "12 open files, and needs 64"),
        ("nofile", 20, "20 open files, and needs 64"),
        ("nofile", 63, "63 open files, and needs 64"),
        ("data", 200_000_000, "200000000 bytes of data, and needs 419430400"),
        ("as", 600_000_000, "600000000 bytes of address space, and needs 1073741824"),
    ],
)
def test_too_low_limits_are_named(tmp_path: Path, limit: str, count: int, words: str) -> None:
    config = tmp_path / "mfsd.toml"
    config.write_text(f'[daemon]\nsocket = "{tmp_path}/s"\nstate_dir = "{tmp_path}"\n')
    done = subprocess.run(
        # By a program of its own: what this process has of gRPC would complain of the limit between fork and exec.
        ["prlimit", f"--{limit}={count}", sys.executable, "-m", "mfsd.daemon", "--config", str(config)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"mfsd: can't start: it may have {words} at least: allow it more (Limit")


@pytest.mark.root
@pytest.mark.parametrize(
    "parent",
    [
        ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"],
        ["unshare", "--pid", "--fork"],
    ],
    ids=["no /proc", "that of another pid namespace"],
)
def test_proc_that_does_not_know_it_is_named(tmp_path: Path, parent: list[str]) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to hide processes")
    config = tmp_path / "mfsd.toml"
    config.write_text(f'[daemon]\nsocket = "{tmp_path}/s"\nstate_dir = "{tmp_path}"\n')
    command = [*parent, sys.executable, "-m", "mfsd.daemon", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=WAIT_S)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mfsd: can't start: /proc is not there, or that of another pid namespace")
    assert len(done.stderr.splitlines()) == 1
    assert subprocess.run([*command, "--check-config"], capture_output=True, check=False).returncode == 0


@pytest.mark.root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_process_of_a_container_is_told_to_end_while_it_starts(
    tmp_path: Path, number: signal.Signals
) -> None:
    """It never sees a signal for which it has no handler; here it waits for its configuration."""
    if os.geteuid() != 0:
        pytest.skip("needs root for a pid namespace")
    config = tmp_path / "mfsd.toml"
    os.mkfifo(config)
    first = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    with subprocess.Popen([*first, sys.executable, "-m", "mfsd.daemon", "--config", str(config)]) as process:
        try:
            end = wait_for(lambda: _opened(config), "its configuration to be read")
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            os.kill(int(children.read_text()), number)
            assert process.wait(WAIT_S) == 128 + number
            os.close(end)
        finally:
            process.kill()


def _opened(pipe: Path) -> int | None:
    """Where to write to it; None: nobody reads yet."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


NO_THREADS = """
import os, resource, signal, sys
from pathlib import Path
from prometheus_client import CollectorRegistry
from mfsd.api.places import Places
from mfsd.daemon.config import DaemonConfig, MetricsConfig
from mfsd.daemon.exposition import Exposition
from mfsd.daemon.main import workers
os.setgid(65534), os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
signal.alarm(30)
metrics = Exposition(MetricsConfig(), Path(sys.argv[1]), CollectorRegistry())
for begin in (workers, lambda: metrics.start(Places(DaemonConfig()))):
    try:
        begin()
    except RuntimeError as e:
        print(e)
metrics.close()
print("over")
"""


@pytest.mark.root
def test_where_no_thread_can_be_had_nothing_is_waited_for(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o777)
    done = subprocess.run(
        [sys.executable, "-c", NO_THREADS, str(tmp_path / "s")], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["can't start new thread"] * 2 + ["over"], done.stderr
