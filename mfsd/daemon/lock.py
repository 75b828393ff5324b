# SPDX-License-Identifier: Apache-2.0
"""One daemon for each state directory."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import IO, TYPE_CHECKING

import structlog

from mfsd.daemon import config as configuration

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger(__name__)


class StartError(RuntimeError):
    """The daemon can't start; the text says why and what to do."""


def lock(state_dir: Path) -> IO[str]:
    """Be the only daemon of a state directory. Raises StartError."""
    path = state_dir / configuration.LOCK
    try:
        state_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
        file = open(path, "r+", encoding="ascii", errors="replace", opener=_opened)  # noqa: SIM115 - an opener
    except FileExistsError as e:
        raise StartError(f'daemon.state_dir = "{state_dir}": it is no directory; choose another name') from e
    except OSError as e:
        raise StartError(f'daemon.state_dir = "{state_dir}": {e}') from e
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        pid = file.read(20).strip() or "unknown"
        file.close()
        raise StartError(
            f"another mfsd (pid {pid}) uses {state_dir}; stop it, or give this one its own daemon.state_dir and socket"
        ) from None
    except OSError as e:
        file.close()
        raise StartError(f'daemon.state_dir = "{state_dir}": {path.name} can\'t be locked: {e}') from e
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"{os.getpid()}\n".encode())
    except OSError as e:  # the lock holds all the same: a full disk only keeps others from reading whose it is
        log.warning("lock", file=str(path), problem=str(e))
    return file


def _opened(path: str, _flags: int) -> int:
    """What is written into the file goes nowhere else. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file; remove it", path)
    return fd
