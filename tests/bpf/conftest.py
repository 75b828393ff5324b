# SPDX-License-Identifier: Apache-2.0
"""A loaded classifier on a bench."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

import pytest
from support.bpf_rig import ROWS, Rig
from support.privileges import CAP_PERFMON, DAEMON, call_with
from support.yielders import Bench

from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.yielding import Yielding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.namespaces import NetnsPair


@pytest.fixture(scope="module")
def loaded() -> Iterator[Rig]:
    """Load once per module, with the capabilities of the daemon; pinned to one CPU for the sake of cookies."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    with call_with(DAEMON, lambda: LibbpfLoader().open_classifier(ROWS)) as classifier:
        yield Rig(classifier)
    os.sched_setaffinity(0, cpus)


@pytest.fixture
def rig(loaded: Rig) -> Rig:
    """A clean bench."""
    loaded.reset()
    return loaded


@pytest.fixture
def bench(netns_pair: NetnsPair) -> Iterator[Bench]:
    """The algorithm, loaded with what the daemon may, between two namespaces."""
    with contextlib.ExitStack() as stack:
        classifier = stack.enter_context(call_with(DAEMON, lambda: LibbpfLoader().open_classifier(64)))
        loaded = stack.enter_context(call_with(DAEMON | {CAP_PERFMON}, lambda: Yielding(classifier)))
        made = Bench(classifier, loaded, netns_pair)
        yield made
        made.close()
