# SPDX-License-Identifier: Apache-2.0
"""Plan, apply, verify, restore on real devices, whatever root they had before."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.benches import Bench, plan

import mfsd
from mfsd.cli import offline
from mfsd.datapath.errors import EnforceError
from mfsd.datapath.qdisc import htb
from mfsd.datapath.qdisc.tree import Group, Node
from mfsd.datapath.undo.restore import NOTE_STAYS, restore_all

if TYPE_CHECKING:
    from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
    from mfsd.datapath.qdisc.tree import Tree

pytestmark = pytest.mark.netns

ROOTS: Final = {
    "the kernel's own": [],
    "pfifo": ["qdisc add dev DEV root handle 5: pfifo limit 77"],
    "bfifo, handle by the kernel": ["qdisc add dev DEV root bfifo limit 123456"],
    "pfifo_fast": ["qdisc add dev DEV root handle 9: pfifo_fast"],
    "tbf": ["qdisc add dev DEV root handle 3: tbf rate 937mbit burst 200k latency 3ms"],
    "tbf beyond 34 Gbit/s with a queue": [
        "qdisc add dev DEV root handle 3: tbf rate 100gbit burst 10m limit 30m",
        "qdisc add dev DEV parent 3:1 handle 30: pfifo limit 7",
    ],
    "htb": [
        "qdisc add dev DEV root handle 1: htb default 20 r2q 7",
        "class add dev DEV parent 1: classid 1:1 htb rate 40gbit ceil 50gbit quantum 1600",
        "class add dev DEV parent 1:1 classid 1:10 htb rate 100mbit ceil 1gbit prio 1 burst 15k cburst 16k quantum 999",
        "class add dev DEV parent 1:1 classid 1:20 htb rate 9gbit ceil 10gbit prio 3 overhead 24 quantum 60000",
        "class add dev DEV parent 1:10 classid 1:11 htb rate 50mbit prio 2 quantum 1514",
        "class add dev DEV parent 1: classid 1:2 htb rate 1mbit quantum 3000",
        "qdisc add dev DEV parent 1:20 handle 200: pfifo limit 55",
        "qdisc add dev DEV parent 1:11 handle 8111: bfifo limit 66666",
        "qdisc add dev DEV parent 1:2 handle 12: htb default 3",
        "class add dev DEV parent 12: classid 12:3 htb rate 2mbit quantum 4000",
    ],
    "mq by hand": [
        "qdisc add dev DEV root handle 1: mq",
        "qdisc add dev DEV parent 1:2 handle 20: pfifo limit 22",
        "qdisc add dev DEV parent 1:3 handle 30: tbf rate 1gbit burst 100k limit 1m",
    ],
}


@pytest.mark.parametrize("root", ROOTS)
def test_a_root_comes_back_as_it_was(bench: Bench, root: str) -> None:
    for command in ROOTS[root]:
        bench.tc(command)
    before = bench.shown()
    e = bench.enforcer()

    dry = e.plan()
    assert dry.ok
    assert dry.steps
    assert dry.undo
    assert bench.shown() == before, "a plan changed something"
    assert not bench.state.exists()

    e.apply()
    assert e.verify() == []
    assert not e.adopted
    assert any("htb 6d66: root" in line for line in bench.shown())
    assert e.plan().steps == (), "nothing is left to do"

    assert e.restore() == []
    assert bench.shown() == before
    assert list(bench.state.iterdir()) == []
    assert e.restore() == [], "restoring twice"


def test_ingress_and_clsact_are_left_alone(bench: Bench) -> None:
    bench.tc("qdisc add dev DEV clsact")
    bench.tc("filter add dev DEV egress protocol ip u32 match u32 0 0 action mirred egress redirect dev DEV")
    bench.tc("filter del dev DEV egress")
    before = bench.shown()
    e = bench.enforcer()
    e.apply()
    assert any("clsact" in line for line in bench.shown())
    assert e.restore() == []
    assert bench.shown() == before


def test_a_device_without_a_queue_length_gets_it_back(bench: Bench) -> None:
    bench.pair.run(bench.pair.a, f"ip link set {bench.dev} txqueuelen 0")
    before = bench.shown()
    e = bench.enforcer()
    e.plan()
    assert bench.shown() == before
    e.apply()
    assert e.restore() == []
    assert bench.shown() == before


@pytest.mark.parametrize(
    ("commands", "reason"),
    [
        (
            [
                "qdisc add dev DEV root handle 1: htb",
                "filter add dev DEV parent 1: protocol ip u32 match u32 0 0 classid 1:1",
            ],
            "filters",
        ),
        (["qdisc add dev DEV root handle 1: stab overhead 24 linklayer ethernet pfifo"], "stab"),
        (["qdisc add dev DEV root handle 1: estimator 1sec 4sec pfifo"], "rate estimator"),
    ],
)
def test_what_cannot_come_back_is_refused_beforehand(bench: Bench, commands: list[str], reason: str) -> None:
    for command in commands:
        bench.tc(command)
    before = bench.shown()
    e = bench.enforcer()
    (refusal,) = e.plan().refusals
    assert reason in refusal
    with pytest.raises(EnforceError, match=reason):
        e.apply()
    assert bench.shown() == before
    assert not bench.state.exists()


def _no_buckets(line: str) -> str:
    return re.sub(r"c?burst \S+", "", line)


def test_the_commands_of_a_plan_make_the_same_tree(bench: Bench) -> None:
    for rate in ("100mbit", "10gbit", "400gbit"):
        e = bench.enforcer(rate)
        bench.pair.run(bench.pair.a, "; ".join(step.command for step in e.plan().steps))
        by_hand = bench.shown()
        bench.tc("qdisc del dev DEV root")
        e.apply()
        # tc rounds buckets to microseconds of the rate; older versions lose a few bytes.
        assert [_no_buckets(line) for line in bench.shown()] == [_no_buckets(line) for line in by_hand]
        assert any(f"rate {rate.replace('m', 'M').replace('g', 'G')}" in line for line in by_hand)
        assert e.restore() == []


def with_backlog(bench: Bench) -> tuple[DeviceEnforcer, tuple[int, int]]:
    """A tree that is slow, and what waits in its third band (bytes, packets)."""
    first = bench.enforcer("100kbit")
    first.apply()
    bench.receiver()
    bench.send(first.band_maps()[1][0], 300)
    bench.send(first.band_maps()[2][0], 5)
    return first, first.backlog(2, 0)


def test_a_successor_adopts_the_tree(bench: Bench) -> None:
    bench.tc("qdisc add dev DEV root handle 5: pfifo limit 77")
    before = bench.shown()
    first, held = with_backlog(bench)
    assert held[1] >= 4
    first.purge([(4, 1)])
    first.close()

    second = bench.enforcer("100kbit")
    assert second.plan().steps == ()
    second.apply()
    assert second.adopted
    assert second.backlog(2, 0) == held, "packets were lost"
    assert second.verify() == []
    second.purge([(4, 1), (4, 2)])
    second.purge([(4, 1), (4, 2)])
    assert second.restore() == []
    assert bench.shown() == before


def test_a_new_rate_is_written_into_the_living_tree(bench: Bench) -> None:
    _, held = with_backlog(bench)
    second = bench.enforcer("200kbit")
    assert any("replace" in step.command for step in second.plan().steps)
    second.apply()
    assert second.adopted
    assert second.backlog(2, 0) == held
    assert any("htb 6d66:1 root rate 200Kbit" in line for line in bench.shown())


def test_a_largest_packet_that_changed_meanwhile_is_written_into_the_living_tree(bench: Bench) -> None:
    before = bench.shown()
    first, held = with_backlog(bench)
    first.close()
    bench.pair.run(bench.pair.a, f"ip link set {bench.dev} gso_max_size 32768")
    second = bench.enforcer("100kbit")
    second.apply()
    assert second.adopted
    assert second.backlog(2, 0) == held, "packets were lost"
    assert second.verify() == []
    assert second.restore() == []
    assert bench.shown() == before


def test_a_half_made_tree_is_completed(bench: Bench) -> None:
    before = bench.shown()
    first = bench.enforcer()
    first.apply()
    bench.tc("class del dev DEV classid 6d66:2002")
    assert first.verify() == ["class htb 6d66:2002 is missing"]
    second = bench.enforcer()
    second.apply()
    assert second.adopted
    assert second.verify() == []
    assert second.restore() == []
    assert bench.shown() == before


def test_other_bands_rebuild_the_tree_and_the_first_root_is_remembered(bench: Bench) -> None:
    bench.tc("qdisc add dev DEV root handle 5: pfifo limit 77")
    before = bench.shown()
    bench.enforcer().apply()
    second = bench.enforcer(bands=plan(3, lanes=2))
    second.apply()
    assert not second.adopted
    assert second.verify() == []
    assert second.restore() == []
    assert bench.shown() == before


def test_a_root_put_there_by_somebody_else_meanwhile_is_left_alone(bench: Bench) -> None:
    e = bench.enforcer()
    e.apply()
    bench.tc("qdisc replace dev DEV root handle 7: pfifo limit 7")
    theirs = bench.shown()
    assert e.verify()
    (problem,) = e.restore()
    assert "pfifo 7:" in problem
    assert bench.shown() == theirs
    assert list(bench.state.iterdir()) == []


def test_our_tree_without_its_note_is_refused(bench: Bench) -> None:
    e = bench.enforcer()
    e.apply()
    for file in bench.state.iterdir():
        file.unlink()
    (refusal,) = e.plan().refusals
    assert f"tc qdisc del dev {bench.dev} root" in refusal


def test_a_failed_apply_rolls_back(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.tc("qdisc add dev DEV root handle 5: pfifo limit 77")
    before = bench.shown()
    right = htb.build

    def wrong(*args: object, **kwargs: object) -> Tree:
        tree = right(*args, **kwargs)  # type: ignore[arg-type]
        bad = Node("htb", 0x6D666666, 0x6D660001, b"", "class")
        groups = (*tree.groups, Group("a class without options", "", (bad,)))
        object.__setattr__(tree, "groups", groups)
        return tree

    monkeypatch.setattr(htb, "build", wrong)
    with pytest.raises(EnforceError, match="rolled back"):
        bench.enforcer().apply()
    assert bench.shown() == before
    assert list(bench.state.iterdir()) == []


ROOT: Final = Path(mfsd.__file__).parents[1]
OWNER: Final = """
import sys, time
from pathlib import Path
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.ground.bands import Bands
from mfsd.ground.units import Rate
bands = Bands.build(4, default_after=2, lanes=4)
DeviceEnforcer(sys.argv[1], bands, "htb", Rate.parse("1gbit"), Path(sys.argv[2])).apply()
print("applied", flush=True)
time.sleep(600)
"""


def test_a_killed_owner_is_cleaned_up_after_and_a_living_one_is_not(bench: Bench) -> None:
    bench.tc("qdisc add dev DEV root handle 5: pfifo limit 77")
    before = bench.shown()
    # The child inherits this thread's namespace.
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, bench.dev, bench.state], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "applied\n"
        during = bench.shown()
        assert during != before
        (problem,) = restore_all(bench.state)[bench.dev] or []
        assert f"pid {owner.pid}" in problem
        e = bench.enforcer()
        with pytest.raises(EnforceError, match="belongs to a running mfsd"):
            e.apply()
        assert e.restore()
        assert bench.shown() == during
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert owner.stdout is not None
        owner.stdout.close()
    assert restore_all(bench.state, "other") == {"other": [f"other: no note in {bench.state}, so nothing to put back"]}
    assert restore_all(bench.state) == {bench.dev: []}
    assert bench.shown() == before
    assert list(bench.state.iterdir()) == []
    assert restore_all(bench.state) == {}


def test_a_note_of_another_namespace_or_device_is_not_acted_upon(bench: Bench) -> None:
    e = bench.enforcer()
    e.apply()
    during = bench.shown()
    with bench.pair.inside(bench.pair.b):
        (problem,) = restore_all(bench.state)[bench.dev] or []
    assert "another network namespace" in problem
    assert bench.shown() == during

    file = next(bench.state.iterdir())
    note = json.loads(file.read_text())
    file.write_text(json.dumps(note | {"ifindex": note["ifindex"] + 1000}))
    assert restore_all(bench.state) == {bench.dev: None}, "the device is gone"
    assert bench.shown() == during


def test_a_broken_note_is_reported(bench: Bench) -> None:
    bench.enforcer().apply()
    file = next(bench.state.iterdir())
    file.write_text(file.read_text()[:-30])
    (problem,) = restore_all(bench.state)[bench.dev] or []
    assert str(file) in problem
    with pytest.raises(EnforceError, match="remove the file"):
        bench.enforcer().plan()


def test_a_note_that_cannot_be_removed_is_the_only_problem(bench: Bench) -> None:
    """The disk has become read-only: the device is put back, and nothing else is said."""
    before = bench.shown()
    e = bench.enforcer()
    e.apply()
    (note,) = bench.state.iterdir()
    for words in (["--bind", str(bench.state)], ["-o", "remount,bind,ro"]):
        subprocess.run(["mount", *words, str(bench.state)], check=True)
    try:
        said = f"{bench.dev}: {NOTE_STAYS}: Read-only file system; remove {note}"
        assert e.restore() == [said]
        assert bench.shown() == before
        assert list(offline.restore(bench.state, bench.dev).problems) == [said]
    finally:
        subprocess.run(["umount", str(bench.state)], check=True)
    assert restore_all(bench.state) == {bench.dev: []}
    assert list(bench.state.iterdir()) == []


def test_guarantees_are_written_into_the_living_tree_and_are_no_difference(bench: Bench) -> None:
    e = bench.enforcer("1gbit")
    e.apply()
    plain = bench.shown()
    e.guarantee({2: 0.04, 4: 2.0})
    lines = {line.split()[2]: line for line in bench.shown() if line.startswith("class htb")}
    assert "rate 40Mbit" in lines["6d66:3000"]
    assert "rate 1Gbit" not in lines["6d66:6000"]
    assert "rate 1Gbit" in lines["6d66:5000"], "no more than there is"
    assert e.verify() == []
    e.guarantee({})
    assert bench.shown() == plain, "floors again"
    e.guarantee({3: 0.5})
    assert any("6d66:4001" in line and "rate 500Mbit" in line for line in bench.shown()), "a band of one lane is a leaf"
    e.close()
    heir = bench.enforcer("1gbit")
    assert any("replace" in step.command for step in heir.plan().steps)
    heir.apply()
    assert heir.adopted
    assert bench.shown() == plain, "a successor begins with the floors"


def test_of_a_tree_that_is_not_as_wanted_a_few_differences_are_named(bench: Bench) -> None:
    """As when somebody replaces the root while it is made: all of hundreds of classes are missing."""
    e = bench.enforcer()
    tree = e._plan()[1]
    assert tree is not None
    with pytest.raises(EnforceError, match=r"is missing; and \d\d+ more") as told:
        e._install(tree, [])
    assert len(str(told.value)) < 600
