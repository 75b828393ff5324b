# SPDX-License-Identifier: Apache-2.0
"""What an experiment ran on: figures without it can't be compared."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import mfsd
from mfsd.lab.hosts.governor import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

NICE: Final = -10
"""Of everything that a lab runs, so that the machine's other work disturbs less; both arms of a comparison have it."""


def take_precedence() -> None:
    """Give this process, and those that it starts from now on, precedence over the machine's other work."""
    os.setpriority(os.PRIO_PROCESS, 0, NICE)


@contextlib.contextmanager
def real_time() -> Iterator[None]:
    """Let the calling thread run whenever it wants to (SCHED_RR), for emulated hardware that keeps time by itself.

    Threads that it starts meanwhile would inherit this. Where it is not allowed nothing changes; health.py notices.
    """
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as ^C does, so that what it has made is removed."""
    signal.signal(signal.SIGTERM, _interrupted)


def _interrupted(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


def commit() -> str:
    """Commit of the tree, with "-dirty" if tracked files were changed; the version where there is no repository."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        return mfsd.__version__

    def ask(*args: str) -> str:
        return subprocess.run([git, "-C", str(ROOT), *args], check=True, capture_output=True, text=True).stdout.strip()

    try:
        return ask("rev-parse", "HEAD") + ("-dirty" if ask("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, cores, kernel, Python."""
    cpu = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {"cpu": cpu, "cores": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version()}
