# SPDX-License-Identifier: Apache-2.0
"""Devices that are missing, leave, come back, or are changed by somebody else; one leaves the others alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest
from support.vanishing import vanishings
from support.waiting import wait_for

from mfsd.daemon import config_bands
from mfsd.daemon.config import parse
from mfsd.daemon.devices import Devices
from mfsd.daemon.predecessor import HOST, Predecessor, link_name
from mfsd.datapath import _abi
from mfsd.datapath.bpf.attach import hook_users
from mfsd.engine.device import Rescue
from mfsd.engine.records import Connection
from mfsd.ground.model import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

    Inside = Callable[[Callable[[Devices], None]], None]

pytestmark = [pytest.mark.bpf, pytest.mark.netns]


@pytest.fixture
def inside(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Inside]:
    """Runs a function with Devices (v0 at 1 Gbit/s, and w0, which does not exist yet) in namespace ``a``."""
    config = parse(
        {
            "daemon": {"state_dir": str(tmp_path), "mode": "enforce", "slots": 64},
            "device": [{"name": "v0", "rate": "1gbit"}, {"name": "w0", "rate": "100mbit"}],
        }
    )

    def run(body: Callable[[Devices], None]) -> None:
        def inner() -> None:
            devices = Devices(config, config_bands.bands_of(config, config_bands.policy_of(config)))
            try:
                body(devices)
            finally:
                devices.restore([d.name for d in devices.all])
                devices.close()

        netns_pair.call(netns_pair.a, inner)

    yield run
    assert not list(tmp_path.glob("qdisc-*"))


def tc(*args: str) -> str:
    return subprocess.run(["tc", *args], check=True, capture_output=True, text=True).stdout


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


def add_w() -> None:
    ip("link", "add", "w0", "type", "veth", "peer", "name", "w1")
    ip("link", "set", "w0", "up")
    ip("link", "set", "w1", "up")


def root(device: str) -> str:
    return tc("qdisc", "show", "dev", device, "root").split()[1]


def test_a_missing_device_is_noted_and_set_up_when_it_appears(inside: Inside) -> None:
    def body(devices: Devices) -> None:
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

    inside(body)


def test_marks_by_class_are_told_to_the_classifier(netns_pair: NetnsPair, tmp_path: Path) -> None:
    config = parse(
        {
            "daemon": {"state_dir": str(tmp_path), "slots": 64},
            "device": [{"name": "v0", "rate": "1gbit"}],
            "bands": {"levels": 3, "dscp": {"urgent": 46, "last": 8}},
            "policy": {"name": "demand-bound"},
        }
    )

    def body() -> None:
        devices = Devices(config, config_bands.bands_of(config, config_bands.policy_of(config)))
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

    netns_pair.call(netns_pair.a, body)


def test_a_device_that_leaves_and_returns_is_set_up_again(inside: Inside) -> None:
    def body(devices: Devices) -> None:
        v, w = devices.all
        add_w()
        devices.care(Mode.ENFORCE)
        assert (v.enforced, w.enforced) == (True, True)
        ip("link", "del", "w0")
        # The engine goes on asking before anybody has noticed.
        wait_for(lambda: w.read() is None and w.failure != "")
        devices.care(Mode.ENFORCE)
        assert (v.enforced, w.enforced, w.attachment, w.ifindex) == (True, False, None, 0)
        assert (w.read(), w.failure) == (None, "")
        add_w()
        devices.care(Mode.ENFORCE)
        assert w.enforced
        assert root("w0") == "htb"
        ip("link", "del", "w0")
        devices.care(Mode.ENFORCE)

    inside(body)


def test_a_foreign_root_is_respected_until_asked_again(inside: Inside) -> None:
    def body(devices: Devices) -> None:
        v = devices.all[0]
        devices.care(Mode.ENFORCE)
        tc("qdisc", "replace", "dev", "v0", "root", "pfifo", "limit", "77")
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
        assert "limit 77p" in tc("qdisc", "show", "dev", "v0", "root")

    inside(body)


def test_a_damaged_tree_is_repaired(inside: Inside) -> None:
    def body(devices: Devices) -> None:
        v = devices.all[0]
        devices.care(Mode.ENFORCE)
        lane = v.band_rows()[-1].classid
        tc("class", "del", "dev", "v0", "classid", lane)
        assert lane not in tc("class", "show", "dev", "v0")
        devices.care(Mode.ENFORCE)
        assert (v.enforced, v.notice) == (True, "")
        assert lane in tc("class", "show", "dev", "v0")

    inside(body)


def test_the_engine_may_ask_while_the_qdiscs_come_and_go(inside: Inside) -> None:
    """The care of devices runs in a thread beside the event loop, which reads and purges all the time."""

    def body(devices: Devices) -> None:
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

    inside(body)


def test_observing_touches_no_qdisc(inside: Inside) -> None:
    def body(devices: Devices) -> None:
        before = root("v0")
        devices.care(Mode.OBSERVE)
        v = devices.all[0]
        assert v.attachment is not None
        assert (v.enforced, v.notice, root("v0")) == (False, "", before)
        assert [(p.name, plan.ok) for p, plan in devices.plans(["v0"])] == [("v0", True)]  # type: ignore[union-attr]
        assert root("v0") == before

    inside(body)


def test_a_refused_plan_leaves_the_device_observed(inside: Inside) -> None:
    def body(devices: Devices) -> None:
        v = devices.all[0]
        ip("link", "set", "v0", "down")
        devices.care(Mode.ENFORCE)
        assert not v.enforced
        assert v.notice.startswith("observed only: v0 is down")
        ip("link", "set", "v0", "up")
        devices.care(Mode.ENFORCE)
        assert (v.enforced, v.notice) == (True, "")

    inside(body)


@pytest.mark.parametrize("known", [False, True], ids=["as it is set up", "as it is checked"])
def test_a_device_that_vanishes_meanwhile_leaves_the_others_alone(
    netns_pair: NetnsPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, known: bool
) -> None:
    """Whatever the kernel is asked about it, and whenever: what comes after it is cared for."""
    config = parse(
        {
            "daemon": {"state_dir": str(tmp_path), "mode": "enforce", "slots": 64},
            "device": [{"name": "w0", "rate": "100mbit"}, {"name": "v0", "rate": "1gbit"}],
        }
    )

    def body() -> None:
        devices = Devices(config, config_bands.bands_of(config, config_bands.policy_of(config)))
        w, v = devices.all

        def prepare() -> None:
            devices.restore(["v0"])
            devices.retry()
            add_w()
            if known:
                devices.care(Mode.ENFORCE)
                assert w.enforced
                tc("class", "del", "dev", "w0", "classid", w.band_rows()[-1].classid)  # something to repair
                devices.restore(["v0"])
                devices.retry()

        for vanishing in vanishings(monkeypatch, prepare, lambda: ip("link", "del", "w0")):
            devices.care(Mode.ENFORCE)
            assert (v.enforced, v.notice, root("v0")) == (True, "", "htb"), vanishing.asked
            if (w.enforced, w.notice) == (True, ""):
                break  # it has vanished too late to be noticed
        assert vanishing.happened
        assert vanishing.asked > 20
        devices.care(Mode.ENFORCE)
        assert (w.ifindex, w.enforced) == (0, False)
        devices.restore(["v0"])
        devices.close()

    netns_pair.call(netns_pair.a, body)
    assert not list(tmp_path.glob("qdisc-*"))


def test_classifiers_change_places_and_one_that_nobody_cares_for_goes_before_its_qdiscs(
    netns_pair: NetnsPair, tmp_path: Path
) -> None:
    both: dict[str, Any] = {
        "daemon": {"state_dir": str(tmp_path), "mode": "enforce", "slots": 64},
        "device": [{"name": "v0", "rate": "1gbit"}, {"name": "w0", "rate": "100mbit"}],
    }
    one = both | {"device": both["device"][:1]}

    def made(data: dict[str, Any], predecessor: Predecessor | None = None) -> Devices:
        config = parse(data)
        return Devices(config, config_bands.bands_of(config, config_bands.policy_of(config)), predecessor)

    def body() -> None:
        add_w()
        v, w = (socket.if_nametoindex(n) for n in ("v0", "w0"))
        before = made(both)
        before.care(Mode.ENFORCE)
        before.host.beat()
        old = [u.prog_id for i in (v, w) for u in hook_users(i)]
        attachments = [d.attachment for d in before.all]
        shapes = [d.shape for d in before.all]
        held = {name: os.dup(d if isinstance(d, int) else d.fileno()) for name, d in before.descriptors().items()}
        before.leave()
        assert [u.prog_id for i in (v, w) for u in hook_users(i)] == old
        predecessor = Predecessor(held)
        after = made(one, predecessor)
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
        after.restore(["v0"])
        after.close()
        before.close()
        assert hook_users(v) == []
        for attachment in attachments:
            assert attachment is not None
            attachment.detach()

    netns_pair.call(netns_pair.a, body)
