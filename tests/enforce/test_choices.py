# SPDX-License-Identifier: Apache-2.0
"""Which tree a device gets, in words, and which devices get none."""

from __future__ import annotations

import dataclasses

import pytest
from support.benches import Bench, plan

from mfsd.datapath import tc
from mfsd.datapath.errors import EnforceError
from mfsd.datapath.facts import kernel_has
from mfsd.datapath.qdisc import prio
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.datapath.qdisc.tree import differences
from mfsd.ground.units import Rate
from mfsd.host import netlink as nl

pytestmark = pytest.mark.netns


def test_devices_that_cannot_be_shaped(bench: Bench) -> None:
    with pytest.raises(EnforceError, match=r"no such device; devices here: lo, v0"):
        DeviceEnforcer("nosuch0", bench.bands, "htb", None, bench.state)

    bench.pair.run(bench.pair.a, "ip link add ifb7 type ifb; ip link set ifb7 up")
    with DeviceEnforcer("ifb7", bench.bands, "htb", None, bench.state) as e:
        (refusal,) = e.plan().refusals
        assert "device.rate of ifb7" in refusal
    with DeviceEnforcer("ifb7", bench.bands, "auto", Rate.parse("1gbit"), bench.state) as e:
        assert e.plan().backend == "htb"

    bench.pair.run(bench.pair.a, f"ip link set {bench.dev} down")
    (refusal,) = bench.enforcer().plan().refusals
    assert "down" in refusal


def test_choices_are_explained(bench: Bench) -> None:
    with tc.TcSocket() as sock:
        prio_too = kernel_has(sock, "prio")
    assert bench.enforcer(None, "auto").plan().backend == ("prio" if prio_too else "htb")
    dry = bench.enforcer(None, "htb").plan()
    text = " ".join(dry.reasons)
    assert "98% of the reported link speed 10gbit" in text
    assert "virtual" in text
    assert "4 transmit queues" in text

    (refusal,) = bench.enforcer(bands=plan(6)).plan().refusals
    assert "bands.levels to at most 5" in refusal
    with pytest.raises(ValueError, match="must be one of auto, htb, prio"):
        bench.enforcer(backend="cbq").plan()


def test_a_queue_is_asked_for_without_a_trace(bench: Bench) -> None:
    before = bench.shown()
    with tc.TcSocket() as sock, pytest.raises(nl.NetlinkError):
        sock.run([tc.message(tc.RTM_NEWQDISC, nl.NLM_CREATE, 10_000, 0, tc.TC_H_ROOT, body=tc.kind_attr("pfifo"))], "x")
    bench.enforcer(None, "auto").plan()
    assert bench.shown() == before
    assert "noqueue 0: root" in bench.pair.run(bench.pair.a, "tc qdisc show dev lo")


@pytest.mark.parametrize("rate", ["50mbit", "1gbit", "100gbit", "400gbit"])
@pytest.mark.parametrize(("shaper", "groups", "shows"), [("tbf", 1, "qdisc tbf 6d67:"), ("htb", 2, "class htb 6d67:1")])
def test_the_shaper_above_prio_is_taken_as_it_is_meant(
    bench: Bench, rate: str, shaper: str, groups: int, shows: str
) -> None:
    """Natively there is no prio: the shaper alone."""
    tree = prio.build(bench.bands, Rate.parse(rate), lanes=shaper == "htb", weights=False)
    alone = dataclasses.replace(tree, groups=tree.groups[:groups])
    e = bench.enforcer()
    with tc.TcSocket() as sock:
        sock.run([node.message(e._ifindex) for node in alone.nodes], "shaper")
        assert differences(alone, *sock.tree(e._ifindex)) == []
    (shown,) = [line for line in bench.shown() if shows in line]
    assert f"rate {rate.replace('m', 'M').replace('g', 'G')}" in shown


def test_a_kernel_without_prio_is_named(bench: Bench) -> None:
    with tc.TcSocket() as sock:
        if kernel_has(sock, "prio"):
            pytest.skip("this kernel has prio")
    (refusal,) = bench.enforcer(backend="prio").plan().refusals
    assert refusal == "backend = prio: the kernel has no prio (CONFIG_NET_SCH_PRIO)"
