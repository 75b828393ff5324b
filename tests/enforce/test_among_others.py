# SPDX-License-Identifier: Apache-2.0
"""A device on a host with very many others, and one of an odd name."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import pytest

from mfsd.datapath import tc
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    from support.benches import Bench

pytestmark = pytest.mark.netns

OTHERS = 100


def test_looking_at_one_does_not_take_the_others_apart(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells of the qdiscs of all of them, each time."""
    enforcer = bench.enforcer("1gbit", "htb")
    enforcer.apply()
    parsed: list[int] = []
    parse = tc.parse_object

    def counted(m: Any) -> tuple[int, tc.TcObject]:
        found = parse(m)
        parsed.append(found[0])
        return found

    monkeypatch.setattr(tc, "parse_object", counted)
    names = [f"d{i}" for i in range(OTHERS)]
    lines = "".join(f"link add {n} type ifb\nlink set {n} up\n" for n in names)
    bench.pair.run(bench.pair.a, f"printf '%s' '{lines}' | ip -batch -")
    bench.pair.run(bench.pair.a, f"for d in {' '.join(names)}; do echo qdisc add dev $d root pfifo; done | tc -batch -")
    assert enforcer.verify() == []
    assert set(parsed) == {enforcer.ifindex}
    enforcer.restore()


def test_the_name_of_a_device_is_one_word_in_all_commands(bench: Bench) -> None:
    """A shell must not run what is in it."""
    name = "v;id$(x)&"
    bench.pair.run(bench.pair.a, f"ip link add {shlex.quote(name)} type ifb; ip link set {shlex.quote(name)} up")
    with DeviceEnforcer(name, bench.bands, "htb", Rate.parse("1gbit"), bench.state) as enforcer:
        plan = enforcer.plan()
    commands = [
        line for s in [*plan.steps, *plan.undo] for line in s.command.splitlines() if line.startswith(("tc ", "ip "))
    ]
    assert len(commands) > 2
    assert [c for c in commands if shlex.quote(name) not in c] == []
