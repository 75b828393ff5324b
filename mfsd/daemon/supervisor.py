# SPDX-License-Identifier: Apache-2.0
"""The service manager: notes to it (sd_notify(3)), and descriptors that it keeps for the next daemon (its fd store).

Without one, everything here does nothing.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from _typeshed import HasFileno

FIRST: Final = 3
"""Number of the first descriptor that is handed over (SD_LISTEN_FDS_START, sd_listen_fds(3))."""

DIGITS: Final = 18
"""Of the largest number that is believed."""


class Supervisor:
    """Who started this daemon and starts the next one."""

    def __init__(self, environment: Mapping[str, str], held: Iterable[str] = ()) -> None:
        """``environment``: that of the process (NOTIFY_SOCKET, WATCHDOG_USEC); ``held``: names of what it keeps now."""
        self.watchdog_s = _number(environment, "WATCHDOG_USEC") / 1e6
        """It wants a sign of life at least so often; 0: it does not care."""
        self._kept: dict[str, int | HasFileno] = dict.fromkeys(held, -1)
        self._next_beat = 0.0
        self._socket: socket.socket | None = None
        address = environment.get("NOTIFY_SOCKET", "")
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            # A manager that does not read must not stop the engine: what can't be sent is dropped.
            self._socket.setblocking(False)
            # "@": an abstract address (unix(7))
            self._address = "\0" + address[1:] if address.startswith("@") else address

    def tell(self, state: str, descriptors: Sequence[int | HasFileno] = ()) -> None:
        """Send one note."""
        if self._socket is not None:
            rights = array.array("i", [d if isinstance(d, int) else d.fileno() for d in descriptors])
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else []
            with contextlib.suppress(OSError):
                self._socket.sendmsg([state.encode()], ancillary, 0, self._address)

    def beat(self, now: float) -> None:
        """Say that the daemon lives, as often as the watchdog needs it (seconds, any clock that only grows)."""
        if self.watchdog_s and now >= self._next_beat:
            self._next_beat = now + self.watchdog_s / 3
            self.tell("WATCHDOG=1")

    @property
    def present(self) -> bool:
        """There is one."""
        return self._socket is not None

    def keep(self, wanted: Mapping[str, int | HasFileno]) -> None:
        """Have it hold copies of these descriptors, by name, and of no others.

        Objects are told apart by themselves: the next one of a name may have the number of the one before.
        """
        for name in [n for n, fd in self._kept.items() if wanted.get(n) != fd]:
            self.tell(f"FDSTOREREMOVE=1\nFDNAME={name}")
            del self._kept[name]
        for name in wanted.keys() - self._kept.keys():
            # FDPOLL=0: poll(2) on a BPF map reports an error, upon which the manager would drop it.
            self.tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [wanted[name]])
            self._kept[name] = wanted[name]

    def close(self) -> None:
        """Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def handed_over(environment: Mapping[str, str], pid: int) -> dict[str, int]:
    """Descriptors by name that the manager gave to the process ``pid``: what an earlier daemon had it keep.

    Of several with one name the last. Call it once: the descriptors are the caller's to close.
    """
    if environment.get("LISTEN_PID") != str(pid):
        return {}
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for fd, name in enumerate(names[: _number(environment, "LISTEN_FDS")], FIRST):
        try:
            os.set_inheritable(fd, False)
        except OSError:  # there is none of that number
            continue
        if name in found:
            os.close(found[name])
        found[name] = fd
    return found


def _number(environment: Mapping[str, str], name: str) -> int:
    """A count of the manager's; 0 for what is none."""
    text = environment.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= DIGITS else 0
