# SPDX-License-Identifier: Apache-2.0
"""Devices that go away between two calls: whoever asks gets an error of ours, whenever it happens."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
from support.exhausted import no_descriptors
from support.nics import add_w, sh
from support.vanishing import vanishings

from mfsd.datapath import links, tc
from mfsd.datapath.bpf.attach import attach, hook_users, remove_leftover
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.errors import AttachError, EnforceError, NoDeviceError
from mfsd.datapath.facts import read_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.namespaces import NetnsPair

    from mfsd.datapath.bpf.loader import Classifier

pytestmark = [pytest.mark.bpf, pytest.mark.netns]


def remove() -> None:
    sh("ip link del w0")


def index() -> int:
    return socket.if_nametoindex("w0")


def set_txqlen() -> None:
    with tc.TcSocket() as sock:
        links.set_txqlen(sock, index(), 5)


def look() -> None:
    at = index()
    with tc.TcSocket() as sock:
        links.by_index(sock, at)


@pytest.fixture
def classifier(netns_pair: NetnsPair) -> Iterator[Classifier]:
    """The test runs in a namespace."""
    with LibbpfLoader().open_classifier(16) as c, netns_pair.inside(netns_pair.a):
        yield c


@pytest.mark.parametrize(
    ("ask", "error", "fails"),
    [
        (lambda _: read_facts("w0"), EnforceError, True),
        (lambda _: set_txqlen(), NoDeviceError, True),
        (lambda _: look(), NoDeviceError, True),
        (lambda c: attach(c, index(), "auto").detach(), AttachError, True),
        (lambda c: attach(c, index(), "clsact").detach(), AttachError, True),
        (lambda c: attach(c, index(), "clsact").update(c), AttachError, True),
        (lambda _: remove_leftover(index()), AttachError, False),  # what is gone leaves nothing
        (lambda _: hook_users(index()), OSError, None),  # where there is TCX
    ],
    ids=["read_facts", "set_txqlen", "by_index", "attach", "detach", "update", "remove_leftover", "hook_users"],
)
def test_whatever_is_asked(
    classifier: Classifier,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[Classifier], object],
    error: type[Exception],
    *,
    fails: bool | None,
) -> None:
    raised = 0
    for vanishing in vanishings(monkeypatch, add_w, remove):
        try:
            ask(classifier)
        except error:
            assert vanishing.happened
            raised += 1
    assert vanishing.asked >= 1
    assert fails is None or bool(raised) == fails


@pytest.mark.usefixtures("classifier")  # in its namespace
def test_a_missing_device_is_told_from_one_that_cannot_be_asked() -> None:
    """A note of what was there is thrown away for a device that is gone, and for no other reason."""
    with pytest.raises(NoDeviceError, match="no such device; devices here: lo, v0"):
        read_facts("nosuch0")
    with tc.TcSocket() as sock:
        for ask in (links.by_index, lambda s, i: links.set_txqlen(s, i, 5)):
            with pytest.raises(NoDeviceError):
                ask(sock, 2**30)

    for free in range(2):  # the question needs a socket, and the answer about its speed another one
        with no_descriptors(free), pytest.raises(EnforceError, match="Too many open files") as caught:
            read_facts("v0")
        assert not isinstance(caught.value, NoDeviceError)


@pytest.mark.usefixtures("classifier")  # in its namespace
def test_an_alternative_name_is_no_name() -> None:
    """Notes go by the name: a device must not have two."""
    sh("ip link property add dev v0 altname other0")
    assert read_facts("v0").ifname == "v0"
    with pytest.raises(NoDeviceError):
        read_facts("other0")
