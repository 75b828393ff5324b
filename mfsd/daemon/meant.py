# SPDX-License-Identifier: Apache-2.0
"""What a selector means: for the kernel to match, in the kernel's directory, and in a listing."""

from __future__ import annotations

import ipaddress
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mfsd.datapath.bpf.rules import Match, masked
from mfsd.ground.model import CookieSelector, HintError, Maker, PortRange, ProcessSelector, RuleSelector, TupleSelector
from mfsd.host.sockets import process_sockets

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy.typing as npt

    from mfsd.engine.sockets import Socket
    from mfsd.ground.model import Selector
    from mfsd.host.makers import Makers
    from mfsd.host.sockets import Socket as Listed


def matches(selector: Selector, uid: int, meaning: Callable[[Maker], Makers]) -> list[Match]:
    """What the kernel has to match for a selector of a user (-1: anybody)."""
    if isinstance(selector, TupleSelector):
        dst = ipaddress.ip_network(selector.dst)
        return [Match(selector.src, dst, selector.sport, selector.dport, uid=uid)]
    if isinstance(selector, ProcessSelector):
        pids = {selector.pid} | (meaning(Maker(pid=selector.pid)).pids or frozenset())
        place = Match(None, selector.remote, PortRange(), selector.dport, uid=uid)
        return [*(replace(place, pid=pid) for pid in sorted(pids)), replace(place, asks=True)]
    if isinstance(selector, CookieSelector):
        return []
    place = Match(None, selector.remote, selector.sport, selector.dport, uid=max(uid, selector.maker.uid))
    if not described(selector.maker):
        return [place]
    asks = replace(place, asks=True)
    meant = meaning(selector.maker)
    if meant.tids is not None:
        # Whoever has the thread is in the process, and was looked for in the cgroup.
        return [*(replace(place, tid=tid) for tid in sorted(meant.tids)), asks]
    pairs = itertools.product(_numbers(meant.pids, -1), _numbers(meant.cgroups, 0))
    return [*(replace(place, pid=pid, cgroup=cgroup) for pid, cgroup in pairs), asks]


def described(maker: Maker) -> bool:
    """Whom it means has to be looked for, and may be others in a moment."""
    return bool(maker.pid or maker.executable or maker.thread or maker.cgroup)


def made(socket: Socket, maker: Maker, meant: Makers) -> bool:
    """Whether somebody of a description, which means these now, has made a socket."""
    return (
        (maker.uid < 0 or socket.uid == maker.uid)
        and (meant.pids is None or socket.pid in meant.pids)
        and (meant.tids is None or socket.tid in meant.tids)
        and (meant.cgroups is None or socket.cgroup in meant.cgroups)
    )


def _numbers(numbers: frozenset[int] | None, anything: int) -> Sequence[int]:
    return [anything] if numbers is None else sorted(numbers)


def maker_of(selector: Selector) -> Maker | None:
    """Whose sockets a selector means; None: that of anybody, or it names single sockets."""
    if isinstance(selector, ProcessSelector):
        return Maker(pid=selector.pid)
    return selector.maker if isinstance(selector, RuleSelector) and not selector.maker.anybody else None


def _inodes(pid: int) -> set[int]:
    try:
        return process_sockets(pid)
    except HintError:
        return set()  # gone, or not ours to see


def rows_of(selector: Selector, rows: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which rows of the directory a selector means, shape (n,), whoever made them."""
    if isinstance(selector, CookieSelector):
        return np.zeros(len(rows), dtype=np.bool_)
    key = rows["key"]
    swap = key["dport"].dtype.newbyteorder(">")
    dport = key["dport"].view(swap)
    out = (dport >= selector.dport.first) & (dport <= selector.dport.last)
    if isinstance(selector, ProcessSelector | RuleSelector) and selector.remote is not None:
        out &= _within(key["daddr"], selector.remote)
    if isinstance(selector, ProcessSelector):
        return out
    sport = key["sport"].view(swap)
    out &= (sport >= selector.sport.first) & (sport <= selector.sport.last)
    if isinstance(selector, RuleSelector):
        return out
    out &= _within(key["daddr"], ipaddress.ip_network(selector.dst))
    if selector.src is not None:
        out &= _within(key["saddr"], ipaddress.ip_network(selector.src))
    return out


def _within(
    addresses: npt.NDArray[np.uint8], network: ipaddress.IPv4Network | ipaddress.IPv6Network
) -> npt.NDArray[np.bool_]:
    """Which of (n, 16) addresses lie in a network."""
    wanted, mask = (np.frombuffer(raw, "u1") for raw in masked(network))
    inside: npt.NDArray[np.bool_] = np.all((addresses & mask) == (wanted & mask), axis=1)
    return inside


def listed_of(
    selector: ProcessSelector | RuleSelector, every: Iterable[Listed], meaning: Callable[[Maker], Makers]
) -> list[Listed]:
    """Which sockets of a listing a selector means.

    It says which cgroup made them, and who has them now as far as others' processes may be looked at; not the thread.
    """
    maker = maker_of(selector) or Maker()
    meant = meaning(maker)
    if meant.tids is not None:
        return []
    inodes = None if meant.pids is None else {i for pid in meant.pids for i in _inodes(pid)}
    return [
        s
        for s in every
        if selector.covers(s.endpoints)
        and (inodes is None or s.inode in inodes)
        and (meant.cgroups is None or s.cgroup in meant.cgroups)
        and (maker.uid < 0 or s.uid == maker.uid)
    ]
