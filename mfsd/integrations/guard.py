# SPDX-License-Identifier: Apache-2.0
"""What keeps hints from ever harming who sends them, and what integrations share to make them."""

from __future__ import annotations

import logging
import os
import socket
import threading
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from mfsd.client import Client, Stage, tuple_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.ground.model import TupleSelector

P = ParamSpec("P")

RESOLVED_MAX: Final = 4096

log = logging.getLogger("mfsd.integrations")


class Guard:
    """Runs pieces of code whose failure must not be the caller's; each cause is logged once. Thread-safe."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, what: str, body: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Run ``body``; if it fails, say once that ``what`` did."""
        try:
            body(*args, **kwargs)
        except Exception as e:  # whatever it is, serving goes on
            cause = f"{what}: {type(e).__name__}"
            if cause not in self._said and len(self._said) < RESOLVED_MAX:
                self._said.add(cause)
                log.exception("mfsd: %s failed; serving goes on without these hints", what)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whom bytes belong to: a request that has been announced; background needs none."""

    request: str = ""
    stage: Stage = Stage.BACKGROUND
    deadline_s: float | None = None

    def announce(self, client: Client, name: str, selector: TupleSelector, size: int) -> None:
        """A transfer of its, among others on the same connections."""
        client.transfer(
            name, selector, size, stage=self.stage, request=self.request, deadline_s=self.deadline_s, interleaved=True
        )


def client(target: str | None = None, **more: Any) -> Client:
    """A client; one that sends nothing where there can't be one (gevent's patched threads)."""
    try:
        return Client(target=target, **more)
    except (RuntimeError, ValueError) as e:
        log.warning("mfsd: no hints are sent: %s", e)
        return Client(target="")


class Resolver:
    """Addresses of hosts, without waiting: a name is looked up in the background, and unknown until then."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._asked: set[str] = set()

    def address(self, host: str) -> str:
        """Its address; empty: not known (yet)."""
        try:
            return str(ip_address(host))
        except ValueError:
            pass
        if host not in self._known and host not in self._asked and len(self._asked) < RESOLVED_MAX:
            self._asked.add(host)
            threading.Thread(target=self._resolve, args=(host,), name="mfsd-resolve", daemon=True).start()
        return self._known.get(host, "")

    def _resolve(self, host: str) -> None:
        try:
            self._known[host] = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
        except OSError:
            self._asked.discard(host)

    def ours_towards(self, address: str) -> str:
        """Our address on the way to another one: what the kernel would choose. Sends nothing; empty: no way there."""
        if not address:
            return ""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as s:
                s.connect((address, 9))
                return str(s.getsockname()[0])
        except OSError:
            return ""

    def way(self, host: str, ports: tuple[int, int], *, reads: bool) -> TupleSelector | None:
        """Connections with the listener of a peer that bytes take: they leave it for a read, us for a write."""
        there = self.address(host)
        here = self.ours_towards(there)
        if not there or not here:
            return None
        return tuple_of(here, 0, there, ports) if reads else tuple_of(there, ports, here)


def ports(text: str) -> tuple[int, int]:
    """A range as UCX_TCP_PORT_RANGE has it ("20000-20099"); (0, 0), which is any, for what is none."""
    first, _, last = text.partition("-")
    if not first.strip().isdecimal() or not (last or first).strip().isdecimal():
        return 0, 0
    pair = int(first), int(last or first)
    return pair if 0 < pair[0] <= pair[1] < 65536 else (0, 0)


def mooncake_ports() -> tuple[int, int]:
    """First and last port of Mooncake's listeners, here and at its peers."""
    low, high = os.environ.get("MC_MIN_RPC_PORT", "15000"), os.environ.get("MC_MAX_RPC_PORT", "17000")
    return ports(f"{low}-{high}")
