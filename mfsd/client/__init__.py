# SPDX-License-Identifier: Apache-2.0
"""SDK for inference workers: say what is about to be sent, never wait.

    with Client() as mfsd:
        mfsd.request("r1", ttft_left_s=0.4)
        mfsd.transfer("r1/l0", sock, 8 << 20, stage=Stage.P2D, request="r1", layer=0)
        sock.sendall(...)
        mfsd.done(transfer="r1/l0")

Needs grpcio and protobuf only (``pip install mfsd``), and no privileges.
"""

from mfsd.client.client import Advice, Client, Rejected, Stats, Transfer
from mfsd.client.selectors import Cookie, Fd, cookie_of, process_peer, tuple_of
from mfsd.model import Event, EventKind, Stage

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
    "process_peer",
    "tuple_of",
]
