# SPDX-License-Identifier: Apache-2.0
"""The guest's two network cards, joined by a slow wire outside (scripts/vm/wire.py), as a pair of namespaces."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from typing import TYPE_CHECKING, Final

from support.namespaces import NetnsPair, ip

if TYPE_CHECKING:
    from collections.abc import Iterator

CARDS: Final = ("eth0", "eth1")


@contextlib.contextmanager
def wired_namespaces() -> Iterator[NetnsPair]:
    """Each card in a namespace of its own; both are back where they were afterwards."""
    stem = f"mfsd-w-{secrets.token_hex(4)}"
    pair = NetnsPair(f"{stem}-a", f"{stem}-b", *CARDS)
    ends = ((pair.a, pair.dev_a, pair.addr_a, pair.addr6_a), (pair.b, pair.dev_b, pair.addr_b, pair.addr6_b))
    try:
        for name, dev, v4, v6 in ends:
            ip("netns", "add", name)
            ip("link", "set", dev, "netns", name)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "addr", "add", f"{v4}/24", "dev", dev)
            ip("-n", name, "addr", "add", f"{v6}/64", "dev", dev, "nodad")
            ip("-n", name, "link", "set", dev, "up")
        yield pair
    finally:
        for name, dev, _, _ in ends:
            for words in (("-n", name, "link", "set", dev, "netns", "1"), ("netns", "del", name)):
                subprocess.run(["ip", *words], check=False, capture_output=True)
    for dev in CARDS:
        ip("link", "show", dev)
