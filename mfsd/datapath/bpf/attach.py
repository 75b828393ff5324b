# SPDX-License-Identifier: Apache-2.0
"""Hang a loaded classifier on the egress hook of a device, see whether it still hangs there, and take it off again.

*TCX* (Linux 6.6 and later): a link at the head of the chain. The link lives as long as its descriptor, so it goes by
itself when the daemon dies, and its program can be replaced atomically. *clsact* (older kernels): a direct-action
filter at priority 1. It outlives its maker, so :func:`remove_leftover` exists; until then a leftover does nothing,
because its heartbeat is lost. Several daemons may have their filters side by side, and none touches another's.

Everything here acts in the network namespace of the **calling thread** and blocks for the time of a few system calls.
To reach another namespace, call from a thread that has done ``setns``; the link keeps working after the thread is
gone. Needs CAP_NET_ADMIN in the namespace and CAP_BPF in the initial one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, Self

from mfsd.datapath import links, tc
from mfsd.datapath.bpf import clsact, syscall
from mfsd.datapath.bpf.clsact import HookUser, Method
from mfsd.datapath.errors import AttachError, NoDeviceError

if TYPE_CHECKING:
    import socket

    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.datapath.tc import TcSocket

__all__ = ["Attachment", "HookUser", "Method", "Standing", "attach", "hook_users", "inherit", "remove_leftover"]

TCX_EGRESS: Final = 47
"""BPF_TCX_EGRESS, enum bpf_attach_type in include/uapi/linux/bpf.h (6.6)."""
_F_BEFORE: Final = 1 << 3
"""BPF_F_BEFORE; without an anchor it means the head (kernel/bpf/mprog.c)."""

ETHERNET: Final = (1, 772)
"""ARPHRD_ETHER and ARPHRD_LOOPBACK (include/uapi/linux/if_arp.h): frames that begin with an Ethernet header."""
_NO_TCX: Final = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a classifier hangs on its device."""

    attached: bool
    ahead: tuple[HookUser, ...] = ()
    """Programs of others that packets meet first. One that ends the chain keeps them from the classifier, and only its
    owner knows whether it does: what a program returns can't be read, and counters tell only if it takes everything."""


@dataclass(slots=True, eq=False, weakref_slot=True)
class Attachment:
    """A classifier at work on a device. Close it by :meth:`detach`; a TCX one also goes with the process."""

    ifindex: int
    method: Method
    link_fd: int = -1
    """TCX: the link; pass it on (SCM_RIGHTS, systemd's fd store) to keep the classifier attached over a restart."""
    handle: int = 0
    """clsact: of our filter."""
    prog_id: int = 0
    """Of the program that hangs there."""
    token: socket.socket | None = None
    """clsact: tells other daemons that the filter's owner lives."""

    def fileno(self) -> int:
        """Descriptor of the TCX link; -1 without one."""
        return self.link_fd

    def update(self, classifier: Classifier) -> None:
        """Put another classifier in the place of this one; no packet passes between. Raises AttachError."""
        what = f"replacing the classifier of device {self.ifindex}"
        try:
            if self.method == "tcx":
                syscall.link_update(self.link_fd, classifier.prog_fd)
            else:
                with tc.TcSocket() as sock:
                    clsact.put(sock, self.ifindex, classifier.prog_fd, self.handle)
            self.prog_id = syscall.prog_id(classifier.prog_fd)
        except OSError as e:
            raise AttachError(what, str(e)) from e

    def standing(self) -> Standing:
        """Look whether it still hangs there, and behind whom. Raises AttachError when the kernel can't be asked."""
        try:
            users = hook_users(self.ifindex)
            if self.method == "tcx":
                there = syscall.link_info(self.link_fd) == (self.prog_id, self.ifindex)
                place = next((n for n, u in enumerate(users) if u.hook == "tcx" and u.prog_id == self.prog_id), None)
            else:
                there = True
                place = next((n for n, u in enumerate(users) if self._is(u)), None)
        except OSError as e:
            raise AttachError(f"looking at the hooks of device {self.ifindex}", str(e)) from e
        if not there or place is None:
            return Standing(attached=False)
        return Standing(attached=True, ahead=tuple(u for u in users[:place] if not u.ours))

    def _is(self, user: HookUser) -> bool:
        return (user.hook, user.handle, user.prog_id) == ("clsact", self.handle, self.prog_id)

    def detach(self) -> None:
        """Take the classifier off. Does nothing the second time, or when the device is gone. Raises AttachError."""
        if self.method == "tcx":
            fd, self.link_fd = self.link_fd, -1
            if fd >= 0:
                # Somebody else may hold the link, too: the service manager does, over a restart.
                with contextlib.suppress(OSError):
                    syscall.link_detach(fd)
                os.close(fd)
            return
        if self.token is not None:
            clsact.remove(self.ifindex, lambda user: user.handle == self.handle)
            self.token.close()
            self.token = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()


def attach(classifier: Classifier, ifindex: int, method: Literal["auto", "tcx", "clsact"] = "auto") -> Attachment:
    """Attach to the egress hook of a device of the calling thread's network namespace.

    "auto" is TCX where the kernel has it, else clsact. Clsact filters of daemons that are gone go. Raises AttachError.
    """
    what = f"attaching to device {ifindex}"
    try:
        with tc.TcSocket() as sock:
            _check_link_type(sock, what, ifindex)
            number = syscall.prog_id(classifier.prog_fd)
            if method != "clsact":
                clsact.remove(ifindex, lambda user: not clsact.alive(ifindex, user.handle))
                try:
                    fd = syscall.link_create(classifier.prog_fd, ifindex, TCX_EGRESS, _F_BEFORE)
                except OSError as e:
                    # EINVAL: the kernel doesn't know the attach type: it is older than 6.6 or lacks CONFIG_NET_XGRESS
                    if method == "tcx" or e.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                        raise
                else:
                    return Attachment(ifindex, "tcx", fd, prog_id=number)
            return _attach_filter(sock, classifier, ifindex, number)
    except NoDeviceError as e:
        raise AttachError(what, str(e), "there is no such device in this network namespace") from e
    except OSError as e:
        raise _explain(what, e) from e


def _attach_filter(sock: TcSocket, classifier: Classifier, ifindex: int, number: int) -> Attachment:
    fresh = clsact.ensure(sock, ifindex)
    token = None
    try:
        clsact.check_head(sock, ifindex)
        ours = [u for u in clsact.filters(sock, ifindex, "egress") if u.filter]
        left = [u for u in ours if not clsact.alive(ifindex, u.handle)]
        # Who made the qdisc leaves it to those who are still there, with the mark in their handles.
        made = fresh or any(u.handle & 1 for u in ours)
        handle, token = clsact.claim(ifindex, made=made, taken={u.handle for u in ours})
        clsact.put(sock, ifindex, classifier.prog_fd, handle)
        for user in left:
            clsact.delete(sock, ifindex, user.handle)
    except BaseException:
        if token is not None:
            token.close()
        if fresh:
            clsact.delete_qdisc(sock, ifindex)
        raise
    attachment = Attachment(ifindex, "clsact", handle=handle, prog_id=number, token=token)
    weakref.finalize(attachment, token.close)
    _mine.add(attachment)
    return attachment


def inherit(classifier: Classifier, ifindex: int, link_fd: int) -> Attachment | None:
    """Put a classifier in the place of another process's, whose TCX link this is; no packet passes between.

    The link is the attachment's from now on. When it does not hang on this device (any more) it is closed, with None.
    """
    attachment = Attachment(ifindex, "tcx", link_fd)
    with contextlib.suppress(AttachError):
        attachment.update(classifier)
        if attachment.standing().attached:
            return attachment
    attachment.detach()
    return None


_mine: Final[weakref.WeakSet[Attachment]] = weakref.WeakSet()
"""Filters of this process."""


def remove_leftover(ifindex: int) -> bool:
    """Delete the clsact filters of daemons that are gone, and of this process; True if there were any.

    A clsact qdisc that came with them goes, too, unless somebody else has a filter there by now. Raises AttachError.
    """
    mine = {a.handle for a in _mine if a.ifindex == ifindex and a.token is not None}
    return clsact.remove(ifindex, lambda user: user.handle in mine or not clsact.alive(ifindex, user.handle))


def hook_users(ifindex: int) -> list[HookUser]:
    """Everything on the egress hook of a device, TCX first, as packets meet them. Raises OSError."""
    users = []
    for number in _tcx_ids(ifindex):
        try:
            name, _ = syscall.prog_info(number)
        except PermissionError:
            name = ""
        except FileNotFoundError:  # gone meanwhile
            continue
        users.append(HookUser("tcx", name, "bpf", number))
    with tc.TcSocket() as sock:
        return users + clsact.filters(sock, ifindex, "egress")


def _tcx_ids(ifindex: int) -> list[int]:
    """Ids of the TCX programs; none where the kernel has no TCX."""
    try:
        return syscall.prog_query(ifindex, TCX_EGRESS)
    except OSError as e:
        if e.errno in _NO_TCX:
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


def _check_link_type(sock: TcSocket, what: str, ifindex: int) -> None:
    """Refuse devices whose frames don't begin with an Ethernet header: the classifier would misread them."""
    link = links.by_index(sock, ifindex)
    if link.hardware not in ETHERNET:
        raise AttachError(
            what,
            f"{link.name} has no Ethernet header (hardware type {link.hardware})",
            "name the Ethernet device below the tunnel; the socket goes with the packet",
        )
