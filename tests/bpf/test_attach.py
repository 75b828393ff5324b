# SPDX-License-Identifier: Apache-2.0
"""On and off the egress hook of a real device: TCX and clsact, beside others, leaving nothing behind."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute, netns
from support.hooks import METHODS, TCX, Method, Namespace, has_tcx, index, runs, traces
from support.waiting import wait_for

from bench.parts.testrun import FOREVER
from mfsd.client import cookie_of
from mfsd.datapath import _abi
from mfsd.datapath.bpf import clsact, syscall
from mfsd.datapath.bpf.attach import _F_BEFORE, TCX_EGRESS, attach, hook_users, inherit, remove_leftover
from mfsd.datapath.bpf.keys import cookie_key
from mfsd.datapath.bpf.libbpf import BpfObject, LibbpfLoader, object_path
from mfsd.datapath.bpf.loader import PROGRAM
from mfsd.datapath.errors import AttachError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.datapath.bpf.loader import Classifier

pytestmark = [pytest.mark.bpf, pytest.mark.netns]


@pytest.fixture
def ns() -> Iterator[Namespace]:
    name = f"mfsd-test-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    space = Namespace(name)
    try:
        space.run(lambda: netns.setns(name))
        space.sh("ip link add d0 type veth peer name d1")
        space.sh("ip addr add 10.9.0.1/24 dev d0")
        space.sh("ip link set d0 up")
        space.sh("ip link set d1 up")
        space.sh("ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev d0")
        yield space
    finally:
        space.close()
        subprocess.run(["ip", "netns", "del", name], check=True)


@pytest.fixture
def classifier() -> Iterator[Classifier]:
    """A live one in observe mode: it counts, which is how a test sees that it runs."""
    with LibbpfLoader().open_classifier(64) as c:
        c.host["abi_version"], c.host["heartbeat_ns"] = _abi.ABI_VERSION, time.monotonic_ns()
        c.host["timeout_ns"] = 3600 * 10**9
        yield c


@pytest.fixture
def foreign() -> Iterator[int]:
    """Descriptor of somebody else's program."""
    with BpfObject(object_path("empty")) as obj:
        obj.load()
        fd = obj.program_fd("mfsd_empty")
    yield fd
    os.close(fd)


@METHODS
def test_attach_and_detach_leave_nothing_behind(ns: Namespace, classifier: Classifier, method: Method) -> None:
    before, i = traces(ns), index(ns)
    a = ns.run(lambda: attach(classifier, i, method))
    assert runs(ns, classifier)
    (user,) = ns.run(lambda: hook_users(i))
    assert user.ours
    assert user.hook == a.method
    ns.run(a.detach)
    ns.run(a.detach)
    assert not runs(ns, classifier)
    assert traces(ns) == before
    assert ns.run(lambda: hook_users(i)) == []


@TCX
def test_auto_prefers_tcx(ns: Namespace, classifier: Classifier) -> None:
    i = index(ns)
    with ns.run(lambda: attach(classifier, i)) as a:
        assert a.method == "tcx"


def test_auto_falls_back_where_the_kernel_has_no_tcx(
    ns: Namespace, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_tcx(*_: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(syscall, "link_create", no_tcx)
    i = index(ns)
    with pytest.raises(AttachError, match="use clsact"):
        ns.run(lambda: attach(classifier, i, "tcx"))
    a = ns.run(lambda: attach(classifier, i))
    assert a.method == "clsact"
    assert runs(ns, classifier)
    ns.run(a.detach)


@METHODS
def test_cookie_of_a_real_socket_is_matched(ns: Namespace, classifier: Classifier, method: Method) -> None:
    i = index(ns)
    a = ns.run(lambda: attach(classifier, i, method))

    def go() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            classifier.slots["expires_ns"][5] = FOREVER
            classifier.cookies.add(cookie_key(cookie_of(s)), 5)
            s.sendto(b"x" * 100, ("10.9.0.2", 9))

    ns.run(go)
    assert classifier.slots["packets"][5] == 1
    assert classifier.slots["bytes"][5] == 142
    ns.run(a.detach)


@TCX
@pytest.mark.parametrize("when", ["before", "after"])
def test_tcx_coexists_with_a_foreign_program(ns: Namespace, classifier: Classifier, foreign: int, when: str) -> None:
    i = index(ns)
    links = []
    if when == "before":
        links.append(ns.run(lambda: syscall.link_create(foreign, i, TCX_EGRESS, 0)))
    a = ns.run(lambda: attach(classifier, i))
    if when == "after":
        links.append(ns.run(lambda: syscall.link_create(foreign, i, TCX_EGRESS, 0)))
    names = [u.name for u in ns.run(lambda: hook_users(i))]
    assert names == [PROGRAM, "mfsd_empty"], "ours is at the head"
    assert runs(ns, classifier)
    ns.run(a.detach)
    assert [u.name for u in ns.run(lambda: hook_users(i))] == ["mfsd_empty"]
    for fd in links:
        os.close(fd)


@TCX
def test_a_foreign_program_put_before_ours_runs_first_and_ours_still_runs(
    ns: Namespace, classifier: Classifier, foreign: int
) -> None:
    i = index(ns)
    a = ns.run(lambda: attach(classifier, i))
    link = ns.run(lambda: syscall.link_create(foreign, i, TCX_EGRESS, _F_BEFORE))
    assert [u.name for u in ns.run(lambda: hook_users(i))] == ["mfsd_empty", PROGRAM]
    assert runs(ns, classifier)
    ns.run(a.detach)
    os.close(link)


@pytest.mark.parametrize("prio", [1, 7])
@pytest.mark.parametrize("when", ["before", "after"])
@METHODS
def test_foreign_clsact_filter_stays_and_sees_traffic(
    ns: Namespace, classifier: Classifier, method: Method, when: str, prio: int
) -> None:
    """The foreign filter is a second classifier under another name, because that one can count."""
    i = index(ns)

    def add(fd: int) -> None:
        with IPRoute() as ip:
            if "clsact" not in traces(ns):
                ip.tc("add", "clsact", i)
            where = {"parent": 0xFFFFFFF3, "prio": prio, "protocol": 3}
            ip.tc("add-filter", "bpf", i, fd=fd, name="foreign", direct_action=True, **where)

    with LibbpfLoader().open_classifier(64, classifier) as other:
        if when == "before":
            ns.run(lambda: add(other.prog_fd))
        a = ns.run(lambda: attach(classifier, i, method))
        if when == "after":
            ns.run(lambda: add(other.prog_fd))
        users = ns.run(lambda: hook_users(i))
        assert {(u.name, u.ours) for u in users} == {(PROGRAM, True), ("foreign", False)}
        if prio > 1 or when == "before":  # a bpf filter added later at our own priority goes in front of ours
            assert users[0].ours
        assert runs(ns, classifier)
        assert runs(ns, other)
        ns.run(a.detach)
        assert not runs(ns, classifier)
        assert runs(ns, other)
        (left,) = ns.run(lambda: hook_users(i))
        assert (left.name, left.prio, left.hook) == ("foreign", prio, "clsact")


def test_empty_clsact_of_somebody_else_stays(ns: Namespace, classifier: Classifier) -> None:
    ns.sh("tc qdisc add dev d0 clsact")
    before, i = traces(ns), index(ns)
    a = ns.run(lambda: attach(classifier, i, "clsact"))
    ns.run(a.detach)
    assert traces(ns) == before


def test_detaching_when_somebody_deleted_the_qdisc(ns: Namespace, classifier: Classifier) -> None:
    i = index(ns)
    a = ns.run(lambda: attach(classifier, i, "clsact"))
    ns.sh("tc qdisc del dev d0 clsact")
    ns.run(a.detach)
    assert ns.run(lambda: hook_users(i)) == []


def test_clsact_of_ours_with_a_foreign_ingress_filter_stays(ns: Namespace, classifier: Classifier) -> None:
    i = index(ns)
    a = ns.run(lambda: attach(classifier, i, "clsact"))
    ns.sh("tc filter add dev d0 ingress pref 7 protocol ip u32 match u32 0 0 flowid 1:1")
    ns.run(a.detach)
    assert "u32" in ns.sh("tc filter show dev d0 ingress")


def test_clsact_priority_taken_by_another_kind(ns: Namespace, classifier: Classifier) -> None:
    ns.sh("tc qdisc add dev d0 clsact")
    ns.sh("tc filter add dev d0 egress pref 1 protocol ip u32 match u32 0 0 flowid 1:1")
    before, i = traces(ns), index(ns)
    with pytest.raises(AttachError, match="u32 filter holds priority 1"):
        ns.run(lambda: attach(classifier, i, "clsact"))
    assert traces(ns) == before


def test_ingress_qdisc_in_the_place_of_clsact(ns: Namespace, classifier: Classifier) -> None:
    ns.sh("tc qdisc add dev d0 ingress")
    i = index(ns)
    with pytest.raises(AttachError, match="ingress holds the handle"):
        ns.run(lambda: attach(classifier, i, "clsact"))
    if not has_tcx():
        return
    a = ns.run(lambda: attach(classifier, i, "tcx"))
    assert runs(ns, classifier)
    ns.run(a.detach)


@pytest.mark.parametrize("method", [pytest.param("tcx", marks=TCX), "clsact"])
def test_update_replaces_the_program(ns: Namespace, classifier: Classifier, method: Method) -> None:
    i = index(ns)
    a = ns.run(lambda: attach(classifier, i, method))
    with LibbpfLoader().open_classifier(64, classifier) as successor:
        ns.run(lambda: a.update(successor))
        assert runs(ns, successor)
        assert not runs(ns, classifier)
        assert len(ns.run(lambda: hook_users(i))) == 1
    ns.run(a.detach)


@TCX
def test_detached_is_off_though_somebody_else_holds_the_link(ns: Namespace, classifier: Classifier) -> None:
    i = index(ns)
    a = ns.run(lambda: attach(classifier, i, "tcx"))
    held = os.dup(a.fileno())
    try:
        ns.run(a.detach)
        assert ns.run(lambda: hook_users(i)) == []
        again = ns.run(lambda: attach(classifier, i, "tcx"))  # EEXIST if it still hung there
        assert ns.run(lambda: inherit(classifier, i, os.dup(held))) is None  # is worth nothing any more
        assert ns.run(again.standing).attached
        ns.run(again.detach)
    finally:
        os.close(held)


@TCX
def test_a_link_is_inherited_on_its_own_device_only(ns: Namespace, classifier: Classifier) -> None:
    i, other = index(ns), index(ns, "d1")
    a = ns.run(lambda: attach(classifier, i, "tcx"))
    with LibbpfLoader().open_classifier(64, classifier) as successor:
        b = ns.run(lambda: inherit(successor, i, os.dup(a.fileno())))
        assert b is not None
        assert ns.run(b.standing).attached
        assert not ns.run(a.standing).attached  # of the same link, which has another program now
        assert runs(ns, successor)
        assert len(ns.run(lambda: hook_users(i))) == 1
        assert ns.run(lambda: inherit(successor, other, os.dup(b.fileno()))) is None
        assert ns.run(lambda: hook_users(i)) == []
        ns.run(b.detach)
    ns.run(a.detach)


def test_leftover_of_a_crash_is_replaced_or_removed(ns: Namespace, classifier: Classifier) -> None:
    i = index(ns)
    ns.run(lambda: attach(classifier, i, "clsact"))  # dropped on the floor: clsact has no link that would go with us
    with LibbpfLoader().open_classifier(64, classifier) as successor:
        a = ns.run(lambda: attach(successor, i, "clsact"))
        assert len(ns.run(lambda: hook_users(i))) == 1
        assert runs(ns, successor)
        assert a.handle & 1, "inherited from the one that was killed"
        assert ns.run(lambda: remove_leftover(i))
    assert not ns.run(lambda: remove_leftover(i))
    assert "clsact" not in traces(ns)
    ns.run(a.detach)


def test_leftover_of_a_crash_leaves_a_clsact_that_was_there_before(ns: Namespace, classifier: Classifier) -> None:
    ns.sh("tc qdisc add dev d0 clsact")
    before, i = traces(ns), index(ns)
    ns.run(lambda: attach(classifier, i, "clsact"))  # dropped on the floor
    with LibbpfLoader().open_classifier(64, classifier) as successor:
        a = ns.run(lambda: attach(successor, i, "clsact"))
        assert not a.handle & 1
    assert ns.run(lambda: remove_leftover(i))
    assert traces(ns) == before


def test_names_of_handles_that_somebody_has_taken_keep_no_classifier_off(
    ns: Namespace, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are abstract addresses of unix sockets: any user of the network namespace may bind them."""
    monkeypatch.setattr(clsact, "_HANDLES", range(0x6D660000, 0x6D660008))
    before, i = traces(ns), index(ns)
    with contextlib.ExitStack() as stack:

        def squat() -> None:
            for handle in clsact._HANDLES:
                taken = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
                taken.bind(f"\0mfsd/device/{i}/{handle:x}")

        ns.run(squat)
        with ns.run(lambda: attach(classifier, i, "clsact")) as a:
            assert ns.run(a.standing).attached
            with LibbpfLoader().open_classifier(64, classifier) as other:
                b = ns.run(lambda: attach(other, i, "clsact"))
                assert ns.run(a.standing).attached
                ns.run(b.detach)
            ns.run(a.detach)
    assert traces(ns) == before


CRASHER = """
import os, signal, socket, sys
from mfsd.datapath.bpf.attach import attach
from mfsd.datapath.bpf.libbpf import LibbpfLoader
a = attach(LibbpfLoader().open_classifier(16), socket.if_nametoindex("d0"), "tcx")
print("attached", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@TCX
def test_tcx_link_goes_with_the_process(ns: Namespace) -> None:
    argv = ["ip", "netns", "exec", ns.name, sys.executable, "-c", CRASHER]
    done = subprocess.run(
        argv,
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.stdout == "attached\n", done.stderr
    i = index(ns)
    wait_for(lambda: not ns.run(lambda: hook_users(i)), "the link to go")  # the kernel may free it a moment later


@METHODS
def test_device_that_goes_away(ns: Namespace, classifier: Classifier, method: Method) -> None:
    i = index(ns)
    a = ns.run(lambda: attach(classifier, i, method))
    ns.sh("ip link del d0")
    ns.run(a.detach)


@METHODS
def test_unknown_device(ns: Namespace, classifier: Classifier, method: Method) -> None:
    with pytest.raises(AttachError, match="no such device"):
        ns.run(lambda: attach(classifier, 99999, method))


def test_device_without_an_ethernet_header_is_refused(ns: Namespace, classifier: Classifier) -> None:
    ns.sh("ip tuntap add t0 mode tun")
    i = index(ns, "t0")
    with pytest.raises(AttachError, match="no Ethernet header"):
        ns.run(lambda: attach(classifier, i))


def test_loopback_is_accepted(ns: Namespace, classifier: Classifier) -> None:
    a = ns.run(lambda: attach(classifier, socket.if_nametoindex("lo")))
    ns.run(a.detach)


@TCX
def test_attaching_twice_is_an_error(ns: Namespace, classifier: Classifier) -> None:
    i = index(ns)
    with ns.run(lambda: attach(classifier, i)), pytest.raises(AttachError, match="already"):
        ns.run(lambda: attach(classifier, i))
