# SPDX-License-Identifier: Apache-2.0
"""SDK for inference workers: say what is about to be sent, never wait.

    with Client() as mfsd:
        mfsd.request("r1", ttft_left_s=0.4)
        mfsd.transfer("r1/l0", sock, 8 << 20, stage=Stage.P2D, request="r1", layer=0)
        sock.sendall(...)
        mfsd.done(transfer="r1/l0")

Needs grpcio and protobuf only (the wheel without extras), and no privileges.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from mfsd.client.client import Advice, Client, Rejected, Stats, Transfer
    from mfsd.client.manners import give_way
    from mfsd.client.selectors import Cookie, Fd, cookie_of, process_peer, tuple_of
    from mfsd.ground.model import Event, EventKind, Stage

__all__ = [
    "Advice",
    "Client",
    "Cookie",
    "Event",
    "EventKind",
    "Fd",
    "Rejected",
    "Stage",
    "Stats",
    "Transfer",
    "cookie_of",
    "give_way",
    "process_peer",
    "tuple_of",
]

_OTHERS: Final = {
    "client.client": ("Advice", "Client", "Rejected", "Stats", "Transfer"),
    "client.manners": ("give_way",),
    "ground.model": ("Event", "EventKind", "Stage"),
}
"""Where names are that are not in client.selectors."""


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is: mfsctl needs an introduction only, and must be quick."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((module for module, names in _OTHERS.items() if name in names), "client.selectors")
    found = globals()[name] = getattr(import_module(f"mfsd.{module}"), name)
    return found


def __dir__() -> list[str]:
    """What there is to import."""
    return sorted({*globals(), *__all__})
