# SPDX-License-Identifier: Apache-2.0
"""The BCC loader where the kernel's headers are: the same program, the same tables, the same verdicts."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from support.bpf_rig import Rig
from support.frames import frame4, frame6, key4, key6
from support.privileges import CAP_BPF, CAP_NET_ADMIN, DAEMON, call_with, do_all_with_two
from support.waiting import wait_for

from bench.parts.testrun import FOREVER, describe, run_packet
from mfsd.client import cookie_of
from mfsd.datapath import _abi
from mfsd.datapath.bpf import syscall
from mfsd.datapath.bpf.attach import attach, hook_users
from mfsd.datapath.bpf.bcc import BccLoader, check_headers
from mfsd.datapath.bpf.keys import MapFullError, cookie_key
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.namespaces import NetnsPair

    from mfsd.datapath.bpf.loader import Classifier, Loader

pytestmark = [pytest.mark.bpf, pytest.mark.feature("BCC loader")]


@pytest.fixture(scope="module")
def loader() -> BccLoader:
    try:
        check_headers(os.uname().release)
    except LoaderError:
        pytest.skip("this kernel has no headers")
    return BccLoader()


@pytest.fixture
def classifier(loader: BccLoader) -> Iterator[Classifier]:
    with loader.open_classifier(64) as c:
        describe(c)
        yield c


def test_both_loaders_give_the_same_verdicts(loader: BccLoader) -> None:
    """Data, pure ACKs, SYNs, IPv6, VLAN tags, strangers, rubbish: priority, packet and every counter."""
    packets: list[tuple[bytes, dict[str, Any]]] = [
        (frame4(), {}),
        (frame4(), {"wire_len": 60_000, "gso_segs": 48}),
        (frame6(), {}),
        (frame4(), {"priority": 0x20001}),
        (frame4()[:40], {}),
        (bytes(60), {}),
    ]

    def fates(which: Loader) -> list[Any]:
        with which.open_classifier(64) as c:
            describe(c)
            Rig(c).add_tuple(key4(), lane=2)
            Rig(c).add_tuple(key6(), 8, band=5)
            ran = [run_packet(c.prog_fd, frame, **more) for frame, more in packets]
            slots = c.slots[["bytes", "packets", "acked", "sent", "origin", "ifindex"]].tolist()
            out = [(r.verdict, r.priority, r.packet) for r in ran]
            return [out, c.stats().tolist(), slots, c.bands().tolist()]

    assert fates(loader) == fates(LibbpfLoader())


def test_a_hinted_packet_is_sent_to_its_lane(classifier: Classifier) -> None:
    Rig(classifier).add_tuple(key4(), lane=3, band=2)
    assert run_packet(classifier.prog_fd, frame4()).priority == 0x10033
    assert classifier.slots["packets"][7] == 1
    assert classifier.stats()[_abi.STAT_TUPLE] == 1


@pytest.mark.parametrize("rows", [1, 65, 16384])
def test_tables_have_the_size_asked_for(loader: BccLoader, rows: int) -> None:
    with loader.open_classifier(rows) as c:
        c.slots["generation"] = np.arange(rows)
        assert c.slots["generation"][-1] == rows - 1
        for row in range(rows):
            c.cookies.add(cookie_key(row), row)
        assert c.cookies.get(cookie_key(rows - 1)) == rows - 1
        if rows < 100:
            with pytest.raises(MapFullError):
                c.cookies.add(cookie_key(2**40), 0)


def test_two_devices_share_the_host(loader: BccLoader, classifier: Classifier) -> None:
    with loader.open_classifier(64, classifier) as two:
        two.dev[:] = classifier.dev
        Rig(classifier).add_tuple(key4())
        for c in (classifier, two):
            assert run_packet(c.prog_fd, frame4()).priority == 0x10040
        assert two.slots["packets"][7] == 2
        assert two.stats()[_abi.STAT_TUPLE] == 1


def test_closing_gives_everything_back(loader: BccLoader) -> None:
    def bpf_fds() -> int:
        found = 0
        for fd in Path("/proc/self/fd").iterdir():
            try:
                found += "bpf" in str(fd.readlink())
            except FileNotFoundError:  # the listing's own
                continue
        return found

    before = bpf_fds()
    loader.open_classifier(16).close()
    assert bpf_fds() == before


@pytest.mark.netns
def test_it_works_on_a_device(netns_pair: NetnsPair, classifier: Classifier) -> None:
    """By cookie, with whatever hook the kernel has; nothing is left behind."""
    pair = netns_pair
    with pair.inside(pair.a):
        index = socket.if_nametoindex(pair.dev_a)
        before = pair.run(pair.a, "tc qdisc show")
        with attach(classifier, index):
            (user,) = hook_users(index)
            assert user.ours
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
                classifier.slots["expires_ns"][5] = FOREVER
                classifier.cookies.add(cookie_key(cookie_of(s)), 5)
                for _ in range(3):
                    s.sendto(b"x" * 100, (pair.addr_b, 9))
            wait_for(lambda: bool(classifier.slots["packets"][5] >= 3))
        assert hook_users(index) == []
        assert pair.run(pair.a, "tc qdisc show") == before


@pytest.mark.netns
@pytest.mark.feature("BCC loader with CAP_BPF and CAP_NET_ADMIN only")
def test_two_capabilities_suffice(loader: BccLoader, netns_pair: NetnsPair) -> None:  # noqa: ARG001 - skips without headers
    """Compiling included: BCC makes maps while it compiles, and reads the headers, which anybody may."""
    do_all_with_two(netns_pair, "bcc")


@pytest.mark.feature("BCC loader with CAP_BPF and CAP_NET_ADMIN only")
@pytest.mark.parametrize("missing", [CAP_BPF, CAP_NET_ADMIN])
def test_a_missing_capability_is_named(loader: BccLoader, missing: int) -> None:
    with pytest.raises(LoaderError, match="CAP_BPF"):
        call_with(DAEMON - {missing}, lambda: loader.open_classifier(16).close())


def test_missing_headers_name_the_package(tmp_path: Path) -> None:
    if Path("/sys/kernel/kheaders.tar.xz").exists():
        return
    with pytest.raises(LoaderError, match=r"apt-get install linux-headers-9\.9\.9"):
        check_headers("9.9.9", tmp_path)


def test_a_compiler_error_is_shown(loader: BccLoader, tmp_path: Path) -> None:  # noqa: ARG001 - skips without headers
    source = tmp_path / "classifier.bpf.c"
    source.write_text("int mfsd_classify(struct __sk_buff *skb) { return nonsense; }\n")
    with pytest.raises(LoaderError, match="nonsense") as caught:
        BccLoader(source).open_classifier(16)
    assert "error" in caught.value.log_tail


def test_a_source_without_our_maps(loader: BccLoader, tmp_path: Path) -> None:  # noqa: ARG001 - skips without headers
    source = tmp_path / "classifier.bpf.c"
    source.write_text("int mfsd_classify(struct __sk_buff *skb) { return 0; }\n")
    with pytest.raises(LoaderError, match="no map mfsd_host"):
        BccLoader(source).open_classifier(16)


def test_calls_raise_the_kernels_errno(classifier: Classifier) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        syscall.BpfMap(classifier.map_fds["mfsd_cookies"], 8, 4).delete(cookie_key(1))
    assert caught.value.errno == errno.ENOENT
    assert syscall.prog_info(syscall.prog_id(classifier.prog_fd))[0] == "mfsd_classify"
