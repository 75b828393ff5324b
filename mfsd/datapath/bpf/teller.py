# SPDX-License-Identifier: Apache-2.0
"""The kernel tells of connections: loading and attaching bpf/sockets.bpf.c, and reading what it says.

Both programs hang on the root of the cgroup v2 hierarchy by links, which go with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from mfsd.datapath import _abi
from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.cgroup import SOCK_CREATE, SOCK_OPS, attach, behind
from mfsd.datapath.bpf.keys import address_of, tuple_key
from mfsd.datapath.bpf.libbpf import BpfObject, object_path
from mfsd.datapath.bpf.loader import SHARED_MAPS, Mapped
from mfsd.datapath.bpf.ring import Ring
from mfsd.datapath.bpf.rules import Rules
from mfsd.datapath.bpf.syscall import BpfMap
from mfsd.datapath.errors import LoaderError
from mfsd.ground.model import Endpoints
from mfsd.host import clock
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy.typing as npt

    from mfsd.datapath.bpf.loader import Classifier

CREATE: Final = "mfsd_socket"
CONNECT: Final = "mfsd_connection"
_OWN_MAPS: Final = (
    "mfsd_socks", "mfsd_ends", "mfsd_rules", "mfsd_rules_of", "mfsd_free", "mfsd_events", "mfsd_lost", "mfsd_here",
)  # fmt: skip
EVENTS_AT_ONCE: Final = 64
KEPT_MAX: Final = 16_384
"""Events that are kept for later, so that there is room in the ring."""
HOOKS: Final = (SOCK_CREATE, SOCK_OPS)
CONNECTION: Final = 1
"""Index of the program that runs when connections are made and over."""
_OVERRULED: Final = (
    "program {} hangs behind mfsd's on the root of cgroup v2 again: if it sets the flags of connections "
    "(bpf_sock_ops_cb_flags_set), how they end is not told, and what was acknowledged last may count as lost"
)


@dataclass(frozen=True, slots=True)
class Told:
    """One connection as the kernel describes it (struct mfsd_sock)."""

    cookie: int
    endpoints: Endpoints
    netns: int
    """Cookie of its network namespace."""
    pid: int
    """0: unknown, and so is uid."""
    uid: int
    cgroup: int
    tid: int = 0
    bound: int = 0
    """Interface that it is bound to; 0: none."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event (struct mfsd_event)."""

    kind: int
    """EVENT_MATCHED, EVENT_BOUND or EVENT_CLOSED of _abi."""
    sock: Told
    slot: int | None
    acked: int
    active: bool
    clean: bool
    at: float
    """When it was closed, on the kernel's clock, s; never too early."""


class Teller:
    """Loaded and attached. Raises LoaderError where the kernel or the host has not what it takes."""

    def __init__(self, classifier: Classifier) -> None:
        """``classifier``: whose slots and keys are used."""
        self._fds: list[int] = []
        self._links: list[int] = []
        self._kept: deque[bytes] = deque()
        """Events out of the ring that nobody has asked for yet."""
        self.taken_off = 0
        """How often somebody had taken the programs off: nothing is known of what was connected or closed meanwhile."""
        self.problem = ""
        """What an operator should know."""
        self._passed: set[int] = set()
        """Programs behind which ours have gone."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._load(classifier)
            self.netns = _netns_cookie()
            self._here.array[0] = self.netns
            self._links = attach(zip(self._programs, HOOKS, strict=True))
            undo.pop_all()

    def _load(self, classifier: Classifier) -> None:
        with BpfObject(object_path("sockets")) as obj:
            for name in SHARED_MAPS:
                obj.reuse_map(name, classifier.map_fds[name])
            obj.resize_map("mfsd_free", classifier.rows)
            obj.load()
            self._programs = obj.program_fd(CREATE), obj.program_fd(CONNECT)
            maps = {name: obj.map_fd(name) for name in _OWN_MAPS}
        self._fds += [*self._programs, *maps.values()]
        self._socks = BpfMap(maps["mfsd_socks"], 8, _abi.SOCK_DTYPE.itemsize)
        self._ends = BpfMap(maps["mfsd_ends"], 8, _abi.EVENT_DTYPE.itemsize)
        self._mapped = Mapped.open(maps["mfsd_rules"], _abi.RULE_DTYPE, _abi.RULES)
        self.rules = Rules(self._mapped.array, BpfMap(maps["mfsd_rules_of"], 16, _abi.RULES_OF_DTYPE.itemsize))
        self._free = maps["mfsd_free"]
        self._ring = Ring(maps["mfsd_events"], _abi.EVENT_BYTES)
        self._lost = Mapped.open(maps["mfsd_lost"], np.dtype(np.uint64), 1)
        self._here = Mapped.open(maps["mfsd_here"], np.dtype(np.uint64), 1)
        self.fd = maps["mfsd_events"]
        """Readable when there are events."""

    def keep(self) -> str:
        """Hang what somebody has taken off up again, and behind who has come since; what was amiss, empty if nothing.

        Who runs last decides which events of a connection its programs hear of. Whoever comes behind ours again
        insists, and is named in ``problem`` instead. Raises LoaderError, OSError.
        """
        off = [n for n, link in enumerate(self._links) if not syscall.link_info(link)[1]]
        later = [p for p in behind(self._programs[CONNECTION], SOCK_OPS) if not _ours(p)]
        new = set(later) - self._passed
        self._passed |= new
        self.problem = _OVERRULED.format(", ".join(map(str, later))) if later and not new else ""
        for n in sorted({*off, CONNECTION}) if new else off:
            (link,) = attach([(self._programs[n], HOOKS[n])])
            os.dup2(link, self._links[n], inheritable=False)
            os.close(link)
        self.taken_off += bool(off)
        if off:
            return "somebody has taken off what tells of connections; it is there again"
        return "somebody has come behind what tells of connections, which goes behind that" if new else ""

    # --- what it says -------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """There are events."""
        return bool(self._kept) or self._ring.waiting

    @property
    def lost(self) -> int:
        """How many there was no room for, so far: what they would have told is in the directory alone."""
        return int(self._lost.array[0])

    def events(self) -> list[Event]:
        """What has happened since the last call, at most EVENTS_AT_ONCE."""
        kept = self._kept
        kept.extend(self._ring.read(KEPT_MAX - len(kept)))
        return [_event(kept.popleft()) for _ in range(min(EVENTS_AT_ONCE, len(kept)))]

    def find(self, cookie: int) -> Told | None:
        """A connection by its cookie; None if the directory has none (yet)."""
        value = self._socks.lookup(cookie.to_bytes(8, "little"))
        return None if value is None else _told(cookie, np.frombuffer(value, dtype=_abi.SOCK_DTYPE)[0])

    def end_of(self, cookie: int) -> Event | None:
        """How a connection has ended; None if it has not, or others have since that were more than are remembered."""
        value = self._ends.lookup(cookie.to_bytes(8, "little"))
        return None if value is None else _event(value)

    def ends_since(self, ms: int) -> list[Event]:
        """How connections without a slot have ended since then, ms of the kernel's clock. Milliseconds; any thread."""
        _, rows = syscall.map_dump(self._ends.fd, np.dtype(np.uint64), _abi.EVENT_DTYPE, _abi.ENDS)
        later = (rows["rule"] - np.uint32(ms & 0xFFFFFFFF)).view(np.int32) >= 0
        chosen = rows[later & (rows["slot"] == _abi.NO_SLOT)]
        return list({int(row["cookie"]): _event(row.tobytes()) for row in chosen}.values())

    def add(self, cookie: int, endpoints: Endpoints, uid: int) -> None:
        """Enter a connection that is older than we are; of its maker nothing but the user is known."""
        sock = np.zeros((), dtype=_abi.SOCK_DTYPE)
        sock["key"] = np.frombuffer(tuple_key(endpoints), dtype=_abi.TUPLE_DTYPE)[0]
        sock["netns"], sock["owner"]["pid"], sock["owner"]["uid"] = self.netns, _abi.ANY_ID, uid
        self._socks.update(cookie.to_bytes(8, "little"), sock.tobytes())

    def own(self, cookie: int, uid: int) -> None:
        """Enter whose a connection is of which the directory does not know who made it. No error if it is over."""
        key = cookie.to_bytes(8, "little")
        value = self._socks.lookup(key)
        if value is None:
            return
        sock = np.frombuffer(value, dtype=_abi.SOCK_DTYPE).copy()
        sock["owner"]["pid"], sock["owner"]["uid"] = _abi.ANY_ID, uid
        self._socks.update(key, sock.tobytes())
        if self._ends.lookup(key) is not None:  # it ended meanwhile: nobody else would take it out
            with contextlib.suppress(FileNotFoundError):
                self._socks.delete(key)

    def all(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[Any]]:
        """The whole directory: cookies and SOCK_DTYPE rows. Some milliseconds; from any thread."""
        return syscall.map_dump(self._socks.fd, np.dtype(np.uint64), _abi.SOCK_DTYPE, _abi.SOCKETS)

    def told(self, cookies: Iterable[int], rows: Iterable[Any]) -> list[Told]:
        """Rows of ``all`` as values."""
        return [_told(int(cookie), row) for cookie, row in zip(cookies, rows, strict=True)]

    def lend(self, slots: Sequence[int]) -> None:
        """Free slots that the kernel may take for connections that a rule names."""
        for slot in slots:
            value = ctypes.create_string_buffer(struct.pack("=I", slot), 4)
            # A stack has no keys, and insists on that (kernel/bpf/syscall.c, ___bpf_copy_key).
            attr = syscall.ELEMENT_ATTR.pack(self._free, 0, 0, ctypes.addressof(value), 0)
            syscall.call(syscall.MAP_UPDATE, attr)

    def close(self) -> None:
        """Detach and give everything back. Idempotent."""
        for fd in (*self._links, *self._fds):
            os.close(fd)
        self._links, self._fds = [], []
        ring = getattr(self, "_ring", None)
        if ring is not None:
            ring.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _ours(program: int) -> bool:
    """It is a daemon's, this one's or another's, and sets no flags but those that it needs besides."""
    try:
        return syscall.prog_info(program)[0].startswith("mfsd_")
    except OSError:  # it takes CAP_SYS_ADMIN to know, or it is gone
        return False


def _event(record: bytes) -> Event:
    row = np.frombuffer(record, dtype=_abi.EVENT_DTYPE, count=1)[0]
    slot, flags = int(row["slot"]), int(row["flags"])
    return Event(
        kind=int(row["kind"]),
        sock=_told(int(row["cookie"]), row["sock"]),
        slot=None if slot == _abi.NO_SLOT else slot,
        acked=int(row["acked"]),
        active=bool(flags & _abi.EVENT_ACTIVE),
        clean=bool(flags & _abi.EVENT_CLEAN),
        at=clock.monotonic() - (((clock.monotonic_ns() // 1_000_000 - int(row["rule"])) & 0xFFFFFFFF) - 1) / 1000,
    )


def _told(cookie: int, row: Any) -> Told:
    key, owner = row["key"], row["owner"]
    endpoints = Endpoints(
        address_of(key["saddr"].tobytes()),
        socket.ntohs(int(key["sport"])),
        address_of(key["daddr"].tobytes()),
        socket.ntohs(int(key["dport"])),
        int(key["proto"]),
    )
    pid = int(owner["pid"])
    uid = int(owner["uid"]) if pid else -1
    known = 0 if pid == _abi.ANY_ID else pid
    cgroup, tid, bound = int(owner["cgroup"]), int(owner["tid"]), int(row["bound"])
    return Told(cookie, endpoints, int(row["netns"]), known, uid, cgroup, tid, bound)


def _netns_cookie() -> int:
    """Of the calling thread's network namespace. Raises LoaderError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            return nl.netns_cookie(s)
        except OSError as e:
            fix = "it needs Linux 5.14" if e.errno == errno.ENOPROTOOPT else ""
            raise LoaderError("cookie of the network namespace", str(e), fix) from e
