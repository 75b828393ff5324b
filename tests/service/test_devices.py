# SPDX-License-Identifier: Apache-2.0
"""Devices that are missing, leave, come back, or are changed by somebody else; one leaves the others alone."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from support.nics import add_w, end, governed, root, sh
from support.vanishing import vanishings
from support.waiting import wait_for

from mfsd.daemon.predecessor import HOST, Predecessor, link_name
from mfsd.datapath import _abi
from mfsd.datapath.bpf.attach import hook_users
from mfsd.engine.device import Rescue
from mfsd.engine.records import Connection
from mfsd.ground.model import Mode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.daemon.devices import Devices

pytestmark = [pytest.mark.bpf, pytest.mark.netns]


V0, W0 = {"name": "v0", "rate": "1gbit"}, {"name": "w0", "rate": "100mbit"}


@pytest.fixture
def inside(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[None]:
    """The test runs in namespace ``a``, and must leave no note."""
    with netns_pair.inside(netns_pair.a):
        yield
    assert not list(tmp_path.glob("qdisc-*"))


@pytest.fixture
def devices(inside: None, tmp_path: Path) -> Iterator[Devices]:  # noqa: ARG001 - where it is made
    """V0, and w0, which does not exist yet."""
    out = governed(tmp_path, V0, W0)
    yield out
    end(out)


def test_a_missing_device_is_noted_and_set_up_when_it_appears(devices: Devices) -> None:
    v, w = devices.all
    devices.care(Mode.ENFORCE)
    assert (v.notice, v.backend, root("v0")) == ("", "htb", "htb")
    assert w.notice == "there is no such device; it is set up when it appears"
    assert not w.enforced
    add_w()
    devices.care(Mode.ENFORCE)
    assert (w.notice, w.backend, root("w0")) == ("", "htb", "htb")
    assert int(w.classifier.dev["major"][0]) == 0x6D66 << 16
    assert w.estimator.configured == 12.5e6


@pytest.mark.usefixtures("inside")
def test_marks_by_class_are_told_to_the_classifier(tmp_path: Path) -> None:
    bands = {"levels": 3, "dscp": {"urgent": 46, "last": 8}}
    devices = governed(tmp_path, V0, bands=bands, policy={"name": "demand-bound"})
    (device,) = devices.all
    device.write_map()
    written = device.classifier.dev["bands"]["dscp"][0, : len(device.bands)].tolist()
    keep = _abi.DSCP_KEEP
    by_name = dict(zip([b.name for b in device.bands.bands], written, strict=True))
    assert by_name == {
        "control": 46, "level 0": 46, "level 1": 46, "default": keep, "level 2": keep, "background": 8,
        "scavenger": 8,
    }  # fmt: skip
    assert int(device.classifier.dev["flags"][0]) & _abi.DEV_MARK_DSCP
    devices.close()


def test_a_device_that_leaves_and_returns_is_set_up_again(devices: Devices) -> None:
    v, w = devices.all
    add_w()
    devices.care(Mode.ENFORCE)
    assert (v.enforced, w.enforced) == (True, True)
    sh("ip link del w0")
    # The engine goes on asking before anybody has noticed.
    wait_for(lambda: w.read() is None and w.failure != "")
    devices.care(Mode.ENFORCE)
    assert (v.enforced, w.enforced, w.attachment, w.ifindex) == (True, False, None, 0)
    assert (w.read(), w.failure) == (None, "")
    add_w()
    devices.care(Mode.ENFORCE)
    assert w.enforced
    assert root("w0") == "htb"
    sh("ip link del w0")
    devices.care(Mode.ENFORCE)


def test_a_foreign_root_is_respected_until_asked_again(devices: Devices) -> None:
    v = devices.all[0]
    devices.care(Mode.ENFORCE)
    sh("tc qdisc replace dev v0 root pfifo limit 77")
    devices.care(Mode.ENFORCE)
    devices.care(Mode.ENFORCE)
    assert not v.enforced
    assert "somebody replaced the root qdisc" in v.notice
    assert int(v.classifier.dev["major"][0]) == 0
    assert root("v0") == "pfifo"
    devices.retry()
    devices.care(Mode.ENFORCE)
    assert (v.enforced, v.notice, root("v0")) == (True, "", "htb")
    assert devices.restore(["v0"]) == (["v0"], [])
    assert "limit 77p" in sh("tc qdisc show dev v0 root")


def test_a_damaged_tree_is_repaired(devices: Devices) -> None:
    v = devices.all[0]
    devices.care(Mode.ENFORCE)
    lane = v.band_rows()[-1].classid
    sh(f"tc class del dev v0 classid {lane}")
    assert lane not in sh("tc class show dev v0")
    devices.care(Mode.ENFORCE)
    assert (v.enforced, v.notice) == (True, "")
    assert lane in sh("tc class show dev v0")


def test_the_engine_may_ask_while_the_qdiscs_come_and_go(devices: Devices) -> None:
    """The care of devices runs in a thread beside the event loop, which reads and purges all the time."""
    v = devices.all[0]
    devices.care(Mode.ENFORCE)
    shape = v.shape
    assert shape is not None
    order = Rescue(Connection(slot=0, cookie=1, endpoints=None, lane=1), 3, 40)
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            v.put_in_force(None)
            v.put_in_force(shape)

    thread = threading.Thread(target=come_and_go)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(2000):
            v.read()
            v.empty(3, 40)
            v.rescue([order])
            v.rescued()
            v.guarantee({3: 0.2})
            v.band_rows()
    finally:
        over.set()
        thread.join()
        sys.setswitchinterval(before)


def test_observing_touches_no_qdisc(devices: Devices) -> None:
    before = root("v0")
    devices.care(Mode.OBSERVE)
    v = devices.all[0]
    assert v.attachment is not None
    assert (v.enforced, v.notice, root("v0")) == (False, "", before)
    assert [(p.name, plan.ok) for p, plan in devices.plans(["v0"])] == [("v0", True)]  # type: ignore[union-attr]
    assert root("v0") == before


def test_a_refused_plan_leaves_the_device_observed(devices: Devices) -> None:
    v = devices.all[0]
    sh("ip link set v0 down")
    devices.care(Mode.ENFORCE)
    assert not v.enforced
    assert v.notice.startswith("observed only: v0 is down")
    sh("ip link set v0 up")
    devices.care(Mode.ENFORCE)
    assert (v.enforced, v.notice) == (True, "")


@pytest.mark.parametrize("known", [False, True], ids=["as it is set up", "as it is checked"])
@pytest.mark.usefixtures("inside")
def test_a_device_that_vanishes_meanwhile_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    """Whatever the kernel is asked about it, and whenever: what comes after it is cared for."""
    devices = governed(tmp_path, W0, V0)
    w, v = devices.all

    def prepare() -> None:
        devices.restore(["v0"])
        devices.retry()
        add_w()
        if known:
            devices.care(Mode.ENFORCE)
            assert w.enforced
            sh(f"tc class del dev w0 classid {w.band_rows()[-1].classid}")  # something to repair
            devices.restore(["v0"])
            devices.retry()

    for vanishing in vanishings(monkeypatch, prepare, lambda: sh("ip link del w0")):
        devices.care(Mode.ENFORCE)
        assert (v.enforced, v.notice, root("v0")) == (True, "", "htb"), vanishing.asked
        if (w.enforced, w.notice) == (True, ""):
            break  # it has vanished too late to be noticed
    assert vanishing.happened
    assert vanishing.asked > 20
    devices.care(Mode.ENFORCE)
    assert (w.ifindex, w.enforced) == (0, False)
    end(devices)


@pytest.mark.usefixtures("inside")
def test_classifiers_change_places_and_one_that_nobody_cares_for_goes_before_its_qdiscs(tmp_path: Path) -> None:
    add_w()
    v, w = (socket.if_nametoindex(n) for n in ("v0", "w0"))
    before = governed(tmp_path, V0, W0)
    before.care(Mode.ENFORCE)
    before.host.beat()
    old = [u.prog_id for i in (v, w) for u in hook_users(i)]
    attachments = [d.attachment for d in before.all]
    shapes = [d.shape for d in before.all]
    held = {name: os.dup(d if isinstance(d, int) else d.fileno()) for name, d in before.descriptors().items()}
    before.leave()
    assert [u.prog_id for i in (v, w) for u in hook_users(i)] == old
    predecessor = Predecessor(held)
    after = governed(tmp_path, V0, predecessor=predecessor)
    after.care(Mode.ENFORCE)
    assert [u.prog_id for i in (v, w) for u in hook_users(i)] == old, "nothing is touched"
    assert (root("v0"), root("w0")) == ("htb", "htb")
    for shape in shapes:  # else the one before lives, and its notes are its own
        assert shape is not None
        shape.enforcer.close()
    after.succeed(Mode.ENFORCE)
    assert not predecessor.at_work
    (device,) = after.all
    assert (device.notice, device.enforced) == ("", True)
    assert device.shape is not None
    assert device.shape.enforcer.adopted
    (user,) = hook_users(v)
    assert user.prog_id not in old
    assert hook_users(w) == []
    assert list(after.descriptors()) == [HOST, link_name(v)]
    end(after)
    before.close()
    assert hook_users(v) == []
    for attachment in attachments:
        assert attachment is not None
        attachment.detach()
