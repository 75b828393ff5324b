# SPDX-License-Identifier: Apache-2.0
"""Where the kernel does not tell of connections, they are listed: that is said, and what matters still holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.habits import KIB, MB, PORT, Sink, band, dial, settled
from support.rig import Daemon, running
from support.waiting import wait_for

from mfsd.client import Stage, tuple_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns

NO_CGROUPS = (
    "unshare", "--mount", "sh", "-ec",
    ('for m in $(grep " - cgroup2 " /proc/self/mountinfo | cut -d" " -f5); do umount -l $m; done; '
    'exec setpriv --bounding-set=-all,+bpf,+net_admin --inh-caps=-all,+bpf,+net_admin "$@"'),
    "no cgroups",
)  # fmt: skip
"""Nobody has mounted cgroup v2, and the daemon may not do so either."""


@pytest.fixture(params=["configured", "no cgroup v2"])
def daemon(request: pytest.FixtureRequest, netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(netns_pair, tmp_path, wrap=() if request.param == "configured" else NO_CGROUPS)
    if request.param == "configured":
        one.write_config(daemon='sockets = "listing"')
    with running(one):
        yield one


def test_what_lists_sockets_says_so_and_why(daemon: Daemon) -> None:
    (notice,) = [n for n in daemon.status().notices if "does not tell of connections" in n]
    assert "inet_diag" in notice
    shown = daemon.mfsctl("--socket", str(daemon.socket), "status").stdout
    assert "inet_diag" in shown
    configured = "listing" in daemon.config.read_text()
    assert ('daemon.sockets = "listing"' if configured else "cgroup v2") in notice
    if configured:
        found = daemon.mfsctl("doctor", "--config", str(daemon.config)).stdout
        assert "loader.sockets" in found
        assert "listed by inet_diag" in found


def test_transfers_on_kept_and_on_closed_connections(daemon: Daemon) -> None:
    with Sink(daemon.pair) as sink, daemon.client() as client:
        client.request("kept", ttft_left_s=60)
        with dial(daemon.pair) as s:
            for i in range(5):
                client.transfer(f"k{i}", s, MB, stage=Stage.P2D, request="kept")
                assert client.flush(5)
                s.sendall(bytes(MB))
            client.done(request="kept")
            settled(daemon, (5, 1, 0))
        for i in range(10):
            with dial(daemon.pair) as s:
                client.request(f"r{i}", ttft_left_s=5.0)
                client.transfer(f"t{i}", s, 256 * KIB, stage=Stage.P2D, request=f"r{i}")
                assert client.flush(5)
                s.sendall(bytes(256 * KIB))
                client.done(request=f"r{i}")
        settled(daemon, (15, 11, 0))
        sink.gets(5 * MB + 10 * 256 * KIB)


def test_a_mark_by_addresses_holds_for_connections_to_come(daemon: Daemon) -> None:
    with Sink(daemon.pair), daemon.client() as client:
        client.mark(tuple_of(daemon.pair.addr_b, PORT), Stage.COLLECTIVE)
        assert client.flush(5)
        wait_for(lambda: daemon.status().pending_selectors == 1, "it to be named after a second")
        for _ in range(2):
            with dial(daemon.pair) as s:
                wait_for(lambda s=s: band(daemon, s) == "level 0", "the mark")  # type: ignore[misc]
        client.close()
        wait_for(lambda: daemon.status().connections == 0, "the end")
