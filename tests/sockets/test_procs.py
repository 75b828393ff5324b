# SPDX-License-Identifier: Apache-2.0
"""Processes that end, in all the ways they do."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mfsd.host import processes
from mfsd.host.processes import ProcessGoneError, ProcessWatch, alive, start_time

if TYPE_CHECKING:
    from collections.abc import Iterator


class Child:
    """A process that does nothing until it is told to end."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    @property
    def pid(self) -> int:
        return self.popen.pid

    def end(self, *, reap: bool = True) -> None:
        self.popen.kill()
        if reap:
            self.popen.wait()


@pytest.fixture
def child() -> Iterator[Child]:
    c = Child()
    yield c
    c.end()
    assert c.popen.stdin is not None
    c.popen.stdin.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_start_time_tells_processes_apart(child: Child) -> None:
    mine, its = start_time(os.getpid()), start_time(child.pid)
    assert mine <= its <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert alive(child.pid, its)
    assert not alive(child.pid, its - 1)


def test_names_do_not_confuse(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 (b"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE) as popen:
        assert alive(popen.pid, start_time(popen.pid))
        popen.communicate(b"\n")


def test_a_zombie_is_gone(child: Child) -> None:
    started = start_time(child.pid)
    child.end(reap=False)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{child.pid}").exists()
    assert not alive(child.pid, started)
    with pytest.raises(ProcessGoneError):
        start_time(child.pid)


async def _called(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), 20)


@pytest.mark.parametrize("pidfd", [True, False])
def test_every_watcher_is_called_once(child: Child, monkeypatch: pytest.MonkeyPatch, *, pidfd: bool) -> None:
    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSYS, f"no pidfd for {pid} {flags}")

    if not pidfd:
        monkeypatch.setattr(os, "pidfd_open", refuse)
        monkeypatch.setattr(processes, "_POLL_S", 0.01)

    async def main() -> None:
        before = descriptors()
        watch = ProcessWatch()
        calls: list[str] = []
        done = asyncio.Event()

        def broken() -> None:
            calls.append("broken")
            raise RuntimeError("a watcher that raises")

        errors: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(str(context["exception"])))
        watch.add(child.pid, broken)
        watch.add(child.pid, lambda: calls.append("one"))
        removed = watch.add(child.pid, lambda: calls.append("removed"))
        watch.add(os.getpid(), lambda: calls.append("this very process"))
        watch.add(child.pid, done.set)
        watch.remove(removed)
        watch.remove(removed)
        assert len(watch) == 2
        assert descriptors() == before + (2 if pidfd else 0)
        child.end(reap=False)
        await _called(done)
        await asyncio.sleep(0)
        assert calls == ["broken", "one"]
        assert errors == ["a watcher that raises"]
        assert len(watch) == 1
        with pytest.raises(ProcessGoneError):
            watch.add(child.pid, done.set)
        watch.close()
        watch.close()
        assert len(watch) == 0
        assert descriptors() == before

    asyncio.run(main())


def test_removing_the_last_watcher_frees_the_descriptor(child: Child) -> None:
    async def main() -> None:
        watch = ProcessWatch()
        before = descriptors()
        called: list[bool] = []
        handles = [watch.add(child.pid, lambda: called.append(True)) for _ in range(3)]
        assert descriptors() == before + 1
        for handle in handles:
            watch.remove(handle)
        assert descriptors() == before
        child.end()
        await asyncio.sleep(0.05)
        assert not called

    asyncio.run(main())


def test_a_thread_id_is_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client may well send its thread id; pidfd_open refuses it."""
    monkeypatch.setattr(processes, "_POLL_S", 0.01)
    go, ids = threading.Event(), []
    started = threading.Event()

    def run() -> None:
        ids.append(threading.get_native_id())
        started.set()
        go.wait(20)

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(20)

    async def main() -> None:
        watch = ProcessWatch()
        done = asyncio.Event()
        watch.add(ids[0], done.set)
        go.set()
        await _called(done)
        watch.close()

    asyncio.run(main())
    thread.join()


def test_a_reused_pid_ends_the_old_watch(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        watch = ProcessWatch()
        done, other = asyncio.Event(), asyncio.Event()
        watch.add(child.pid, done.set)
        real = start_time(child.pid)
        monkeypatch.setattr(processes, "start_time", lambda _: real + 1)
        watch.add(child.pid, other.set)
        await _called(done)
        assert not other.is_set()
        child.end()
        await _called(other)
        assert len(watch) == 0

    asyncio.run(main())


def test_no_such_process() -> None:
    async def main() -> None:
        watch = ProcessWatch()
        with pytest.raises(ProcessGoneError, match="no process"):
            watch.add(2**22 + 1, lambda: None)  # above PID_MAX_LIMIT
        assert len(watch) == 0

    asyncio.run(main())
