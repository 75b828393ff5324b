# SPDX-License-Identifier: Apache-2.0
"""Filters of mfsd on clsact, and who of their owners lives.

Whose owner lives, the kernel knows: each holds an abstract unix socket for as long as it does (unix(7)). Unlike a pid,
that means the same in every container that has this network namespace.
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from mfsd.datapath import links, tc
from mfsd.datapath.bpf.loader import PROGRAM
from mfsd.datapath.errors import AttachError, NoDeviceError
from mfsd.host import netlink as nl

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.datapath.tc import TcObject, TcSocket

Method = Literal["tcx", "clsact"]

_CLSACT: Final = 0xFFFF0000
_CLSACT_PARENT: Final = 0xFFFFFFF1
"""TC_H_CLSACT."""
_PARENTS: Final = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
"""TC_H_CLSACT | TC_H_MIN_INGRESS / TC_H_MIN_EGRESS."""
_PRIO: Final = 1
"""As tc.bpf_filter has it."""
_HANDLES: Final = range(0x6D660000, 0x6D670000)
"""Of our filters. An odd one is in a clsact that mfsd made: the last of them takes the qdisc along."""
# include/uapi/linux/pkt_cls.h
_BPF_FLAGS: Final = 8
_BPF_ID: Final = 11
_ACT_DIRECT: Final = 1


@dataclass(frozen=True, slots=True)
class HookUser:
    """A program on the egress hook of a device, in the order in which they run."""

    hook: Method
    name: str
    """Empty where the kernel doesn't tell: of TCX programs it does with CAP_SYS_ADMIN only."""
    kind: str
    """"bpf" for TCX programs, the filter's kind for clsact."""
    prog_id: int
    """0 where the kernel doesn't tell."""
    prio: int = 0
    """clsact priority; 0 for TCX."""
    handle: int = 0
    """clsact filter handle; 0 for TCX."""

    @property
    def ours(self) -> bool:
        """True for a classifier of mfsd, of this process or not."""
        return self.name == PROGRAM

    @property
    def filter(self) -> bool:
        """True for a clsact filter that mfsd made."""
        return self.ours and self.hook == "clsact" and self.prio == _PRIO and self.handle in _HANDLES

    def __str__(self) -> str:
        where = "tcx" if self.hook == "tcx" else f"clsact, priority {self.prio}"
        what = self.name or (f"a {self.kind} filter" if self.hook == "clsact" else "a program")
        return f"{what} ({where}{f', program {self.prog_id}' if self.prog_id else ''})"


def _kind(sock: TcSocket, ifindex: int) -> str | None:
    """What sits at ffff:, "clsact", "ingress" or nothing."""
    return next((q.kind for q in sock.objects(tc.RTM_GETQDISC, ifindex) if q.handle == _CLSACT), None)


def ensure(sock: TcSocket, ifindex: int) -> bool:
    """True if the qdisc was made, False if it was there. Raises AttachError if its place is taken."""
    kind = _kind(sock, ifindex)
    if kind == "clsact":
        return False
    if kind is not None:
        raise AttachError(
            f"attaching to device {ifindex}",
            f"a qdisc of kind {kind} holds the handle ffff:",
            "replace it by clsact, which does the same and has an egress side, or use a kernel with TCX (6.6)",
        )
    sock.run([_clsact(tc.RTM_NEWQDISC, nl.NLM_CREATE | nl.NLM_EXCL, ifindex)], f"clsact on device {ifindex}")
    return True


def _clsact(kind: int, flags: int, ifindex: int) -> bytes:
    return tc.message(kind, flags, ifindex, _CLSACT, _CLSACT_PARENT, body=tc.kind_attr("clsact"))


def filters(sock: TcSocket, ifindex: int, side: str) -> list[HookUser]:
    """Filters on one side of clsact, as packets meet them; heads of priorities (handle 0) left out."""
    if _kind(sock, ifindex) is None:
        return []
    return [_user(f) for f in sock.objects(tc.RTM_GETTFILTER, ifindex, _PARENTS[side]) if f.handle]


def _user(f: TcObject) -> HookUser:
    options = nl.attrs(f.options or b"") if f.kind == "bpf" else {}
    name = options.get(tc.TCA_BPF_NAME, b"").rstrip(b"\0").decode(errors="replace")
    number = int.from_bytes(options.get(_BPF_ID, b""), "little")
    return HookUser("clsact", name, f.kind, number, f.info >> 16, f.handle)


def check_head(sock: TcSocket, ifindex: int) -> None:
    """Raise AttachError if another kind of filter sits where ours must be; bpf filters can share a priority."""
    for user in filters(sock, ifindex, "egress"):
        if user.prio == _PRIO and user.kind != "bpf":
            raise AttachError(
                f"attaching to device {ifindex}",
                f"a {user.kind} filter holds priority {_PRIO} of clsact egress",
                "give it a higher number, or use a kernel with TCX (6.6)",
            )


def put(sock: TcSocket, ifindex: int, prog_fd: int, handle: int) -> None:
    """Make our filter, or put another program into it."""
    options = tc.bpf_program(prog_fd, PROGRAM) + nl.attr(_BPF_FLAGS, struct.pack("=I", _ACT_DIRECT))
    request = tc.bpf_filter(tc.RTM_NEWTFILTER, nl.NLM_CREATE, ifindex, handle, _PARENTS["egress"], options)
    sock.run([request], f"classifier on device {ifindex}")


def delete(sock: TcSocket, ifindex: int, handle: int) -> None:
    """Delete a filter of ours."""
    request = tc.bpf_filter(tc.RTM_DELTFILTER, 0, ifindex, handle, _PARENTS["egress"])
    sock.run([request], f"old classifier of device {ifindex}")


def delete_qdisc(sock: TcSocket, ifindex: int) -> None:
    """Delete clsact, with everything on it."""
    sock.run([_clsact(tc.RTM_DELQDISC, 0, ifindex)], f"clsact of device {ifindex}")


def remove(ifindex: int, which: Callable[[HookUser], bool]) -> bool:
    """Delete those of our filters, and the qdisc with the last of them if it is mfsd's. True if there were any.

    Raises AttachError; a device that is gone has none.
    """
    try:
        with tc.TcSocket() as sock:
            try:
                found = [u for u in filters(sock, ifindex, "egress") if u.filter and which(u)]
                for user in found:
                    delete(sock, ifindex, user.handle)
                made = any(u.handle & 1 for u in found) and _kind(sock, ifindex) == "clsact"
                if made and not any(filters(sock, ifindex, side) for side in _PARENTS):
                    delete_qdisc(sock, ifindex)
            except OSError:
                links.by_index(sock, ifindex)
                raise
    except NoDeviceError:  # and all that hung on it
        return False
    except OSError as e:
        raise AttachError(f"cleaning up device {ifindex}", str(e)) from e
    return bool(found)


# --- owners -----------------------------------------------------------------------------------------------------------


def claim(ifindex: int, *, made: bool, taken: set[int]) -> tuple[int, socket.socket]:
    """A handle that no filter has and no daemon is about to use, and the socket that says whose it is.

    Any user may have taken the names of all of them: then it is one that no filter has, whoever says that he owns it.
    """
    token = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        free = [handle for handle in _HANDLES[int(made) :: 2] if handle not in taken]
        handle = next((h for h in free if _bind(token, ifindex, h)), free[0] if free else 0)
        if handle:
            return handle, token
    except BaseException:
        token.close()
        raise
    token.close()
    raise OSError(errno.ENOSPC, "all handles for classifiers are taken")


def alive(ifindex: int, handle: int) -> bool:
    """The owner of a filter lives. Raises OSError when that can't be found out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        return not _bind(probe, ifindex, handle)


def _bind(token: socket.socket, ifindex: int, handle: int) -> bool:
    try:
        token.bind(f"\0mfsd/device/{ifindex}/{handle:x}")
    except OSError as e:
        if e.errno != errno.EADDRINUSE:
            raise
        return False
    return True
