# SPDX-License-Identifier: Apache-2.0
"""SDK for inference workers: say what is about to be sent, never wait.

    with Client() as mfsd:
        mfsd.request("r1", ttft_left_s=0.4)
        mfsd.transfer("r1/l0", sock, 8 << 20, stage=Stage.P2D, request="r1", layer=0)
        sock.sendall(...)
        mfsd.done(transfer="r1/l0")

Needs grpcio, protobuf and googleapis-common-protos only (``pip install mfsd[client]``), and no privileges.
"""

from mfsd.client.client import Client, Rejected, Stats
from mfsd.client.selectors import cookie_of, process_peer, tuple_of
from mfsd.model import Event, EventKind, Stage

__all__ = [
    "Client",
    "Event",
    "EventKind",
    "Rejected",
    "Stage",
    "Stats",
    "cookie_of",
    "process_peer",
    "tuple_of",
]
