# SPDX-License-Identifier: Apache-2.0
"""See benches.py."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from support.benches import Bench

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair


@pytest.fixture
def bench(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Bench]:
    """The test runs inside the sending namespace."""
    # Neighbour discovery would count as default traffic.
    for name, dev, peer in (
        (netns_pair.a, netns_pair.dev_a, (netns_pair.b, netns_pair.dev_b, netns_pair.addr_b)),
        (netns_pair.b, netns_pair.dev_b, (netns_pair.a, netns_pair.dev_a, netns_pair.addr_a)),
    ):
        mac = netns_pair.run(peer[0], f"cat /sys/class/net/{peer[1]}/address").strip()
        netns_pair.run(name, f"ip neigh replace {peer[2]} lladdr {mac} dev {dev} nud permanent")
        netns_pair.run(name, f"sysctl -qw net.ipv6.conf.{dev}.disable_ipv6=1")
    with contextlib.ExitStack() as stack:
        stack.enter_context(netns_pair.inside(netns_pair.a))
        yield Bench(netns_pair, tmp_path / "state", stack)
