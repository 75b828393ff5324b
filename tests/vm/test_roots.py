# SPDX-License-Identifier: Apache-2.0
"""Roots that real hosts have come back exactly, or are refused beforehand with the reason."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING, Final

import pytest
from support.benches import plan

from mfsd.datapath.errors import EnforceError
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.prio_benches import PrioBench

pytestmark = pytest.mark.netns

ROOTS: Final[dict[str, tuple[tuple[str, ...], list[str]]]] = {
    "noqueue": ((), []),
    "fq": (("fq",), ["qdisc add dev DEV root handle 5: fq limit 5000 flow_limit 50 quantum 9000 maxrate 5gbit"]),
    "fq_codel": (("fq_codel",), ["qdisc add dev DEV root handle 5: fq_codel limit 777 flows 512 target 7ms ecn"]),
    "pfifo_fast": ((), ["qdisc add dev DEV root handle 9: pfifo_fast"]),
    "mq with fq_codel by hand": (
        ("fq_codel",),
        [
            "qdisc add dev DEV root handle 1: mq",
            *(f"qdisc add dev DEV parent 1:{q} handle 1{q}: fq_codel limit 77{q}" for q in range(1, 5)),
        ],
    ),
    "mq with fq by hand": (
        ("fq",),
        [
            "qdisc add dev DEV root handle 1: mq",
            *(f"qdisc add dev DEV parent 1:{q} handle 1{q}: fq limit 77{q}" for q in range(1, 5)),
        ],
    ),
    "prio": (
        ("prio",),
        [
            "qdisc add dev DEV root handle 1: prio bands 4 priomap 1 2 2 2 1 2 0 0 1 1 1 1 1 1 1 3",
            "qdisc add dev DEV parent 1:2 handle 20: pfifo limit 44",
            "qdisc add dev DEV parent 1:3 handle 30: sfq perturb 10",
        ],
    ),
    "htb over fq_codel": (
        ("htb", "fq_codel"),
        [
            "qdisc add dev DEV root handle 1: htb default 10",
            "class add dev DEV parent 1: classid 1:10 htb rate 1gbit quantum 20000",
            "qdisc add dev DEV parent 1:10 handle 10: fq_codel limit 999",
        ],
    ),
    "ets": (("ets",), ["qdisc add dev DEV root handle 1: ets bands 4 strict 2 quanta 3000 6000"]),
    "drr": (
        ("drr",),
        ["qdisc add dev DEV root handle 1: drr", "class add dev DEV parent 1: classid 1:1 drr quantum 3000"],
    ),
    "sfq": (("sfq",), ["qdisc add dev DEV root handle 1: sfq perturb 10 limit 100"]),
    "codel": (("codel",), ["qdisc add dev DEV root handle 1: codel limit 500 target 9ms interval 90ms noecn"]),
}  # fmt: skip
REFUSED: Final = {
    "mqprio": "qdisc add dev DEV root handle 1: mqprio num_tc 2 map 0 1 1 1 queues 2@0 2@2 hw 0",
    "netem": "qdisc add dev DEV root handle 1: netem delay 1ms",
    "red": "qdisc add dev DEV root handle 1: red limit 400000 min 30000 max 90000 avpkt 1000 burst 55 probability 0.1",
    "cake": "qdisc add dev DEV root handle 1: cake bandwidth 1gbit",
}


def steady(lines: list[str]) -> list[str]:
    """Without what is counted or drawn by lot: sfq's perturbation of a qdisc, htb's direct packets."""
    return [re.sub(r"direct_packets_stat \d+", "", line) for line in lines]


@pytest.mark.feature("snapshot and restore of foreign roots")
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("backend", ["prio", "htb"])
def test_a_root_comes_back_as_it_was(bench: PrioBench, needs: Callable[..., None], backend: str, root: str) -> None:
    kinds, commands = ROOTS[root]
    needs(backend, *kinds)
    for command in commands:
        bench.tc(command)
    before = steady(bench.shown())
    e = bench.enforcer("1gbit", backend, plan())
    assert e.plan().refusals == ()
    assert steady(bench.shown()) == before, "a plan changed something"
    e.apply()
    assert e.verify() == []
    assert e.restore() == []
    assert steady(bench.shown()) == before


@pytest.mark.feature("snapshot and restore of the default: mq with fq_codel, fq, pfifo_fast")
@pytest.mark.parametrize("default", ["fq_codel", "fq", "pfifo_fast"])
@pytest.mark.parametrize("queues", ["", "multi_queue"])
def test_the_default_comes_back(bench: PrioBench, needs: Callable[..., None], default: str, queues: str) -> None:
    if default != "pfifo_fast":
        needs(default)

    def show() -> list[str]:
        shown = bench.pair.run(bench.pair.a, "tc -d qdisc show dev t0; tc -d class show dev t0; ip -o link show t0")
        # A tap's carrier comes and goes with its reader, not with us.
        return sorted(re.sub(r"<[^>]*>|state \w+", "", line).strip() for line in shown.splitlines())

    # A setting of the whole (guest) machine; a device reads it when its qdisc is made.
    initial = ["nsenter", "--net=/proc/1/ns/net", "sysctl"]
    old = subprocess.run([*initial, "-n", "net.core.default_qdisc"], check=True, capture_output=True, text=True).stdout
    try:
        subprocess.run([*initial, "-qw", f"net.core.default_qdisc={default}"], check=True)
        # A veth has no queue by default; a tap has, as physical devices do.
        bench.pair.run(bench.pair.a, f"ip tuntap add t0 mode tap {queues}; ip link set t0 up")
        before = show()
        assert any(f"qdisc {default} 0:" in line for line in before)
        assert any("qdisc mq 0: root" in line for line in before) == bool(queues)
        for backend in ("prio", "htb"):
            with DeviceEnforcer("t0", plan(), backend, Rate.parse("1gbit"), bench.state) as e:
                e.apply()
                assert show() != before
                assert e.restore() == []
            assert show() == before
    finally:
        subprocess.run([*initial, "-qw", f"net.core.default_qdisc={old.strip()}"], check=True)


@pytest.mark.feature("what can't be restored exactly is refused by plan")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_come_back_is_refused_beforehand(bench: PrioBench, needs: Callable[..., None], kind: str) -> None:
    needs(kind)
    bench.tc(REFUSED[kind])
    before = bench.shown()
    e = bench.enforcer("1gbit", "prio", plan())
    assert any(kind in refusal for refusal in e.plan().refusals)
    with pytest.raises(EnforceError, match=kind):
        e.apply()
    assert bench.shown() == before
