# SPDX-License-Identifier: Apache-2.0
"""Network namespaces of pods behind the shaped device of a pair: on a bridge with it, or routed by its host."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from support.namespaces import NetnsPair

_VETH: Final = ["link", "add", "p0", "type", "veth", "peer", "name", "eth0", "netns"]


@contextlib.contextmanager
def _pod(pair: NetnsPair, address: str, host: str) -> Iterator[NetnsPair]:
    """A namespace with eth0, whose other end is p0 in the host's; the pair with it in the host's place."""
    pod = f"{pair.a}-pod"
    with contextlib.ExitStack() as stack:
        subprocess.run(["ip", "netns", "add", pod], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", pod], check=True)
        subprocess.run(["ip", "-n", pair.a, *_VETH, pod], check=True)
        pair.run(pair.a, host)
        pair.run(pod, f"ip link set lo up; ip addr add {address}/24 dev eth0; ip link set eth0 up")
        yield replace(pair, a=pod, addr_a=address)


@contextlib.contextmanager
def routed(pair: NetnsPair) -> Iterator[NetnsPair]:
    """10.79.0.9: its packets have lost their socket when they leave."""
    with _pod(
        pair, "10.79.0.9", "ip addr add 10.79.0.1/24 dev p0; ip link set p0 up; sysctl -qw net.ipv4.ip_forward=1"
    ) as pod:
        pair.run(pod.a, "ip route add default via 10.79.0.1")
        pair.run(pair.b, f"ip route add 10.79.0.0/24 via {pair.addr_a}")
        yield pod


@contextlib.contextmanager
def bridged(pair: NetnsPair, *, seen: int = 0) -> Iterator[NetnsPair]:
    """10.77.0.9. ``seen``: netfilter sees what the bridge brings."""
    if subprocess.run(["ip", "-n", pair.a, "link", "add", "br0", "type", "bridge"], check=False).returncode:
        pytest.skip("this kernel has no bridge")
    if seen and not Path("/proc/sys/net/bridge").exists():
        pytest.skip("this kernel has no br_netfilter loaded")
    for table in ("iptables", "ip6tables"):
        pair.run(pair.a, f"s=net.bridge.bridge-nf-call-{table}; ! sysctl -n $s || sysctl -qw $s={seen}")
    move = f"ip addr del {pair.addr_a}/24 dev v0; ip link set v0 master br0; ip link set p0 master br0"
    up = f"ip addr add {pair.addr_a}/24 dev br0; ip link set br0 up; ip link set p0 up"
    with _pod(pair, "10.77.0.9", f"{move}; {up}") as pod:
        yield pod


PODS: Final[dict[str, Callable[[NetnsPair], AbstractContextManager[NetnsPair]]]] = {
    "bridged": bridged,
    "routed": routed,
}
