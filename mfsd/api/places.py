# SPDX-License-Identifier: Apache-2.0
"""Where the daemon's unix sockets are in the file system: made, looked for, made again, removed."""

from __future__ import annotations

import contextlib
import grp
import os
import socket
import stat
import zlib
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Key = Literal["socket_group", "operator_group"]


class ServerError(RuntimeError):
    """An endpoint can't be opened."""


class Groups(Protocol):
    """Keys of the configuration's section [daemon]."""

    @property
    def socket_group(self) -> str | None:
        """Group that may use the sockets for all; None: the daemon's own."""
        ...

    @property
    def operator_group(self) -> str | None:
        """Group that may use those for operators; None: nobody else."""
        ...


def aside(path: Path) -> Path:
    """Where a socket is made that is to take another one's place: beside it, by a name that is no longer."""
    return path.with_name(f".{zlib.crc32(path.name.encode()) & 0xFFF:03x}")


class Places:
    """The sockets of one daemon."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self._made: dict[Path, int] = {}
        """Sockets of ours and their inodes: somebody may put another one in the place of one."""
        self._rights: dict[Path, str] = {}
        """Who may use them, as they were made."""
        self._silent: dict[Path, int] = {}
        """Inodes of sockets in the places of ours at which nobody listened when it was last looked."""

    def make(self, path: Path, bind: Callable[[Path], object], key: Key = "socket_group") -> None:
        """Make a socket with ``bind``, which is told where. Raises ServerError.

        One that was ours is made aside and takes the place then: gRPC removes what it finds by the name that it has
        bound, when that server ends. It takes nobody else's place, who may have come at any moment.
        """
        again = path in self._made
        where = aside(path) if again else path
        try:
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if again:
                self._make_way(path)
            _remove_stale(where)
            # Nobody else may connect before the group is set.
            before = os.umask(0o177)
            try:
                bind(where)
            finally:
                os.umask(before)
            inode = where.lstat().st_ino
            group: str | None = getattr(self._groups, key)
            _set_group(where, key, group)
            where.chmod(0o660 if group is not None or key == "socket_group" else 0o600)
            if again:
                try:
                    os.link(where, path)  # unlike a rename it fails if there is something by now
                finally:
                    where.unlink()
            self._made[path], self._rights[path] = inode, _rights(path)
        except (OSError, RuntimeError) as e:
            raise ServerError(f'daemon.socket = "{path}": {e}') from e

    def _make_way(self, path: Path) -> None:
        """Remove a stale socket from the place of ours; not at first sight, as its owner may be about to listen."""
        silent = _silent(path)
        if silent is not None and self._silent.get(path) != silent:
            self._silent[path] = silent
            raise FileExistsError("somebody has put a socket there at which nobody listens yet")
        self._silent.pop(path, None)
        _remove_stale(path)

    def lost(self) -> list[Path]:
        """Those in whose place there is nothing of ours any more."""
        return [path for path in self._made if not self._ours(path)]

    def opened(self) -> list[str]:
        """Which of them others may use than was configured, or fewer, as somebody has changed it since."""
        out = []
        for path, before in self._rights.items():
            with contextlib.suppress(OSError):  # it is lost, which is told elsewhere
                now = _rights(path)
                if now != before and self._ours(path):
                    out.append(f"somebody has changed who may use {path}: it is {now}, was {before} as configured")
        return out

    def _ours(self, path: Path) -> bool:
        try:
            return path.lstat().st_ino == self._made[path]
        except OSError:
            return False

    @contextlib.contextmanager
    def of_others_kept(self) -> Iterator[None]:
        """What is not ours is aside for a moment, in which gRPC removes whatever socket is there."""
        # Not where sockets are made: gRPC removes those names, too.
        moved = {path: path.with_name(f".{path.name}.kept") for path in self.lost() if path.exists()}
        for path, kept in moved.items():
            with contextlib.suppress(OSError):
                path.replace(kept)
        try:
            yield
        finally:
            for path, kept in moved.items():
                with contextlib.suppress(OSError):
                    kept.replace(path)

    def clear(self) -> None:
        """Remove what is ours."""
        for path in self._made:
            with contextlib.suppress(OSError):
                if self._ours(path):
                    path.unlink()


def _rights(path: Path) -> str:
    """Mode, owner and group. Raises OSError."""
    found = path.lstat()
    return f"{stat.S_IMODE(found.st_mode):04o} {found.st_uid}:{found.st_gid}"


def _set_group(path: Path, key: str, name: str | None) -> None:
    """``key``: of the configuration, which has the name."""
    if name is None:
        return
    try:
        gid = grp.getgrnam(name).gr_gid
    except KeyError:
        raise ServerError(f'daemon.{key} = "{name}": there is no such group on this host') from None
    try:
        os.chown(path, -1, gid)
    except PermissionError as e:
        raise ServerError(
            f'daemon.{key} = "{name}": mfsd may not give its socket to this group; make its user a member '
            "(SupplementaryGroups= in the unit)"
        ) from e


def _remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that was killed. The caller's lock is on a directory, of which others have others.

    Raises FileExistsError where somebody listens, or there is no socket.
    """
    if _silent(path) is not None:
        path.unlink()


def _silent(path: Path) -> int | None:
    """Inode of a socket at which nobody listens; None: there is nothing. Raises FileExistsError as above."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError("there is a file of this name that is no socket; remove it or choose another name")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return found.st_ino
        except BlockingIOError:  # it listens, and has much to do
            pass
    raise FileExistsError("somebody listens there: another mfsd? Stop it, or choose another name")
