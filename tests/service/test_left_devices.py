# SPDX-License-Identifier: Apache-2.0
"""Devices that leave their namespace, or whose index becomes another one's, while no daemon runs, or one does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from support.namespaces import in_thread
from support.nics import end, governed, root, sh

from mfsd.cli import offline
from mfsd.daemon.config import parse
from mfsd.datapath.facts import QUEUE_LENGTH
from mfsd.datapath.undo.notes import Owner
from mfsd.doctor import Context, leftovers
from mfsd.ground.model import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.daemon.devices import Devices
    from mfsd.doctor.finding import Finding

    Make = Callable[[], Devices]

pytestmark = [pytest.mark.bpf, pytest.mark.netns]
PUT = f"qlen {QUEUE_LENGTH}"


@pytest.fixture
def make(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Make]:
    """Governs w0, which has no queue length. The test runs in namespace ``a``, and must leave no note."""

    def devices() -> Devices:
        out = governed(tmp_path, {"name": "w0", "backend": "htb", "rate": "1gbit"})
        out.care(Mode.ENFORCE)
        return out

    with netns_pair.inside(netns_pair.a):
        add()
        yield devices
    assert not list(tmp_path.glob("qdisc-*"))


@pytest.fixture
def killed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its daemon has been killed: the qdiscs stay."""
    devices = make()
    assert (root("w0"), PUT in sh("ip link show w0")) == ("htb", True)
    devices.close()
    monkeypatch.setattr(Owner, "alive", property(lambda _: False))


def add(index: str = "", *, queue: int = 0) -> None:
    sh(f"ip link add w0 {index} txqueuelen {queue} type veth peer name w1")
    for name in ("w0", "w1"):
        sh(f"ip link set {name} up")


def noted(tmp_path: Path) -> list[Finding]:
    config = parse({"daemon": {"state_dir": str(tmp_path)}})
    return list(leftovers.notes_left(Context((), config)))


@pytest.mark.usefixtures("killed")
@pytest.mark.parametrize("up", [True, False])
def test_what_was_moved_is_put_back_where_it_is(netns_pair: NetnsPair, tmp_path: Path, *, up: bool) -> None:
    sh(f"ip link set w0 netns {netns_pair.b} name x0")
    if up:
        sh(f"ip -n {netns_pair.b} link set x0 up")
    assert PUT in sh(f"ip -n {netns_pair.b} link show x0")
    (finding,) = noted(tmp_path)
    assert "w0 has left its network namespace" in finding.title
    told = offline.restore(tmp_path, "w0")
    assert (list(told.restored), list(told.problems)) == ([f"x0 in network namespace {netns_pair.b}"], [])
    assert "qlen" not in sh(f"ip -n {netns_pair.b} link show x0")


def test_what_the_move_took_is_named(
    make: Make, netns_pair: NetnsPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sh("tc qdisc replace dev w0 root handle 9: pfifo limit 77")
    make().close()
    monkeypatch.setattr(Owner, "alive", property(lambda _: False))
    sh(f"ip link set w0 netns {netns_pair.b}")
    sh(f"ip -n {netns_pair.b} link set w0 up")
    told = offline.restore(tmp_path, "")
    (problem,) = told.problems
    assert problem.startswith(f"w0 in network namespace {netns_pair.b}: ")
    assert "Before mfsd: qdisc pfifo 9: root limit 77p" in problem
    assert not told.restored


@pytest.mark.usefixtures("killed")
def test_of_two_that_may_be_it_none_is_touched(netns_pair: NetnsPair, tmp_path: Path) -> None:
    address = re.findall(r"link/ether (\S+)", sh("ip link show w0"))[0]
    sh(f"ip link set w0 netns {netns_pair.b} name x0")
    sh(f"ip -n {netns_pair.b} link add w0 address {address} type veth peer name y1")
    told = offline.restore(tmp_path, "")
    (problem,) = told.problems
    assert not told.restored
    for words in ("ip link set dev w0 txqueuelen 0", str(tmp_path), f"x0 in network namespace {netns_pair.b}", "w0 in"):
        assert words in problem
    assert PUT in sh(f"ip -n {netns_pair.b} link show x0")
    sh(f"ip -n {netns_pair.b} link del w0")
    assert len(offline.restore(tmp_path, "").restored) == 1


@pytest.mark.usefixtures("killed")
def test_where_namespaces_are_hidden_a_deleted_one_may_be_a_moved_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sh("ip link del w0")
    with monkeypatch.context() as hidden:
        hidden.setattr("mfsd.datapath.undo.elsewhere.namespaces.every", lambda: ([], False))
        (problem,) = offline.restore(tmp_path, "").problems
    assert "Not all network namespaces could be looked into" in problem
    told = offline.restore(tmp_path, "")
    assert (list(told.gone), list(told.restored), list(told.problems)) == (["w0"], [], [])


@pytest.mark.usefixtures("killed")
def test_the_next_daemon_names_it_until_it_is_put_back(make: Make, netns_pair: NetnsPair, tmp_path: Path) -> None:
    sh(f"ip link set w0 netns {netns_pair.b}")
    devices = make()
    for _ in range(2):
        (problem,) = devices.problems
        assert f"mfsctl restore w0 --state-dir {tmp_path}" in problem
        assert devices.restore(["w0"]) == ([], [problem])
        devices.care(Mode.ENFORCE)
    # Also while a daemon has the folder: it can't enter other namespaces.
    assert in_thread(lambda: netns_pair.call(netns_pair.a, lambda: offline.restore(tmp_path, "w0"))).restored
    devices.care(Mode.ENFORCE)
    assert devices.problems == []
    devices.close()
    assert "qlen" not in sh(f"ip -n {netns_pair.b} link show w0")


def test_one_that_moves_from_under_its_daemon_is_named_and_one_that_is_deleted_is_forgotten(
    make: Make, netns_pair: NetnsPair, tmp_path: Path
) -> None:
    devices = make()
    sh(f"ip link set w0 netns {netns_pair.b}")
    devices.care(Mode.ENFORCE)
    (problem,) = devices.problems
    assert "w0 has left this network namespace" in problem
    # Back again it is as it was, and so it is in the end.
    netns_pair.run(netns_pair.b, f"ip link set w0 netns {netns_pair.a}")
    sh("ip link set w0 up")
    devices.care(Mode.ENFORCE)
    assert (root("w0"), devices.problems, PUT in sh("ip link show w0")) == ("htb", [], True)
    sh("ip link del w0")
    devices.care(Mode.ENFORCE)
    assert (devices.problems, list(tmp_path.glob("qdisc-*"))) == ([], [])
    add()
    devices.care(Mode.ENFORCE)
    end(devices)
    assert "qlen" not in sh("ip link show w0")


def test_one_that_was_away_has_no_queue_length_in_the_end(make: Make, netns_pair: NetnsPair) -> None:
    devices = make()
    sh(f"ip link set w0 netns {netns_pair.b}")
    netns_pair.run(netns_pair.b, f"ip link set w0 netns {netns_pair.a}")
    sh("ip link set w0 up")
    devices.care(Mode.ENFORCE)
    end(devices)
    assert "qlen" not in sh("ip link show w0")


@pytest.mark.usefixtures("killed")
def test_another_device_of_the_same_index_is_left_alone(tmp_path: Path) -> None:
    index = sh("ip -o link show w0").split(":")[0]
    sh("ip link del w0")
    add(f"index {index}", queue=QUEUE_LENGTH)
    told = offline.restore(tmp_path, "")
    assert (list(told.gone), list(told.restored), list(told.problems)) == (["w0"], [], [])
    assert PUT in sh("ip link show w0")


@pytest.mark.usefixtures("killed")
def test_a_note_of_who_had_the_index_before_is_not_taken_for_the_devices(make: Make, tmp_path: Path) -> None:
    """By name it would come first, and say what was on the other one."""
    (note,) = tmp_path.glob("qdisc-*")
    index = sh("ip -o link show w0").split(":")[0]
    sh("ip link del w0")
    add(f"index {index}", queue=QUEUE_LENGTH)
    note.rename(note.with_name(note.name.replace("w0", "a0")))
    make().close()
    (left,) = tmp_path.glob("qdisc-*")
    assert left.name.startswith("qdisc-w0")
    assert list(offline.restore(tmp_path, "").restored) == ["w0"]
    assert PUT in sh("ip link show w0")


def test_of_very_many_notes_that_can_not_be_read_some_are_named(make: Make, tmp_path: Path) -> None:
    damaged = [tmp_path / f"qdisc-d{i}.{i + 1000}.{i + 1}.json" for i in range(50)]
    for path in damaged:
        path.write_text("{")
    devices = make()
    assert len(devices.problems) == 21
    assert devices.problems[-1] == f"notes in {tmp_path}: 30 more can't be put back"
    end(devices)
    for path in damaged:
        path.unlink()


@pytest.mark.usefixtures("killed")
def test_an_address_that_somebody_has_changed_does_not_hide_our_tree(tmp_path: Path) -> None:
    sh("ip link set w0 address 02:00:00:00:00:77")
    told = offline.restore(tmp_path, "")
    assert (list(told.restored), list(told.problems)) == (["w0"], [])
    assert root("w0") != "htb"
    assert "qlen" not in sh("ip link show w0")
