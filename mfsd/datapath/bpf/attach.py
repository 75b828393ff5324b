# SPDX-License-Identifier: Apache-2.0
"""Hang a loaded classifier on the egress hook of a device, and take it off again.

*TCX* (Linux 6.6 and later): a link at the head of the chain. The link lives as long as its descriptor, so it goes by
itself when the daemon dies, and its program can be replaced atomically. *clsact* (older kernels): a direct-action
filter at priority 1. It outlives its maker, so :func:`remove_leftover` exists; until then a leftover does nothing,
because its heartbeat is lost.

Everything here acts in the network namespace of the **calling thread** and blocks for the time of a few system calls.
To reach another namespace, call from a thread that has done ``setns``; the link keeps working after the thread is
gone. Needs CAP_NET_ADMIN in the namespace and CAP_BPF in the initial one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.loader import PROGRAM, Classifier
from mfsd.datapath.errors import AttachError
from mfsd.datapath.pyroute import iproute

if TYPE_CHECKING:
    from collections.abc import Iterator

Method = Literal["tcx", "clsact"]

TCX_EGRESS: Final = 47
"""BPF_TCX_EGRESS, enum bpf_attach_type in include/uapi/linux/bpf.h (6.6)."""
_F_BEFORE: Final = 1 << 3
"""BPF_F_BEFORE; without an anchor it means the head (kernel/bpf/mprog.c)."""

_CLSACT: Final = 0xFFFF0000
_PARENTS: Final = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
"""TC_H_CLSACT | TC_H_MIN_INGRESS / TC_H_MIN_EGRESS."""
_PRIO: Final = 1
_HANDLE_GUEST: Final = 0x6D667364
"""Of our filter, "mfsd", in a clsact that was there before."""
_HANDLE_HOST: Final = 0x6D667365
"""Of our filter in a clsact that we made: whoever removes the filter, after a crash too, knows whose the qdisc is."""
_HANDLES: Final = frozenset({_HANDLE_GUEST, _HANDLE_HOST})
_ETH_P_ALL: Final = 3

_SIOCGIFHWADDR: Final = 0x8927
_ETHERNET: Final = {1: "ARPHRD_ETHER", 772: "ARPHRD_LOOPBACK"}
"""Hardware types (include/uapi/linux/if_arp.h) whose frames begin with an Ethernet header."""
_NO_DEVICE: Final = (errno.ENXIO, errno.ENODEV)
"""What if_indextoname and the ioctl say then."""


@dataclass(frozen=True, slots=True)
class HookUser:
    """A program on the egress hook of a device, in the order in which they run."""

    hook: Method
    name: str
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


@dataclass(slots=True)
class Attachment:
    """A classifier at work on a device. Close it by :meth:`detach`; a TCX one also goes with the process."""

    ifindex: int
    method: Method
    link_fd: int = -1
    """TCX: the link; pass it on (SCM_RIGHTS, systemd's fd store) to keep the classifier attached over a restart."""
    made_qdisc: bool = field(default=False)
    """clsact: the qdisc is ours to delete."""

    def update(self, classifier: Classifier) -> None:
        """Put another classifier in the place of this one; no packet passes between. Raises AttachError."""
        what = f"replacing the classifier of device {self.ifindex}"
        try:
            if self.method == "tcx":
                syscall.link_update(self.link_fd, classifier.prog_fd)
            else:
                with iproute("clsact") as ip:
                    _put_filter(ip, self.ifindex, classifier.prog_fd, made_qdisc=self.made_qdisc)
        except OSError as e:
            raise AttachError(what, str(e)) from e

    def detach(self) -> None:
        """Take the classifier off. Does nothing the second time, or when the device is gone. Raises AttachError."""
        if self.method == "tcx":
            if self.link_fd >= 0:
                os.close(self.link_fd)
                self.link_fd = -1
            return
        self.made_qdisc = False
        remove_leftover(self.ifindex)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


def attach(classifier: Classifier, ifindex: int, method: Literal["auto", "tcx", "clsact"] = "auto") -> Attachment:
    """Attach to the egress hook of a device of the calling thread's network namespace.

    "auto" is TCX where the kernel has it, else clsact. Raises AttachError.
    """
    what = f"attaching to device {ifindex}"
    _check_link_type(what, ifindex)
    if method != "clsact":
        try:
            fd = syscall.link_create(classifier.prog_fd, ifindex, TCX_EGRESS, _F_BEFORE)
        except OSError as e:
            # EINVAL: the kernel doesn't know the attach type, i.e. it is older than 6.6 or lacks CONFIG_NET_XGRESS
            if method == "tcx" or e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise _explain(what, e) from e
        else:
            return Attachment(ifindex, "tcx", fd)
    try:
        with iproute("clsact") as ip:
            fresh = _ensure_clsact(ip, ifindex)
            # A predecessor that made the qdisc and was killed leaves it to us, with its filter.
            made = fresh or any(_is_ours(f) and f["handle"] == _HANDLE_HOST for f in _filters(ip, ifindex, "egress"))
            try:
                _check_head(ip, ifindex)
                _put_filter(ip, ifindex, classifier.prog_fd, made_qdisc=made)
            except BaseException:
                if fresh:
                    ip.tc("del", "clsact", ifindex)
                raise
    except OSError as e:
        raise _explain(what, e) from e
    return Attachment(ifindex, "clsact", made_qdisc=made)


def remove_leftover(ifindex: int) -> bool:
    """Delete our clsact filter, whichever mfsd made it; True if there was one. Raises AttachError.

    A clsact qdisc that came with the filter goes, too, unless somebody else has a filter there by now.
    """
    try:
        with iproute("clsact") as ip:
            found = {f["handle"] for f in _filters(ip, ifindex, "egress") if _is_ours(f)}
            for handle in found:
                ip.tc("del-filter", "bpf", ifindex, handle, parent=_PARENTS["egress"], prio=_PRIO, protocol=_ETH_P_ALL)
            made = _HANDLE_HOST in found and _clsact_kind(ip, ifindex) == "clsact"  # else somebody has deleted it
            if made and not any(True for side in _PARENTS for _ in _filters(ip, ifindex, side)):
                ip.tc("del", "clsact", ifindex)
    except OSError as e:
        if e.errno in (errno.ENODEV, errno.ENOENT, errno.EINVAL) and not _device_exists(ifindex):
            return False
        raise AttachError(f"cleaning up device {ifindex}", str(e)) from e
    return bool(found)


def hook_users(ifindex: int) -> list[HookUser]:
    """Everything on the egress hook of a device, TCX first, as packets meet them. Raises OSError."""
    users = []
    for prog_id in _tcx_ids(ifindex):
        try:
            name, _ = syscall.prog_info(prog_id)
        except OSError as e:
            if e.errno == errno.ENOENT:  # gone meanwhile
                continue
            raise
        users.append(HookUser("tcx", name, "bpf", prog_id))
    with iproute(f"look at the hooks of device {ifindex}") as ip:
        if not _clsact_kind(ip, ifindex):
            return users
        users += [
            HookUser(
                "clsact",
                _option(f, "TCA_BPF_NAME") or "",
                f.get_attr("TCA_KIND"),
                _option(f, "TCA_BPF_ID") or 0,
                _prio(f),
                f["handle"],
            )
            for f in _filters(ip, ifindex, "egress")
        ]
    return users


def _tcx_ids(ifindex: int) -> list[int]:
    """Ids of the TCX programs; none where the kernel has no TCX."""
    try:
        return syscall.prog_query(ifindex, TCX_EGRESS)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT):
            return []
        raise


def _explain(what: str, e: OSError) -> AttachError:
    """Name the fix for the usual causes."""
    fixes: dict[int | None, str] = {
        errno.EPERM: "mfsd needs CAP_NET_ADMIN in the device's network namespace, and CAP_BPF",
        errno.ENODEV: "there is no such device in this network namespace",
        errno.EEXIST: "this classifier is attached to the device already",
        errno.EINVAL: "this kernel has no TCX (Linux 6.6); use clsact",
        errno.ENOENT: "this kernel lacks CONFIG_NET_CLS_BPF or CONFIG_NET_SCH_INGRESS",
        errno.ERANGE: "64 programs hang on this hook already",
    }
    return AttachError(what, str(e), fixes.get(e.errno, ""))


def _check_link_type(what: str, ifindex: int) -> None:
    """Refuse devices whose frames don't begin with an Ethernet header: the classifier would misread them."""
    try:
        name = socket.if_indextoname(ifindex)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            request = struct.pack("16sH22x", name.encode(), 0)
            (kind,) = struct.unpack_from("16xH", fcntl.ioctl(s, _SIOCGIFHWADDR, request))
    except OSError as e:
        gone = e.errno in _NO_DEVICE
        raise AttachError(what, str(e), "there is no such device in this network namespace" if gone else "") from e
    if kind not in _ETHERNET:
        raise AttachError(
            what,
            f"{name} has no Ethernet header (hardware type {kind})",
            "name the Ethernet device below the tunnel; the socket goes with the packet",
        )


def _device_exists(ifindex: int) -> bool:
    try:
        socket.if_indextoname(ifindex)
    except OSError as e:
        return e.errno not in _NO_DEVICE
    return True


def _clsact_kind(ip: Any, ifindex: int) -> str | None:
    """What sits at ffff:, "clsact", "ingress" or nothing."""
    for q in ip.get_qdiscs(index=ifindex):
        if q["index"] == ifindex and q["handle"] == _CLSACT:
            return str(q.get_attr("TCA_KIND"))
    return None


def _ensure_clsact(ip: Any, ifindex: int) -> bool:
    """True if the qdisc was made, False if it was there. Raises AttachError if its place is taken."""
    kind = _clsact_kind(ip, ifindex)
    if kind == "clsact":
        return False
    if kind is not None:
        raise AttachError(
            f"attaching to device {ifindex}",
            f"a qdisc of kind {kind} holds the handle ffff:",
            "replace it by clsact, which does the same and has an egress side, or use a kernel with TCX (6.6)",
        )
    ip.tc("add", "clsact", ifindex)
    return True


def _filters(ip: Any, ifindex: int, side: str) -> Iterator[Any]:
    """Filters on one side of clsact, heads of priorities (handle 0) left out."""
    for f in ip.get_filters(index=ifindex, parent=_PARENTS[side]):
        if f["handle"]:
            yield f


def _option(message: Any, name: str) -> Any:
    """One attribute of TCA_OPTIONS, None if absent."""
    options = message.get_attr("TCA_OPTIONS")
    return options.get_attr(name) if options is not None and hasattr(options, "get_attr") else None


def _prio(message: Any) -> int:
    return int(message["info"]) >> 16


def _is_ours(message: Any) -> bool:
    return message["handle"] in _HANDLES and _prio(message) == _PRIO and _option(message, "TCA_BPF_NAME") == PROGRAM


def _check_head(ip: Any, ifindex: int) -> None:
    """Raise AttachError if another kind of filter sits where ours must be; bpf filters can share a priority."""
    for f in _filters(ip, ifindex, "egress"):
        kind = f.get_attr("TCA_KIND")
        if _prio(f) == _PRIO and kind != "bpf":
            raise AttachError(
                f"attaching to device {ifindex}",
                f"a {kind} filter holds priority {_PRIO} of clsact egress",
                "give it a higher number, or use a kernel with TCX (6.6)",
            )


def _put_filter(ip: Any, ifindex: int, prog_fd: int, *, made_qdisc: bool) -> None:
    """Make our filter, or put another program into it."""
    ip.tc(
        "replace-filter",
        "bpf",
        ifindex,
        _HANDLE_HOST if made_qdisc else _HANDLE_GUEST,
        parent=_PARENTS["egress"],
        prio=_PRIO,
        protocol=_ETH_P_ALL,
        fd=prog_fd,
        name=PROGRAM,
        direct_action=True,
    )
