# SPDX-License-Identifier: Apache-2.0
"""What happens to devices while they are governed: noticed within one round of care, mended or named."""

from __future__ import annotations

import dataclasses
import os
import socket
from typing import TYPE_CHECKING

import pytest
from support.nics import add_w, end, governed, rename, root, sh

from mfsd import doctor
from mfsd.datapath import facts as device_facts
from mfsd.datapath.bpf import syscall
from mfsd.datapath.facts import QUEUE_LENGTH
from mfsd.datapath.qdisc import enforcer
from mfsd.datapath.undo.notes import Owner
from mfsd.doctor import Context
from mfsd.ground.model import Mode
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.namespaces import NetnsPair

    from mfsd.daemon.devices import Devices

    Make = Callable[..., Devices]

pytestmark = [pytest.mark.bpf, pytest.mark.netns]


@pytest.fixture
def make(netns_pair: NetnsPair, tmp_path: Path) -> Iterator[Make]:
    """Makes devices of these names, governed once. The test runs in namespace ``a``, and must leave no note."""

    def devices(*names: str, attach: str = "auto", rate: str | None = "1gbit", state: str = "") -> Devices:
        sections = [{"name": name, "backend": "htb"} | ({"rate": rate} if rate else {}) for name in names]
        out = governed(tmp_path / state, *sections, daemon={"attach": attach})
        out.care(Mode.ENFORCE)
        return out

    with netns_pair.inside(netns_pair.a):
        yield devices
    assert not list(tmp_path.glob("qdisc-*"))


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_renamed_device_is_put_back(make: Make) -> None:
    before = root("v0")
    devices = make("v0")
    assert root("v0") == "htb"
    rename("v0", "v9")
    devices.care(Mode.ENFORCE)
    assert root("v9") == before
    assert "it is called v9 now" in devices.all[0].notice
    rename("v9", "v0")
    devices.care(Mode.ENFORCE)
    assert (root("v0"), devices.all[0].notice) == ("htb", "")
    end(devices)
    assert root("v0") == before


def test_an_alternative_name_is_named(make: Make) -> None:
    sh("ip link property add dev v0 altname oddly")
    devices = make("oddly", "none")
    odd, none = devices.all
    assert odd.notice == "that is an alternative name of v0: configure it as v0"
    assert none.notice == "there is no such device; it is set up when it appears"
    end(devices)


def test_two_devices_that_swap_their_names(make: Make) -> None:
    add_w()
    devices = make("v0")
    was = devices.all[0].ifindex
    for old, new in (("v0", "x0"), ("w0", "v0"), ("x0", "w0")):
        rename(old, new)
    devices.care(Mode.ENFORCE)
    assert socket.if_nametoindex("w0") == was
    assert root("w0") != "htb"
    assert (root("v0"), devices.all[0].ifindex) == ("htb", socket.if_nametoindex("v0"))
    end(devices)
    assert root("v0") != "htb"


def test_a_device_that_was_renamed_after_a_kill_is_put_back_by_the_next_daemon(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = root("v0")
    killed = make("v0")
    killed.close()  # the qdiscs stay
    monkeypatch.setattr(Owner, "alive", property(lambda _: False))
    rename("v0", "v9")
    assert root("v9") == "htb"
    devices = make("v0")
    assert root("v9") == before
    devices.close()


def test_the_same_name_made_anew_is_another_device(make: Make) -> None:
    add_w()
    devices = make("w0")
    was = devices.all[0].ifindex
    sh("ip link del w0")
    add_w()
    devices.care(Mode.ENFORCE)
    device = devices.all[0]
    assert device.ifindex == socket.if_nametoindex("w0") != was
    assert (root("w0"), device.notice) == ("htb", "")
    # The same index, too: everything that was on it is gone all the same.
    sh("ip link del w0")
    add_w(f"index {device.ifindex}")
    devices.care(Mode.ENFORCE)
    assert (root("w0"), device.notice) == ("htb", "")
    assert device.attachment is not None
    assert device.attachment.standing().attached
    end(devices)
    sh("ip link del w0")


def test_a_device_that_was_in_another_namespace_is_set_up_again(make: Make, netns_pair: NetnsPair) -> None:
    add_w()
    devices = make("w0")
    sh(f"ip link set w0 netns {netns_pair.b}")
    netns_pair.run(netns_pair.b, f"ip link set w0 netns {netns_pair.a}")
    sh("ip link set w0 up")
    devices.care(Mode.ENFORCE)
    assert (root("w0"), devices.all[0].notice) == ("htb", "")
    sh(f"ip link set w0 netns {netns_pair.b}")
    devices.care(Mode.ENFORCE)
    assert "there is no such device" in devices.all[0].notice
    end(devices)
    netns_pair.run(netns_pair.b, "ip link del w0")


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_a_classifier_that_somebody_took_off_tcx_is_put_back(make: Make) -> None:
    devices = make("v0", attach="tcx")
    device = devices.all[0]
    assert device.attachment is not None
    # As `bpftool link detach` does.
    syscall.link_detach(device.attachment.link_fd)
    assert not device.attachment.standing().attached
    devices.care(Mode.ENFORCE)
    assert device.attachment.standing().attached
    end(devices)


def test_a_deleted_clsact_is_put_back(make: Make) -> None:
    devices = make("v0", attach="clsact")
    assert "mfsd" in sh("tc filter show dev v0 egress")
    sh("tc qdisc del dev v0 clsact")
    devices.care(Mode.ENFORCE)
    assert "mfsd" in sh("tc filter show dev v0 egress")
    assert devices.all[0].notice == ""
    end(devices)
    assert "clsact" not in sh("tc qdisc show dev v0")


def test_a_filter_before_the_classifier_is_passed_once_and_named_then(make: Make) -> None:
    devices = make("v0", attach="clsact")
    # A classic program that matches no packet: every kernel with clsact filters has it.
    sh("tc filter add dev v0 egress pref 1 protocol all bpf bytecode '1,6 0 0 0,'")
    devices.care(Mode.ENFORCE)
    notice = devices.all[0].notice
    assert "before mfsd's classifier" in notice
    devices.care(Mode.ENFORCE)
    assert devices.all[0].notice == ""
    end(devices)
    assert "pref 1 bpf" in sh("tc filter show dev v0 egress")


def test_the_end_of_one_daemon_leaves_the_others_filter(make: Make) -> None:
    first = make("v0", attach="clsact", state="one")
    second = make("v0", attach="clsact", state="two")
    second.close()
    first.care(Mode.ENFORCE)
    assert first.all[0].attachment is not None
    assert first.all[0].attachment.standing().attached
    end(first)


# --- qdiscs and links -------------------------------------------------------------------------------------------------


def test_somebodys_leaf_below_ours_goes_alone(make: Make) -> None:
    devices = make("v0")
    lane = devices.all[0].band_rows()[-1].classid
    grafts = sh("tc -s qdisc show dev v0 root")
    sh(f"tc qdisc add dev v0 parent {lane} handle 77: tbf rate 1mbit burst 9k limit 9k")
    assert "77:" in sh("tc qdisc show dev v0")
    devices.care(Mode.ENFORCE)
    assert "77:" not in sh("tc qdisc show dev v0")
    assert devices.all[0].notice == ""
    assert sh("tc -s qdisc show dev v0 root").split()[:3] == grafts.split()[:3]
    end(devices)


def test_a_queue_length_that_was_changed_is_named_and_kept(make: Make) -> None:
    sh("ip link set v0 txqueuelen 333")
    devices = make("v0")
    sh("ip link set v0 txqueuelen 555")
    devices.care(Mode.ENFORCE)
    assert "its queue length was changed to 555" in devices.all[0].notice
    end(devices)
    assert "qlen 555" in sh("ip link show v0")


def test_a_device_that_is_down_or_has_no_carrier_is_named(make: Make, netns_pair: NetnsPair) -> None:
    devices = make("v0")
    for command, back, words in (
        (f"ip -n {netns_pair.b} link set v1 down", f"ip -n {netns_pair.b} link set v1 up", "it has no carrier"),
        ("ip link set v0 down", "ip link set v0 up", "it is down"),
    ):
        sh(command)
        devices.care(Mode.ENFORCE)
        assert words in devices.all[0].notice
        assert words.split()[-1] in doctor.device.exists(Context((), devices.config), "v0")[0].title
        sh(back)
        devices.care(Mode.ENFORCE)
        assert (root("v0"), devices.all[0].notice) == ("htb", "")
    end(devices)


@pytest.mark.parametrize("what", ["del dev v0 root", "replace dev v0 root handle 7: pfifo limit 33"])
def test_a_root_that_somebody_replaced_stays_and_restore_says_what_is_lost(make: Make, what: str) -> None:
    sh("tc qdisc replace dev v0 root handle 9: pfifo limit 77")
    devices = make("v0")
    sh(f"tc qdisc {what}")
    now = root("v0")
    for _ in range(2):
        devices.care(Mode.ENFORCE)
        assert (root("v0"), devices.all[0].enforced) == (now, False)
        assert "somebody replaced the root qdisc" in devices.all[0].notice
    for _ in range(2):
        restored, problems = devices.restore(["v0"])
        assert (restored, root("v0"), len(problems)) == ([], now, 1)
        assert "it was left alone. Before mfsd: qdisc pfifo 9: root limit 77p" in problems[0]
    devices.retry()
    devices.care(Mode.ENFORCE)
    assert (root("v0"), devices.all[0].notice) == ("htb", "")
    assert devices.restore(["v0"]) == (["v0"], [])
    assert root("v0") == now
    devices.close()


def test_who_asks_for_the_qdiscs_before_anybody_has_noticed_that_they_are_gone_gets_them(make: Make) -> None:
    devices = make("v0")
    sh("tc qdisc replace dev v0 root handle 7: pfifo limit 33")
    devices.retry()
    devices.care(Mode.ENFORCE)
    assert (root("v0"), devices.all[0].notice) == ("htb", "")
    devices.care(Mode.ENFORCE)
    sh("tc qdisc replace dev v0 root handle 7: pfifo limit 33")
    devices.care(Mode.ENFORCE)
    assert root("v0") == "pfifo"
    end(devices)
    assert root("v0") == "pfifo"


def test_a_queue_length_of_nothing_comes_back(make: Make) -> None:
    sh("ip link set v0 txqueuelen 0")
    devices = make("v0")
    assert f"qlen {QUEUE_LENGTH}" in sh("ip link show v0")
    end(devices)
    assert "qlen" not in sh("ip link show v0")


@pytest.mark.parametrize("queues", [1, 2, 4])
@pytest.mark.parametrize(
    "child", ["", "tc qdisc replace dev v0 parent 9:3 handle 13: pfifo limit 33"], ids=["", "third"]
)
def test_another_number_of_queues_below_an_mq_by_hand(make: Make, queues: int, child: str) -> None:
    sh("ethtool -L v0 tx 3")
    sh("tc qdisc replace dev v0 root handle 9: mq")
    if child:
        sh(child)
    before = sh("tc qdisc show dev v0")
    devices = make("v0")
    sh(f"ethtool -L v0 tx {queues}")
    devices.care(Mode.ENFORCE)
    assert devices.restore(["v0"]) == (["v0"], [])
    devices.close()
    sh("ethtool -L v0 tx 3")
    assert sorted(sh("tc qdisc show dev v0").splitlines()) == sorted(before.splitlines())


def test_a_new_link_speed_is_followed(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    real, speed = device_facts.facts_of, ["1gbit"]

    def facts(*args: object) -> object:
        return dataclasses.replace(real(*args), speed=Rate.parse(speed[0]))  # type: ignore[arg-type]

    monkeypatch.setattr(enforcer, "facts_of", facts)
    devices = make("v0", rate=None)
    device = devices.all[0]
    assert device.estimator.configured == pytest.approx(0.98 * 1e9 / 8)
    speed[0] = "10gbit"
    devices.care(Mode.ENFORCE)
    assert device.estimator.configured == pytest.approx(0.98 * 1e10 / 8)
    assert device.notice == ""
    end(devices)


# --- notes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[" * 5000, '{"version": 1}', '{"root": {"handle": 99999999999999}}', "\0" * 100, "\xff"],
    ids=range(8),
)
def test_a_damaged_note_is_named_and_the_device_left_as_it_is(make: Make, tmp_path: Path, text: str) -> None:
    killed = make("v0")
    killed.close()
    (note,) = tmp_path.glob("qdisc-*")
    kept = note.read_bytes()
    note.write_bytes(text.encode("latin-1"))
    devices = make("v0")
    assert root("v0") == "htb"
    assert not devices.all[0].enforced
    assert str(note) in devices.all[0].notice
    restored, problems = devices.restore(["v0"])
    assert (restored, len(problems)) == ([], 1)
    note.write_bytes(kept)
    devices.retry()
    devices.care(Mode.ENFORCE)
    assert (devices.all[0].enforced, devices.all[0].notice) == (True, "")
    end(devices)
    assert root("v0") != "htb"


def test_what_is_no_file_is_no_note_of_others(make: Make, tmp_path: Path) -> None:
    before = root("v0")
    (tmp_path / "qdisc-a.1.1.json").mkdir()
    os.mkfifo(tmp_path / "qdisc-b.json")
    (tmp_path / "qdisc-c.json").symlink_to("/dev/zero")
    devices = make("v0")
    assert (root("v0"), devices.all[0].notice) == ("htb", "")
    assert [("no regular file" in p) for p in devices.problems] == [True] * 3
    end(devices)
    assert root("v0") == before
    for odd in tmp_path.glob("qdisc-*"):
        odd.rmdir() if odd.is_dir() else odd.unlink()


@pytest.mark.parametrize("text", [None, "", "{}"], ids=["deleted", "emptied", "another"])
def test_a_note_that_is_lost_while_its_daemon_lives_is_written_again(
    make: Make, tmp_path: Path, text: str | None
) -> None:
    before = root("v0")
    devices = make("v0")
    (note,) = tmp_path.glob("qdisc-*")
    said = note.read_bytes()
    if text is None:
        note.unlink()
    else:
        note.write_text(text)
    devices.care(Mode.ENFORCE)
    assert (note.read_bytes(), devices.all[0].notice) == (said, "")
    note.unlink()
    note.mkdir()
    devices.care(Mode.ENFORCE)
    assert "its note was lost" in devices.all[0].notice
    note.rmdir()
    devices.care(Mode.ENFORCE)
    assert (note.read_bytes(), devices.all[0].notice) == (said, "")
    end(devices)
    assert root("v0") == before


def test_our_tree_without_a_note_is_named_and_restore_fails(make: Make, tmp_path: Path) -> None:
    make("v0").close()
    for note in tmp_path.glob("qdisc-*"):
        note.unlink()
    devices = make("v0")
    assert not devices.all[0].enforced
    assert "the note of what was there before is missing" in devices.all[0].notice
    restored, problems = devices.restore(["v0"])
    assert (restored, len(problems)) == ([], 1)
    devices.close()
    sh("tc qdisc del dev v0 root")
