# SPDX-License-Identifier: Apache-2.0
"""What a daemon is taken away while it runs: descriptors, threads, files. It ends as it should all the same."""

from __future__ import annotations

import resource
import signal
from typing import TYPE_CHECKING

import grpc
import pytest
from support.rig import Daemon, running, tc_state
from support.waiting import wait_for

if TYPE_CHECKING:
    from pathlib import Path

    from support.namespaces import NetnsPair

pytestmark = pytest.mark.netns


@pytest.mark.parametrize(
    ("limit", "much"),
    [("RLIMIT_NOFILE", 12), ("RLIMIT_NPROC", 0), ("RLIMIT_FSIZE", 0)],
    ids=lambda value: str(value).removeprefix("RLIMIT_"),
)
def test_without_it_the_device_comes_back(netns_pair: NetnsPair, tmp_path: Path, limit: str, much: int) -> None:
    netns_pair.run(netns_pair.a, f"tc qdisc add dev {netns_pair.dev_a} root handle 9: pfifo limit 77")
    before = tc_state(netns_pair)
    daemon = Daemon(netns_pair, tmp_path)
    with running(daemon):
        resource.prlimit(daemon.pid, getattr(resource, limit), (much, much))
        # So that it has something to do for the device, and a note to write.
        netns_pair.run(netns_pair.a, f"ip link set {netns_pair.dev_a} mtu 1400; rm {tmp_path}/qdisc-*")

        def noticed() -> bool:
            try:
                return bool(list(tmp_path.glob("qdisc-*"))) or "its note was lost" in " ".join(daemon.status().notices)
            except grpc.RpcError:  # without descriptors nobody can ask
                return limit == "RLIMIT_NOFILE"

        wait_for(noticed)
        assert daemon.end(signal.SIGTERM) == 0
    assert tc_state(netns_pair) == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("qdisc-")] == []
