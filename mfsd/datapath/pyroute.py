# SPDX-License-Identifier: Apache-2.0
"""The edge to pyroute2: its errors are no OSErrors, so they become ours here and nowhere else."""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkDecodeError
from pyroute2.netlink.exceptions import NetlinkError as Refusal

from mfsd.host.netlink import NetlinkError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def iproute(what: str) -> Iterator[Any]:
    """pyroute2's IPRoute in the calling thread's network namespace; not for a thread with a running event loop.

    What the kernel refuses inside comes out as NetlinkError, and everything else that fails as OSError; ``what`` says
    what was tried. pyroute2 answers some questions lazily: read them inside, too.
    """
    try:
        with IPRoute() as ip:
            yield ip
    except Refusal as e:
        raise NetlinkError(e.code, what) from e
    except NetlinkDecodeError as e:
        raise NetlinkError(errno.EPROTO, what, str(e)) from e
