# SPDX-License-Identifier: Apache-2.0
"""Tests for guests with stock kernels (`make test-vm`), collected only there; support/emulated.py is their plugin."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.prio_benches import PrioBench, fixed_neighbours
from support.waiting import wait_for

from mfsd.datapath import tc
from mfsd.datapath.facts import kernel_has
from mfsd.datapath.qdisc import plan as planning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from support.namespaces import NetnsPair

QDISCS = ("htb", "prio", "tbf", "drr", "fq", "fq_codel", "ets", "sfq", "codel", "mqprio", "netem", "red", "cake")

NO_ETS = Path("/etc/modprobe.d/mfsd-no-ets.conf")
"""In a guest, whose root file system is its own."""

if "MFSD_VM" not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def needs() -> Callable[..., None]:
    """Skip where the kernel was built without a qdisc; what mfsd asks the kernel about must agree."""
    has = set(os.environ["MFSD_VM_FEATURES"].split())

    def check(*kinds: str) -> None:
        with tc.TcSocket() as sock:
            for kind in set(kinds) & set(QDISCS):
                assert kernel_has(sock, kind) == (kind in has), kind
        for kind in kinds:
            if kind not in has:
                pytest.skip(f"this kernel has no {kind}")

    return check


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, netns_pair: NetnsPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[PrioBench]:
    """The test runs inside the sending namespace. Parameter: "ets", or (default) "prio" as on a kernel without ets."""
    fixed_neighbours(netns_pair)
    weights = getattr(request, "param", "prio") == "ets"
    if not weights:
        monkeypatch.setattr(planning, "kernel_has", lambda sock, kind: kind != "ets" and kernel_has(sock, kind))
    with contextlib.ExitStack() as stack:
        stack.enter_context(netns_pair.inside(netns_pair.a))
        yield PrioBench(netns_pair, tmp_path / "state", stack, weights=weights)


@pytest.fixture
def without_ets() -> Iterator[None]:
    """As on a kernel that was built without ets, for other processes, too: its module can't be loaded."""

    def gone() -> bool:
        # Namespaces of earlier tests, which may have used it, go in the background.
        subprocess.run(["modprobe", "-r", "sch_ets"], check=False, capture_output=True)
        return not Path("/sys/module/sch_ets").exists()

    wait_for(gone, "ets to be unloaded")
    NO_ETS.parent.mkdir(parents=True, exist_ok=True)
    NO_ETS.write_text("install sch_ets /bin/false\n")
    try:
        with tc.TcSocket() as sock:
            assert not kernel_has(sock, "ets")
        yield
    finally:
        NO_ETS.unlink()
