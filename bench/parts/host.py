# SPDX-License-Identifier: Apache-2.0
"""Two namespaces, and a daemon as a process, alone or in one of them."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import psutil

from mfsd.client.introduction import introduced

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE: Final = "10.97.0.1"
"""Of the first namespace, whose device is v0."""
THERE: Final = "10.97.0.2"
"""Of the second, whose device is v1."""
START_S: Final = 30


@dataclass(frozen=True, slots=True)
class Daemon:
    """One that answers."""

    folder: Path
    target: str
    process: psutil.Process

    @property
    def cpu_s(self) -> float:
        """Seconds of processor that it has taken."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def ip(*words: str) -> None:
    """Run the ip command."""
    subprocess.run(["ip", *words], check=True)


@contextlib.contextmanager
def namespaces() -> Iterator[tuple[str, str]]:
    """Two, joined by a veth pair."""
    stem = f"mfsd-b-{secrets.token_hex(3)}"
    a, b = f"{stem}-a", f"{stem}-b"
    try:
        for name in (a, b):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", a, "link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", b)
        for name, device, address in ((a, "v0", HERE), (b, "v1", THERE)):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
        yield a, b
    finally:
        for name in (a, b):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def configure(folder: Path, keys: str = "", rate: str = "", devices: tuple[str, ...] = ("v0",)) -> list[str]:
    """Write a configuration, with ``keys`` in [daemon]; with a rate it enforces htb. Returns the daemon's command."""
    text = f'[daemon]\nsocket = "{folder}/mfsd.sock"\nstate_dir = "{folder}"\n{keys}\n'
    if rate:
        text += 'mode = "enforce"\n'
        text += "".join(f'[[device]]\nname = "{name}"\nbackend = "htb"\nrate = "{rate}"\n' for name in devices)
    (folder / "mfsd.toml").write_text(text)
    return [sys.executable, "-m", "mfsd.daemon", "--config", f"{folder}/mfsd.toml"]


@contextlib.contextmanager
def daemon(keys: str = "", namespace: str = "", rate: str = "") -> Iterator[Daemon]:
    """A daemon that answers; ended afterwards. Raises RuntimeError with its log when it does not come up."""
    with tempfile.TemporaryDirectory(prefix="mfsd-bench-", dir="/tmp") as name:
        folder = Path(name)
        enter = ["ip", "netns", "exec", namespace] if namespace else []
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([*enter, *configure(folder, keys, rate)], stdout=log, stderr=log)
        try:
            with introduced(f"unix:{folder}/mfsd.sock") as channel:
                try:
                    grpc.channel_ready_future(channel).result(timeout=START_S)
                except grpc.FutureTimeoutError:
                    raise RuntimeError(f"the daemon does not answer: {(folder / 'log').read_text()}") from None
            yield Daemon(folder, f"unix:{folder}/mfsd.sock", psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(timeout=30)
