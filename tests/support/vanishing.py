# SPDX-License-Identifier: Apache-2.0
"""A device that goes away in the middle of something: before the n-th question to the kernel, for every n."""

from __future__ import annotations

import fcntl
import itertools
from typing import TYPE_CHECKING, Any, TypeVar

from mfsd.datapath import tc
from mfsd.datapath.bpf import syscall

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

T = TypeVar("T")


class Vanishing:
    """Counts what is asked by tc's socket, bpf(2) and ioctl(2); all of it really asked of the kernel."""

    def __init__(self, before: int, remove: Callable[[], object]) -> None:
        self.asked = 0
        self._before = before
        self._remove = remove

    @property
    def happened(self) -> bool:
        """The device is gone."""
        return self.asked >= self._before

    def counted(self, function: Callable[..., T]) -> Callable[..., T]:
        def call(*args: Any, **more: Any) -> T:
            self.asked += 1
            if self.asked == self._before:
                self._remove()
            return function(*args, **more)

        return call


def vanishings(
    monkeypatch: pytest.MonkeyPatch, prepare: Callable[[], object], remove: Callable[[], object]
) -> Iterator[Vanishing]:
    """One after the other, each prepared anew; the last is the first that does not happen."""
    for before in itertools.count(1):
        prepare()
        vanishing = Vanishing(before, remove)
        with monkeypatch.context() as m:
            m.setattr(tc.TcSocket, "_send", vanishing.counted(tc.TcSocket._send))
            m.setattr(syscall, "call", vanishing.counted(syscall.call))
            m.setattr(fcntl, "ioctl", vanishing.counted(fcntl.ioctl))
            yield vanishing
        if not vanishing.happened:
            remove()
            return
