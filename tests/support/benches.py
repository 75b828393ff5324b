# SPDX-License-Identifier: Apache-2.0
"""A bench for enforcement: a device in a namespace of its own, and packets whose priority names a class."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.ground.bands import Bands
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    import contextlib
    from pathlib import Path

    from support.namespaces import NetnsPair

SNDBUFFORCE: Final = 32
RCVBUFFORCE: Final = 33
PAYLOAD: Final = 1000
FRAME: Final = PAYLOAD + 8 + 20 + 14
"""Bytes of one of our packets as a qdisc counts it: UDP, IPv4 and Ethernet headers."""
PORT: Final = 9000


def plan(levels: int = 4, **changes: Any) -> Bands:
    """Control, levels 0 and 1, default, the other levels, background, scavenger; four lanes, floors as of old."""
    bare: dict[str, Any] = {"level_floors": (0.0,) * levels, "background_floor": 0.0, "scavenger_floor": 0.0}
    return Bands.build(levels, **({"default_after": 2, "lanes": 4} | bare | changes))


@dataclass
class Bench:
    """Makes enforcers on the sending end; sends from there and receives at the other."""

    pair: NetnsPair
    state: Path
    stack: contextlib.ExitStack
    bands: Bands = field(default_factory=plan)

    @property
    def dev(self) -> str:
        return self.pair.dev_a

    def enforcer(self, rate: str | None = "1gbit", backend: str = "htb", bands: Bands | None = None) -> DeviceEnforcer:
        parsed = None if rate is None else Rate.parse(rate)
        made = DeviceEnforcer(self.dev, bands or self.bands, backend, parsed, self.state)
        self.stack.callback(made.close)
        return made

    def tc(self, command: str) -> None:
        self.pair.run(self.pair.a, f"tc {command.replace('DEV', self.dev)}")

    def shown(self) -> list[str]:
        """What tc shows of the device, statistics aside, and the queue length."""
        commands = f"tc -d qdisc show dev {self.dev}; tc -d class show dev {self.dev}; ip -o link show dev {self.dev}"
        text = self.pair.run(self.pair.a, commands)
        return sorted(line.strip() for line in text.splitlines())

    def sender(self, priority: int = 0) -> socket.socket:
        """Its packets name a class, as the classifier's do."""
        s = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        s.setsockopt(socket.SOL_SOCKET, SNDBUFFORCE, 64 << 20)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
        s.connect((self.pair.addr_b, PORT))
        return s

    def send(self, priority: int, count: int, tag: int = 0) -> None:
        s = self.sender(priority)
        for _ in range(count):
            s.send(struct.pack("=I", tag).ljust(PAYLOAD, b"."))

    def receiver(self) -> socket.socket:
        """At the other end; packets wait in it until they are read."""
        with self.pair.inside(self.pair.b):
            s = self.stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        s.setsockopt(socket.SOL_SOCKET, RCVBUFFORCE, 64 << 20)
        s.bind((self.pair.addr_b, PORT))
        s.settimeout(20)
        return s

    def tags(self, receiver: socket.socket, count: int) -> list[int]:
        """Of the next packets, in the order of their arrival."""
        return [struct.unpack_from("=I", receiver.recv(2000))[0] for _ in range(count)]
