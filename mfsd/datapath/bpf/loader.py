# SPDX-License-Identifier: Apache-2.0
"""What any loader of the classifier gives to the rest: file descriptors, mapped tables, typed errors.

A loader turns bpf/classifier.bpf.c into a program and its maps in the kernel. There are two: libbpf (``libbpf.py``)
and BCC. Both hand out the same :class:`Classifier`, which knows nothing of how it came to be: a program descriptor
and map descriptors by name.

The first classifier makes the maps of the host (slots, keys, heartbeat). The classifiers of further devices share
them and add their own device map, counters and program.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from mfsd.datapath import _abi
from mfsd.datapath.bpf.keys import KeyMap
from mfsd.datapath.bpf.syscall import BpfMap, possible_cpus
from mfsd.datapath.errors import LoaderError

PROGRAM: Final = "mfsd_classify"
"""Name of the program in the object, in the kernel's lists and of the clsact filter."""

SHARED_MAPS: Final = ("mfsd_host", "mfsd_slots", "mfsd_cookies", "mfsd_tuples")
RESIZED: Final = SHARED_MAPS[1:]
"""Those with as many elements as the table has rows."""
DEVICE_MAPS: Final = ("mfsd_dev", "mfsd_stats", "mfsd_bands")

MAP_SIZES: Final[dict[str, tuple[int, int]]] = {
    "mfsd_host": (4, _abi.HOST_DTYPE.itemsize),
    "mfsd_slots": (4, _abi.SLOT_DTYPE.itemsize),
    "mfsd_cookies": (8, 4),
    "mfsd_tuples": (_abi.TUPLE_DTYPE.itemsize, 4),
    "mfsd_dev": (4, _abi.DEV_DTYPE.itemsize),
    "mfsd_stats": (4, 8),
    "mfsd_bands": (4, _abi.COUNTER_DTYPE.itemsize),
}
"""(key bytes, value bytes) that every map must have, from the generated layouts."""

MAX_SLOTS: Final = 1 << 20
"""A bound against typing errors: 64 MiB of slots and about twice that in hash elements."""


class Loader(Protocol):
    """A way to get the classifier into the kernel."""

    def open_classifier(self, slots: int, share: Classifier | None = None) -> Classifier:
        """Load the classifier with a table of ``slots`` rows, or with the tables of ``share``.

        Raises LoaderError. With ``share``, ``slots`` must be the number of rows that ``share`` has.
        """


@dataclass(slots=True)
class Mapped:
    """A mmapable map seen as a numpy array. The mapping lives until the last view of it is gone."""

    array: npt.NDArray[Any]
    pages: mmap.mmap

    @classmethod
    def open(cls, fd: int, dtype: np.dtype[Any], count: int) -> Mapped:
        """Map ``count`` elements of a BPF_F_MMAPABLE array; shape (count,), writable. Raises OSError."""
        size = -(-dtype.itemsize * count // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        return cls(np.frombuffer(pages, dtype=dtype, count=count), pages)


@dataclass(slots=True)
class Classifier:
    """A loaded classifier: one program for one device, and its tables.

    ``slots``, ``host`` and ``dev`` are the kernel's own memory: shape (rows,), (1,) and (1,), dtypes of ``_abi``.
    Writing to them takes effect at the next packet. ``cookies`` and ``tuples`` lead from keys to rows. Numpy views
    taken from here stay valid after :meth:`close`, but nothing reads them any more.
    """

    prog_fd: int
    map_fds: dict[str, int]
    """Descriptors by map name; all of this classifier's own, also those of shared maps."""
    slots: npt.NDArray[Any] = field(init=False)
    host: npt.NDArray[Any] = field(init=False)
    dev: npt.NDArray[Any] = field(init=False)
    cookies: KeyMap = field(init=False)
    tuples: KeyMap = field(init=False)
    rows: int = 0
    """Rows of the slot table."""
    _mapped: list[Mapped] = field(init=False, default_factory=list)
    _stats: BpfMap = field(init=False)
    _bands: BpfMap = field(init=False)
    _cpus: int = field(init=False, default_factory=possible_cpus)
    _closed: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        parts = (
            ("mfsd_slots", _abi.SLOT_DTYPE, self.rows),
            ("mfsd_host", _abi.HOST_DTYPE, 1),
            ("mfsd_dev", _abi.DEV_DTYPE, 1),
        )
        for name, dtype, count in parts:
            self._mapped.append(Mapped.open(self.map_fds[name], dtype, count))
        self.slots, self.host, self.dev = (m.array for m in self._mapped)
        self.cookies, self.tuples = (
            KeyMap(self.map_fds[name], MAP_SIZES[name][0]) for name in ("mfsd_cookies", "mfsd_tuples")
        )
        # Both value sizes are multiples of 8, so the kernel adds no padding between the copies.
        self._stats, self._bands = (
            BpfMap(self.map_fds[name], MAP_SIZES[name][0], MAP_SIZES[name][1] * self._cpus)
            for name in ("mfsd_stats", "mfsd_bands")
        )

    def stats(self) -> npt.NDArray[np.uint64]:
        """Packets per ``enum mfsd_stat`` on this device, all CPUs summed; shape (STAT_MAX,), uint64."""
        per_cpu: npt.NDArray[np.uint64] = self._per_cpu(self._stats, np.dtype(np.uint64), _abi.STAT_MAX)
        out: npt.NDArray[np.uint64] = per_cpu.sum(axis=1, dtype=np.uint64)
        return out

    def bands(self) -> npt.NDArray[Any]:
        """What was sent to each band of this device, all CPUs summed; shape (MAX_BANDS,), COUNTER_DTYPE."""
        per_cpu = self._per_cpu(self._bands, _abi.COUNTER_DTYPE, _abi.MAX_BANDS)
        out = np.zeros(_abi.MAX_BANDS, dtype=_abi.COUNTER_DTYPE)
        for name in ("packets", "bytes"):
            out[name] = per_cpu[name].sum(axis=1, dtype=np.uint64)
        return out

    def _per_cpu(self, table: BpfMap, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        """All copies of a per-CPU array; shape (count, possible CPUs)."""
        rows = [table.lookup(i.to_bytes(4, "little")) or b"" for i in range(count)]  # an array has all its elements
        return np.frombuffer(b"".join(rows), dtype=dtype).reshape(count, self._cpus)

    def close(self) -> None:
        """Give everything back. Maps and program live on while a link, a filter or another classifier uses them."""
        if self._closed:
            return
        self._closed = True
        del self.slots, self.host, self.dev
        for mapped in self._mapped:
            pages = mapped.pages
            del mapped.array
            with contextlib.suppress(BufferError):  # somebody still holds a view; the mapping goes with it
                pages.close()
        for fd in (self.prog_fd, *self.map_fds.values()):
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def own_copy(fd: int) -> int:
    """Duplicate a descriptor, close-on-exec."""
    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)


def check_sizes(name: str, key_size: int, value_size: int) -> None:
    """Compare a map of an object with the generated layouts. Raises LoaderError when they differ."""
    if (key_size, value_size) != MAP_SIZES[name]:
        raise LoaderError(
            f"map {name} of the BPF object",
            f"key and value are {key_size} and {value_size} bytes, this mfsd expects {MAP_SIZES[name]}",
            "object and mfsd/datapath/_abi.py come from different builds: run scripts/build.py, or reinstall mfsd",
        )


def check_rows(slots: int, share: Classifier | None) -> None:
    """Refuse table sizes that can't be meant. Raises LoaderError."""
    if not 1 <= slots <= MAX_SLOTS:
        raise LoaderError("slot table", f"{slots} rows", f"choose 1 to {MAX_SLOTS}")
    if share is not None and slots != share.rows:
        raise LoaderError("slot table", f"{slots} rows asked for, but the shared table has {share.rows}")
