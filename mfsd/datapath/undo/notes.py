# SPDX-License-Identifier: Apache-2.0
"""The note that outlives a daemon: whose the tree on a device is, and what was there before.

One JSON file per device in the state directory, written before the first change and removed after the last. It names
its owner by pid and start time, so that a reused pid is not taken for a live daemon, and the device by index and
network namespace, so that a namesake elsewhere is not taken for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from mfsd.datapath.errors import EnforceError
from mfsd.datapath.undo.snapshot import Snapshot
from mfsd.host import processes

if TYPE_CHECKING:
    from pathlib import Path

_VERSION: Final = 1
_PREFIX: Final = "qdisc-"


def namespace() -> int:
    """Inode of the calling thread's network namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino  # noqa: PTH116 - a magic link, not a path


@dataclass(frozen=True, slots=True)
class Owner:
    """A process. ``started`` is in seconds since boot (host.processes): a stepped clock makes no one look dead."""

    pid: int
    started: float

    @classmethod
    def me(cls) -> Self:
        """This process."""
        return cls(os.getpid(), processes.start_time(os.getpid()))

    @property
    def alive(self) -> bool:
        """It still runs (a zombie does not)."""
        return processes.alive(self.pid, self.started)

    @property
    def mine(self) -> bool:
        """It is this process."""
        return self.pid == os.getpid() and self.alive


@dataclass(frozen=True, slots=True)
class State:
    """What the file says."""

    ifname: str
    ifindex: int
    namespace: int
    owner: Owner
    backend: str
    before: Snapshot

    @property
    def taken(self) -> bool:
        """Another live process owns the device's tree."""
        return self.owner.alive and not self.owner.mine

    def same_device(self, ifindex: int) -> bool:
        """The device of this index in the calling thread's namespace is the one recorded."""
        return self.ifindex == ifindex and self.namespace == namespace()


def path_of(state_dir: Path, ifname: str) -> Path:
    """Where a device's note is."""
    return state_dir / f"{_PREFIX}{ifname}.json"


def recorded(state_dir: Path) -> list[str]:
    """Names of the devices that have a note."""
    return sorted(p.name[len(_PREFIX) : -len(".json")] for p in state_dir.glob(f"{_PREFIX}*.json"))


def save(state_dir: Path, state: State) -> None:
    """Write the note, whole or not at all. Raises EnforceError naming the file."""
    data = {
        "version": _VERSION,
        "ifname": state.ifname,
        "ifindex": state.ifindex,
        "namespace": state.namespace,
        "owner": {"pid": state.owner.pid, "started": state.owner.started},
        "backend": state.backend,
        "before": state.before.to_json(),
    }
    target = path_of(state_dir, state.ifname)
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(dir=state_dir, prefix=".qdisc-")
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                json.dump(data, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, target)  # noqa: PTH105 - mkstemp gives a string
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)  # noqa: PTH108 - likewise
            raise
    except OSError as e:
        raise EnforceError(f"write {target}", str(e), "set state_dir to a directory mfsd may write") from e


def load(state_dir: Path, ifname: str) -> State | None:
    """Read a note; None when there is none. Raises EnforceError on one that can't be read."""
    target = path_of(state_dir, ifname)
    try:
        return _decode(json.loads(target.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        fix = f"look at the device (tc qdisc show dev {ifname}) and remove the file"
        raise EnforceError(f"read {target}", f"{type(e).__name__}: {e}", fix) from e


def _decode(data: dict[str, Any]) -> State:
    if data["version"] != _VERSION:
        raise ValueError(f"version {data['version']}, expected {_VERSION}")
    owner = Owner(int(data["owner"]["pid"]), float(data["owner"]["started"]))
    before = Snapshot.from_json(data["before"])
    place = int(data["ifindex"]), int(data["namespace"])
    return State(str(data["ifname"]), *place, owner, str(data["backend"]), before)


def forget(state_dir: Path, ifname: str) -> None:
    """Remove a note, if there is one."""
    path_of(state_dir, ifname).unlink(missing_ok=True)
