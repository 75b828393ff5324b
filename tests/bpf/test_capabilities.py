# SPDX-License-Identifier: Apache-2.0
"""CAP_BPF and CAP_NET_ADMIN suffice, and nothing else is asked for.

Without CAP_PERFMON the verifier guards programs against speculation: it refuses some pointer arithmetic, adds barriers
and masks, and explores more. The other tests of this folder run a classifier that was loaded like that, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from support.privileges import CAP_BPF, CAP_NET_ADMIN, DAEMON, call_with, do_all_with_two

from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from support.namespaces import NetnsPair

pytestmark = pytest.mark.bpf


@pytest.mark.netns
def test_a_process_with_two_capabilities_does_all_that_the_daemon_does(netns_pair: NetnsPair) -> None:
    do_all_with_two(netns_pair)


def test_full_root_can_load_it_too() -> None:
    LibbpfLoader().open_classifier(16).close()


@pytest.mark.parametrize(
    "capabilities", [DAEMON - {CAP_BPF}, DAEMON - {CAP_NET_ADMIN}, frozenset()], ids=["no bpf", "no net_admin", "none"]
)
def test_a_missing_capability_is_named(capabilities: frozenset[int]) -> None:
    with pytest.raises(LoaderError, match="CAP_BPF and CAP_NET_ADMIN"):
        call_with(capabilities, lambda: LibbpfLoader().open_classifier(16).close())
