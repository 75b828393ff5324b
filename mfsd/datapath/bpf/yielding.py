# SPDX-License-Identifier: Apache-2.0
"""Connections that yield in the network: loading, registering and attaching bpf/yield.bpf.c, and what it has learnt.

The algorithm is registered by a link, and the program that gives it to connections hangs on the root of cgroup v2 by
another: both go with the process. Connections that run it then keep its code and its maps until their next packet, at
which they find the sign of life too old and go back to the algorithm that they had.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np

from mfsd.datapath import _abi
from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.cgroup import SOCK_OPS, attach
from mfsd.datapath.bpf.keys import address_bytes
from mfsd.datapath.bpf.libbpf import BpfObject, object_path
from mfsd.datapath.bpf.loader import Mapped
from mfsd.datapath.bpf.syscall import BpfMap
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from mfsd.datapath.bpf.loader import Classifier
    from mfsd.ground.model import Address

NAME: Final = "mfsd_yield"
"""Of the algorithm, as TCP_CONGESTION and ss(8) call it; a further daemon's has a number behind it."""
NAMES: Final = 64
FIX: Final = "it needs CAP_PERFMON besides CAP_BPF and CAP_NET_ADMIN (AmbientCapabilities= in the unit)"
BTF: Final = Path("/sys/kernel/btf/vmlinux")
OPS: Final = "mfsd_yielding"
GIVE: Final = "mfsd_mannered"
ADOPT: Final = "mfsd_adopt"
WAKE: Final = "mfsd_wake"
LEFT: Final = "mfsd_left"
_SHARED: Final = ("mfsd_host", "mfsd_slots", "mfsd_cookies")
_OWN: Final = ("mfsd_yield", "mfsd_paths", "mfsd_far", "mfsd_adopted")
ADDRESS_BYTES: Final = 16
_TRACE_ITER: Final = 28
_TRACE_RAW_TP: Final = 23
"""enum bpf_attach_type."""


def missing(btf: bytes | None = None) -> str:
    """What this kernel lacks for it; empty: nothing. ``btf``: of its types, for tests."""
    release = platform.release()
    if btf is None:
        try:
            btf = BTF.read_bytes()
        except OSError as e:
            return f"kernel {release} does not describe its types in {BTF} ({e.strerror}): CONFIG_DEBUG_INFO_BTF"
    if b"\0BPF_STRUCT_OPS\0" not in btf:
        return f"kernel {release} has no links for congestion controls, which would outlive the daemon: Linux 6.4"
    if b"\0cubictcp_cong_avoid\0" not in btf:
        return f"cubic is not part of kernel {release}: CONFIG_TCP_CONG_CUBIC=y"
    return ""


class Yielding:
    """Loaded and attached. Raises LoaderError, with a named cause, where kernel or rights have not what it takes."""

    def __init__(self, classifier: Classifier) -> None:
        """``classifier``: whose slots and keys decide."""
        lack = missing()
        if lack:
            raise LoaderError("yielding in the network", lack)
        self._fds: list[int] = []
        self.name = ""
        self.path_map = -1
        """Descriptor: PATH_KEY_DTYPE -> PATH_DTYPE."""
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._load(classifier)
            self._fds += attach([(self._give, SOCK_OPS)])
            try:
                self._fds.append(syscall.link_create(self._left, 0, _TRACE_RAW_TP, 0))
            except OSError as e:
                raise LoaderError("watching when packets leave", str(e), FIX) from e
            undo.pop_all()

    def _load(self, classifier: Classifier) -> None:
        for number in range(NAMES):
            name = f"{NAME}{number or ''}"
            with BpfObject(object_path("yield"), {NAME: name}) as obj:
                for shared in _SHARED:
                    obj.reuse_map(shared, classifier.map_fds[shared])
                obj.link_map(OPS)
                _permitted(obj.load)
                try:
                    self._fds.append(obj.register(OPS))
                except OSError as e:
                    if e.errno == errno.EEXIST:
                        continue
                    raise LoaderError("registering the congestion control", str(e), FIX) from e
                self.name = name
                self._give, self._adopt = obj.program_fd(GIVE), obj.program_fd(ADOPT)
                maps = {name: obj.map_fd(name) for name in _OWN}
                self._wake = obj.program_fd(WAKE)
                self._left = obj.program_fd(LEFT)
                self._fds += [self._give, self._adopt, self._wake, self._left, *maps.values()]
                break
        else:
            raise LoaderError("registering the congestion control", f"{NAMES} daemons have theirs already")
        self._settings = Mapped.open(maps["mfsd_yield"], _abi.YIELD_DTYPE, 1)
        self._adopted = Mapped.open(maps["mfsd_adopted"], _abi.ADOPTED_DTYPE, 1)
        self.path_map = maps["mfsd_paths"]
        self._far = BpfMap(maps["mfsd_far"], ADDRESS_BYTES, _abi.FAR_DTYPE.itemsize)

    @property
    def settings(self) -> npt.NDArray[Any]:
        """The kernel's own memory: shape (1,), YIELD_DTYPE. What is written takes effect at the next packet."""
        return self._settings.array

    def tell_far(self, peer: Address, rate: float, target_s: float) -> None:
        """The link into a peer is slower than ours: bytes/s, and the queue to keep there.

        ``rate`` 0: that is not so any more. Known on ways in use within a fifth of a second. Raises OSError: E2BIG for
        more than ``_abi.FARS`` peers.
        """
        key = address_bytes(peer)
        if rate:
            value: npt.NDArray[Any] = np.array([(int(rate), int(target_s * 1e6), 0)], dtype=_abi.FAR_DTYPE)
            self._far.update(key, value.tobytes())
            return
        try:
            self._far.delete(key)
        except OSError as e:
            if e.errno != errno.ENOENT:
                raise

    def adopt(self) -> tuple[int, int]:
        """Look at all connections of the calling thread's network namespace, also those that are older than we are.

        How many got the algorithm, and how many have to be looked at again, as the kernel will not tell when they are
        deferred (before Linux 6.12). Raises OSError.
        """
        self._adopted.array[:] = 0
        _iterate(self._adopt)
        found = self._adopted.array[0]
        return int(found["switched"]), int(found["deaf"])

    def wake(self) -> None:
        """Tell connections of the calling thread's network namespace that are not deferred any more of that now.

        Those that sleep until their next packet is due would hear of it then. It goes through all connections there
        are. Raises OSError.
        """
        _iterate(self._wake)

    def paths(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """What is known of the ways to peers, by band: PATH_KEY_DTYPE and PATH_DTYPE rows."""
        return syscall.map_dump(self.path_map, _abi.PATH_KEY_DTYPE, _abi.PATH_DTYPE, _abi.PATHS)

    def close(self) -> None:
        """Unregister and detach. Connections that run the algorithm go back at their next packet. Idempotent."""
        fds, self._fds = self._fds, []
        for fd in reversed(fds):
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _iterate(program: int) -> None:
    link = syscall.link_create(program, 0, _TRACE_ITER, 0)
    try:
        syscall.iterate(link)
    finally:
        os.close(link)


def _permitted(load: Callable[[], None]) -> None:
    try:
        load()
    except LoaderError as e:
        if e.log_tail or e.cause not in {os.strerror(code) for code in (errno.EPERM, errno.EACCES)}:
            raise
        raise LoaderError(e.what, e.cause, FIX) from e
