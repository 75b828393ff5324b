# SPDX-License-Identifier: Apache-2.0
"""A real mfsd process in a host of the lab, with a configuration, socket and state directory of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import grpc
import psutil

from mfsd.client.introduction import introduced
from mfsd.daemon import config as configuration
from mfsd.lab.hosts.net import DEVICE, Host, LabError
from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import control_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from mfsd.ground.units import Rate

START_S: Final = 15.0
UNIT_NICE: Final = -5
"""Of the daemon over workers, by its unit (systemd/mfsd.service)."""
STOP_S: Final = 10.0
CHANNEL: Final = [
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 100),
]
"""The socket appears while we wait for it."""
ROOT: Final = Path(__file__).resolve().parents[3]
"""What must be on the path for ``python -m mfsd...``."""


def python(module: str) -> list[str]:
    """Command line of a module of this project, in this interpreter."""
    return [sys.executable, "-m", module]


def environment() -> dict[str, str]:
    """As ours, but with this project on the module path."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path}


def added_up(counters: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counters of several hosts, name by name."""
    out: Counter[str] = Counter()
    for one in counters:
        out.update(one)
    return dict(out)


class Governor:
    """mfsd in enforce mode on a host's eth0. A context manager: entering waits until it governs, leaving ends it.

    ``directory`` holds its files and must be short enough for a socket path. ``tables`` are those of its configuration
    file that differ from the defaults; ``device`` is added to what its device's says. Raises LabError with the end of
    its log when it does not come up.
    """

    def __init__(
        self,
        host: Host,
        directory: Path,
        rate: Rate,
        tables: Mapping[str, Any] | None = None,
        device: Mapping[str, Any] | None = None,
        nice: int = 0,
    ) -> None:
        """``nice``: added to that of the calling process."""
        self.host = host
        self._nice = nice
        self.directory = directory / host.name
        self.target = f"unix:{self.directory}/s"
        self.log = self.directory / "log"
        own = {"socket": f"{self.directory}/s", "state_dir": str(self.directory), "mode": "enforce"}
        tables = tables or {}
        self._config = configuration.parse(
            {
                **tables,
                "daemon": {**own, **tables.get("daemon", {})},
                "device": [{"name": DEVICE, "backend": "htb", "rate": str(rate), **(device or {})}],
            }
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: grpc.Channel | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.launch()
        self.ready()
        return self

    def launch(self) -> None:
        """Start the process without waiting for it: several can come up at the same time. ``ready`` must follow."""
        self.directory.mkdir(parents=True, exist_ok=True)
        config = self.directory / "mfsd.toml"
        config.write_text(configuration.render(self._config), encoding="utf-8")
        enter = [*python("mfsd.lab.hosts.enter"), self.host.namespace, str(os.getpid())]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*enter, *python("mfsd.daemon"), "--config", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(),
            )
        if self._nice:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, os.getpriority(os.PRIO_PROCESS, 0) + self._nice)
        self._channel = self._open.enter_context(introduced(self.target, CHANNEL))

    def ready(self) -> None:
        """Wait until it governs. Raises LabError."""
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _wait(self) -> None:
        until = time.monotonic() + START_S
        problem = "it does not answer"
        while time.monotonic() < until:
            assert self._process is not None  # noqa: S101 - for the type checker
            if self._process.poll() is not None:
                problem = f"it ended with status {self._process.returncode}"
                break
            try:
                status = self.status()
            except grpc.RpcError:
                time.sleep(0.05)
                continue
            if status.mode == pb.MODE_ENFORCE and status.devices and status.devices[0].backend == "htb":
                return
            problem = f"it does not enforce: {'; '.join(status.notices)}"
            time.sleep(0.05)
        log = self.log.read_text(encoding="utf-8", errors="replace")
        raise LabError(f"mfsd in {self.host.name}: {problem}; the end of its log:\n{log[-2000:]}")

    @property
    def control(self) -> control_pb2_grpc.ControlStub:
        """For what operators ask."""
        assert self._channel is not None  # noqa: S101 - for the type checker
        return control_pb2_grpc.ControlStub(self._channel)

    def status(self) -> pb.Status:
        """As ``mfsctl status`` shows it. Raises grpc.RpcError."""
        status: pb.Status = self.control.GetStatus(pb.GetStatusRequest(), timeout=2.0)
        return status

    def counters(self) -> dict[str, int]:
        """The daemon's own counters since it started. Raises grpc.RpcError."""
        counters = self.status().counters
        return {field.name: int(getattr(counters, field.name)) for field in counters.DESCRIPTOR.fields}

    def cpu_seconds(self) -> float:
        """User and system time since it started."""
        assert self._process is not None  # noqa: S101 - for the type checker
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def kill(self) -> None:
        """End it by SIGKILL: what it made stays as it is. ``launch`` starts the next one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        self._channel = None
        self._open.close()

    def finish(self) -> None:
        """Tell it to end, as systemd would, without waiting. ``stop`` must follow."""
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """End it as systemd would; it puts the qdiscs back. Idempotent."""
        self._channel = None
        self._open.close()
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
