# SPDX-License-Identifier: Apache-2.0
"""Peers whose certificates have expired, or are of somebody else: what an operator is told."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest
from support.relays import SENDER, WAITER, Hosts
from support.waiting import wait_for

from mfsd.client import Client, Stage, tuple_of
from mfsd.lab.hosts.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.daemon


def expire(authority: Authority, name: str) -> None:
    """Have a certificate that ended yesterday in the place of another one."""
    folder = authority.folder
    words = f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile {name}.ext -out {name}.pem"
    subprocess.run(["openssl", *words.split(), "-days", "-1"], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("whose", "words"),
    [("sender.test", "certificate has expired"), ("waiter.test", "does not accept our certificate")],
)
def test_a_certificate_that_has_expired_is_named_by_who_waits(tmp_path: Path, whose: str, words: str) -> None:
    authority = Authority(tmp_path / "ca")
    papers, own = authority.papers("sender.test", SENDER), authority.papers("waiter.test", WAITER)
    expire(authority, whose)
    hosts = Hosts(tmp_path, papers, own)
    try:
        with Client(target=hosts.waiter.target) as client:
            client.request("r", ttft_left_s=60.0)
            client.transfer("r/kv", tuple_of(WAITER, 0, SENDER, 6000), 1000, stage=Stage.P2D, request="r")
            wait_for(lambda: any(words in n for n in hosts.waiter.daemon.notices()))
    finally:
        hosts.stop()
