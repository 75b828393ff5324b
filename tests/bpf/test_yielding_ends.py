# SPDX-License-Identifier: Apache-2.0
"""What becomes of connections that yield when a daemon ends, and when the next one begins."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING

import pytest
from support.waiting import wait_for
from support.yielders import FIRST, RATE, needs_it, sleeper

from mfsd.daemon.network import Network
from mfsd.daemon.network_section import NetworkConfig
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.yielding import Yielding
from mfsd.ground.bands import Bands
from mfsd.lab.hosts.tcp import algorithm_of, queued

if TYPE_CHECKING:
    from support.yielders import Bench

ON = NetworkConfig(**{"yield": "on"})
BANDS = Bands.build(4, default_after=2, lanes=4)

pytestmark = [pytest.mark.bpf, needs_it]


def test_the_next_one_takes_over_who_yields(bench: Bench) -> None:
    sock = bench.connect()
    bench.hint(sock, FIRST)
    bench.becomes(sock, bench.yielding.name)
    bench.yielding.close()
    with Yielding(bench.classifier) as next_one:
        bench.obey(next_one)
        bench.sends_until(sock, lambda: bool(next_one.paths()[1]["samples"].any()))
        bench.forget(sock)
        bench.becomes(sock, "cubic")  # what the one before had found is not known


def test_who_gets_another_algorithm_sleeps_no_longer(bench: Bench) -> None:
    """What paced it was ours, and no wish of the application's."""
    sock = sleeper(bench)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
    sock.sendall(b"x")
    wait_for(lambda: not queued(sock), "what it had left")


def test_who_sleeps_goes_back_when_the_daemon_ends(bench: Bench) -> None:
    bench.yielding.close()
    network = Network.start(ON, BANDS, bench.classifier, RATE)
    assert network._yielding is not None
    bench.obey(network._yielding)
    sock = sleeper(bench)
    bench.classifier.host["heartbeat_ns"] = 0
    bench.pair.call(bench.pair.a, network.close)
    wait_for(lambda: algorithm_of(sock) == "cubic" and not queued(sock), "cubic again")


@pytest.mark.parametrize("rate", [0.0, float(RATE)])
def test_none_yields_before_it_is_known_how(rate: float) -> None:
    """Without a rate whoever yields would come to sleep for half an hour between two packets."""
    with (
        LibbpfLoader().open_classifier(64) as classifier,
        contextlib.closing(Network.start(ON, BANDS, classifier, rate)) as network,
    ):
        assert network._yielding is not None
        settings = network._yielding.settings[0]
        assert settings["class_of"].any()
        assert settings["rate"] > 0
        assert settings["target_us"] > 0
        network.care(rate)
        assert settings["rate"] > 0
