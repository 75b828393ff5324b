# SPDX-License-Identifier: Apache-2.0
"""Descriptors kept back, so that clients who hold all the others don't keep the daemon from caring for its devices."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Iterator

ENOUGH: Final = 8
"""Of one device: sockets for netlink, for questions to the driver, a link, a map, files of /proc, the note."""


class Reserve:
    """Holds descriptors, and gives them up while there is work that may need them. For one thread at a time."""

    def __init__(self) -> None:
        self._held: list[int] = []
        self._fill()

    def _fill(self) -> None:
        with contextlib.suppress(OSError):  # somebody has taken some meanwhile; they are taken back next time
            while len(self._held) < ENOUGH:
                self._held.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))

    @contextlib.contextmanager
    def given_up(self) -> Iterator[None]:
        """The descriptors are there to be used."""
        self.close()
        try:
            yield
        finally:
            self._fill()

    def close(self) -> None:
        """Idempotent."""
        held, self._held = self._held, []
        for fd in held:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
