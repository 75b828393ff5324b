# SPDX-License-Identifier: Apache-2.0
"""One daemon for each state directory."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from typing import IO, TYPE_CHECKING, Final

import structlog

from mfsd.daemon import config as configuration

if TYPE_CHECKING:
    from pathlib import Path

TRIES: Final = 10
LOOK_S: Final = 0.02
"""Between two of them: mfsctl holds a lock for a moment to see whether a daemon has it."""

log = structlog.get_logger(__name__)


class StartError(RuntimeError):
    """The daemon can't start; the text says why and what to do."""


class Lock:
    """A state directory that nobody else may use."""

    def __init__(self, file: IO[str], folder: int) -> None:
        self._file, self._folder = file, folder

    def close(self) -> None:
        """Let others have it."""
        self._file.close()
        os.close(self._folder)


def lock(state_dir: Path) -> Lock:
    """Be the only daemon of a state directory. Raises StartError.

    The file says whose it is, and can be deleted; so the directory is locked, too.
    """
    path = state_dir / configuration.LOCK
    with contextlib.ExitStack() as undo:
        try:
            state_dir.mkdir(mode=0o755, parents=True, exist_ok=True)
            file = open(path, "r+", encoding="ascii", errors="replace", opener=_opened)  # noqa: SIM115 - an opener
            undo.callback(file.close)
            folder = os.open(state_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, folder)
        except FileExistsError as e:
            raise StartError(f'daemon.state_dir = "{state_dir}": it is no directory; choose another name') from e
        except OSError as e:
            raise StartError(f'daemon.state_dir = "{state_dir}": {e}') from e
        try:
            _take(file.fileno())
            _take_too(folder)
        except BlockingIOError:
            file.seek(0)
            pid = file.read(20).strip() or "unknown"
            raise StartError(
                f"another mfsd (pid {pid}) uses {state_dir}; stop it, or give this one its own daemon.state_dir and "
                "socket"
            ) from None
        except OSError as e:
            raise StartError(f'daemon.state_dir = "{state_dir}": {path.name} can\'t be locked: {e}') from e
        try:
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        except OSError as e:  # the lock holds all the same: a full disk only keeps others from reading whose it is
            log.warning("lock", file=str(path), problem=str(e))
        undo.pop_all()
    return Lock(file, folder)


def _take(fd: int) -> None:
    """Lock it. Raises BlockingIOError where another one has it, OSError where that can't be."""
    for _ in range(TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOOK_S)
        else:
            return
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _take_too(folder: int) -> None:
    """Lock a directory, where directories can be (not on NFS). Raises BlockingIOError."""
    try:
        _take(folder)
    except BlockingIOError:
        raise
    except OSError as e:
        log.info("lock", problem=f"the directory can't be locked, its file is: {e}")


def _opened(path: str, _flags: int) -> int:
    """What is written into the file goes nowhere else. Raises OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file; remove it", path)
    return fd
