# SPDX-License-Identifier: Apache-2.0
"""The note that outlives a daemon: whose the tree on a device is, and what was there before.

One JSON file per device in the state directory, written before the first change and removed after the last. It names
its owner by pid and start time, so that a reused pid is not taken for a live daemon, and the device by its index, the
network namespace and the boot, so that no other one is taken for it, whatever it is called. The name in the file's name
is for people.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mfsd.datapath.errors import EnforceError
from mfsd.datapath.owner import Owner
from mfsd.datapath.undo.snapshot import Snapshot, whole

if TYPE_CHECKING:
    from mfsd.datapath.tc import TcSocket

__all__ = ["Namespace", "Owner", "State", "Unreadable", "every", "find", "forget", "forget_others", "kept", "save"]

_VERSION: Final = 2
_VERSIONS: Final = (1, 2)
"""That can be read. The first had no boot and no cookie, and the files were named by the device alone."""
_NAME: Final = re.compile(r"qdisc-(?P<device>.+?)(?:\.(?P<ifindex>[0-9]+)\.(?P<inode>[0-9]+))?\.json")
_LARGEST: Final = 64 << 20
"""Bytes; a hundred thousand classes take half of it."""
_INT_MAX: Final = 0x7FFFFFFF


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace of one boot."""

    inode: int
    """Used again for another one when it is gone."""
    cookie: int = 0
    """Never used again; 0 where the kernel tells none."""
    boot: str = ""

    @classmethod
    def of(cls, sock: TcSocket) -> Namespace:
        """That of the calling thread, in which the socket was made. Raises OSError."""
        return cls(os.stat("/proc/thread-self/ns/net").st_ino, sock.netns_cookie(), _boot())  # noqa: PTH116 - no path

    def same(self, other: Namespace) -> bool:
        """As far as both know."""
        if self.past(other):
            return False
        return self.cookie == other.cookie if self.cookie and other.cookie else self.inode == other.inode

    def past(self, other: Namespace) -> bool:
        """One of them is of another boot, so it and all devices in it are gone."""
        return bool(self.boot and other.boot and self.boot != other.boot)


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@dataclass(frozen=True, slots=True)
class State:
    """What the file says."""

    ifname: str
    """What the device was called when mfsd took it."""
    ifindex: int
    namespace: Namespace
    owner: Owner
    backend: str
    before: Snapshot
    restoring: bool = False
    """What was there is being put back: what looks like half of it is not somebody else's."""
    address: str = ""
    """Of the device's hardware (links.Link.address), which goes with it wherever it goes; empty: not known."""
    kind: str = ""
    """As links.Link.kind."""
    path: Path | None = field(default=None, compare=False)
    """The file; None: not written yet."""
    written: tuple[int, int, int] | None = field(default=None, compare=False)
    """Inode, size and time of the file, as this process has written it."""

    @property
    def taken(self) -> bool:
        """Another live process owns the device's tree. Raises OSError when that can't be found out."""
        return self.owner.alive and not self.owner.mine

    def fits(self, address: str) -> bool:
        """It may be about a device of this address: an index is used again when its device is gone."""
        return not (self.address and address) or self.address == address

    def gave(self, address: str) -> bool:
        """The device of this address had no queue length, and was given one."""
        return self.before.txqlen == 0 and self.fits(address)

    def of(self, ifindex: int, namespace: Namespace) -> bool:
        """It is about this device."""
        return self.ifindex == ifindex and self.namespace.same(namespace)


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that says nothing. ``ifname`` and ``ifindex`` (0: unknown) are from the file's name."""

    path: Path
    ifname: str
    ifindex: int
    inode: int
    error: EnforceError


def every(state_dir: Path) -> list[State | Unreadable]:
    """All notes of a state directory, by file name. Raises OSError when it or one of them can't be opened."""
    try:
        names = sorted(os.listdir(state_dir))  # noqa: PTH208 - glob takes a directory that can't be read for empty
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        try:
            found.append(_load(state_dir / name, match))
        except FileNotFoundError:  # forgotten meanwhile
            continue
    return found


def find(state_dir: Path, ifindex: int, ifname: str, namespace: Namespace) -> State | None:
    """The note of a device, under whatever name. None when there is none.

    Raises EnforceError on one that can't be read and may be its, and OSError when that can't be found out.
    """
    for note in every(state_dir):
        if isinstance(note, State):
            if note.of(ifindex, namespace):
                return note
        elif (note.ifindex, note.inode) == (ifindex, namespace.inode) or (not note.ifindex and note.ifname == ifname):
            raise note.error
    return None


def save(state_dir: Path, state: State) -> State:
    """Write the note, whole or not at all, in place of the file that it was read from. Raises EnforceError."""
    where = state.namespace
    target = state_dir / f"qdisc-{state.ifname}.{state.ifindex}.{where.inode}.json"
    data = {
        "version": _VERSION,
        "ifname": state.ifname,
        "ifindex": state.ifindex,
        "namespace": where.inode,
        "cookie": where.cookie,
        "boot": where.boot,
        "owner": {"pid": state.owner.pid, "started": state.owner.started},
        "backend": state.backend,
        "restoring": state.restoring,
        "address": state.address,
        "kind": state.kind,
        "before": state.before.to_json(),
    }
    new = _new(target)
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        try:
            with new.open("w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            new.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink()
            raise
        if state.path not in (None, target):
            state.path.unlink(missing_ok=True)
    except OSError as e:
        raise EnforceError(f"write {target}", str(e), "set state_dir to a directory mfsd may write") from e
    return replace(state, path=target, written=_mark(target))


def kept(state: State) -> bool:
    """Its file is there, as this process has written it. Raises OSError."""
    return state.path is not None and state.written == _mark(state.path)


def _mark(path: Path) -> tuple[int, int, int] | None:
    try:
        now = path.stat()
    except FileNotFoundError:
        return None
    return now.st_ino, now.st_size, now.st_mtime_ns


def forget_others(state_dir: Path, state: State) -> None:
    """Remove what other notes say of this index, as far as can be: of devices that had it before."""
    with contextlib.suppress(OSError):
        for other in every(state_dir):
            if isinstance(other, State) and other.path != state.path and other.of(state.ifindex, state.namespace):
                forget(other)


def forget(state: State) -> None:
    """Remove a note, if it is there. Raises OSError."""
    if state.path is not None:
        state.path.unlink(missing_ok=True)
        _new(state.path).unlink(missing_ok=True)


def _new(target: Path) -> Path:
    """Where it is written before it replaces the old one; what a killed daemon leaves there is written over."""
    return target.with_suffix(".new")


# --- reading ----------------------------------------------------------------------------------------------------------


def _load(path: Path, name: re.Match[str]) -> State | Unreadable:
    raw = b""
    regular = path.is_file() or not path.exists()  # a pipe would be waited for
    if regular:
        with path.open("rb") as file:
            raw = file.read(min(os.fstat(file.fileno()).st_size, _LARGEST) + 1)
    try:
        if not regular:
            raise ValueError("no regular file")  # noqa: TRY301 - as what it says may be wrong, too
        if len(raw) > _LARGEST:
            raise ValueError(f"more than {_LARGEST} bytes")  # noqa: TRY301 - as what it says may be wrong, too
        return _decode(json.loads(raw), path)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        device = name["device"]
        fix = (
            f"look at the device (tc qdisc show dev {device}) and remove the file; mfsctl restore {device} --delete "
            "removes it and mfsd's qdiscs, so that the kernel's default returns"
        )
        error = EnforceError(f"read {path}", f"{type(e).__name__}: {e}", fix)
        return Unreadable(path, device, int(name["ifindex"] or 0), int(name["inode"] or 0), error)


def _decode(data: dict[str, Any], path: Path) -> State:
    if data["version"] not in _VERSIONS:
        raise ValueError(f"version {data['version']}, expected {_VERSION}")
    owner, name, boot = data["owner"], data["ifname"], data.get("boot", "")
    if not isinstance(name, str) or not isinstance(boot, str) or not isinstance(data["backend"], str):
        raise TypeError("ifname, boot and backend must be texts")
    before = Snapshot.from_json(data["before"])
    before.replay(0)  # it can be
    return State(
        ifname=name,
        ifindex=whole(data["ifindex"], _INT_MAX, least=1),
        namespace=Namespace(whole(data["namespace"], 2**64), whole(data.get("cookie", 0), 2**64), boot),
        owner=Owner(whole(owner["pid"], _INT_MAX, least=1), float(owner["started"])),
        backend=data["backend"],
        before=before,
        restoring=data.get("restoring") is True,
        address=str(data.get("address", "")),
        kind=str(data.get("kind", "")),
        path=path,
    )
