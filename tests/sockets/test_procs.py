# SPDX-License-Identifier: Apache-2.0
"""Processes that end, in all the ways they do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.waiting import wait_for

from mfsd.host.processes import Families, Numbers, ProcessGoneError, alive, start_time

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


FORKS = """
import os, sys, time
input()
for _ in range(int(sys.argv[1])):
    if os.fork():
        os._exit(0) if _ else os.wait()
        break
else:
    os.setsid()
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.root
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_a_descendant_whose_parents_have_gone_before_anybody_looked(depth: int) -> None:
    """As programs do that go into the background: forked, and forked again, and all between have ended."""
    families = Families()
    command = [sys.executable, "-c", FORKS, str(depth)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdin is not None
        assert popen.stdout is not None
        try:
            assert families.look([popen.pid]) == {popen.pid: frozenset()}
            popen.stdin.write("\n")
            popen.stdin.flush()
            last = int(popen.stdout.readline())
            wait_for(lambda: depth == 1 or Path(f"/proc/{last}/stat").read_text().split()[3] != str(popen.pid))
            time.sleep(0.05)
            assert last in families.look([popen.pid])[popen.pid]
            assert last in families.look([popen.pid])[popen.pid], "nor is it forgotten"
        finally:
            families.close()
            popen.kill()
            with contextlib.suppress(UnboundLocalError, ProcessLookupError):
                os.kill(last, signal.SIGKILL)


NUMBERS = """
import os, sys, time
child = os.fork()
if not child:
    print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.root
def test_numbers_of_a_pid_namespace() -> None:
    numbers, here = Numbers(), os.getpid()
    assert numbers.ours(here, here) == here
    assert numbers.ours(1, here) == 1
    assert numbers.ours(1, 0) == 1, "who is in none of ours counts as we do, as far as anybody knows"
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", NUMBERS]
    with contextlib.ExitStack() as stack:
        known = []
        for _ in range(2):
            popen = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(popen.kill)
            assert popen.stdout is not None
            assert popen.stdout.readline() == "2\n"
            ((first, (second,)),) = ((c, children(c)) for c in children(popen.pid))
            known.append((first, second))
        for first, second in known:
            assert [numbers.ours(n, first) for n in (1, 2)] == [first, second]
            assert [numbers.ours(n, second) for n in (1, 2)] == [first, second]
            assert numbers.ours(here, first) == here, "nobody there is called so"


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
