# SPDX-License-Identifier: Apache-2.0
"""Which connections a session may name: those of its user, unless it may speak for all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mfsd.ground.model import HintError

if TYPE_CHECKING:
    from mfsd.engine.records import Session
    from mfsd.engine.sockets import Socket, Sockets


def own(session: Session | None, uid: int, field: str) -> None:
    """Raise HintError unless a session may name the connections of a user."""
    if session is not None and session.only not in (-1, uid):
        raise HintError(
            field,
            f"is no connection of user {session.only}",
            "hint your own; daemon.trusted_users lists who may hint those of others",
        )


def own_now(sockets: Sockets, session: Session | None, socket: Socket) -> Socket:
    """The socket, if it is ``session``'s to name. Raises HintError.

    Of accepted ones it is told who made the listener. They are the user's who has accepted them, who may be another one
    (privileges dropped behind the listen, a listener that was passed on).
    """
    if session is not None and session.only not in (-1, socket.uid) and socket.here:
        socket = replace(socket, uid=sockets.user(socket))
    own(session, socket.uid, "selector.cookie")
    return socket
