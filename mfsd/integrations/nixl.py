# SPDX-License-Identifier: Apache-2.0
"""NIXL under mfsd: a wrapper of the agent that announces transfers. Everything else goes through to the agent.

    from nixl._api import nixl_agent
    from mfsd.integrations.nixl import HintedAgent, Peer

    agent = HintedAgent(nixl_agent("decode"), client, {"prefill": Peer("10.0.0.2", (20000, 20999))})
    with_request("r7", stage=Stage.P2D)   # what follows in this thread belongs to it
    handle = agent.initialize_xfer("READ", mine, theirs, "prefill")
    agent.transfer(handle)

NIXL names agents, and knows bytes, not addresses: those of the peers are given (UCX_TCP_PORT_RANGE pins a listener's
ports). A READ's bytes leave the peer's host, so its daemon must hear of them: section [relay] of the daemon.
"""

from __future__ import annotations

import itertools
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mfsd.client import Stage
from mfsd.integrations import guard
from mfsd.integrations.guard import Owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mfsd.client import Client
    from mfsd.ground.model import TupleSelector

OVER: Final = frozenset({"DONE", "ERR"})


@dataclass(frozen=True, slots=True)
class Peer:
    """Where another agent is. ``ports``: of its listener; (0, 0): any."""

    address: str
    ports: tuple[int, int] = (0, 0)


_NOBODY: Final = Owner()
_here = threading.local()


def with_request(request: str = "", *, stage: Stage = Stage.BACKGROUND, deadline_s: float | None = None) -> None:
    """What transfers that this thread starts from now on belong to; the request has been announced to the client.

    Without a request they are background, which needs none.
    """
    _here.owner = Owner(request, stage, deadline_s)


@dataclass(slots=True)
class _Transfer:
    name: str
    selector: TupleSelector
    size: int
    begun: bool = False


class HintedAgent:
    """See the module. Never raises but what the agent raises; never waits."""

    def __init__(self, agent: Any, client: Client, peers: Mapping[str, Peer]) -> None:
        """``peers``: by agent name."""
        self._agent, self._client, self._peers = agent, client, dict(peers)
        self._guard, self._resolver = guard.Guard(), guard.Resolver()
        self._numbers = itertools.count()
        self._transfers: dict[int, tuple[Any, _Transfer]] = {}
        """By identity of the handle, which is kept so that no other one gets its number."""

    def __getattr__(self, name: str) -> Any:
        """What is not wrapped."""
        return getattr(self._agent, name)

    def initialize_xfer(
        self, operation: str, local_descs: Any, remote_descs: Any, remote_agent: str, *rest: Any, **more: Any
    ) -> Any:
        """As the agent's."""
        handle = self._agent.initialize_xfer(operation, local_descs, remote_descs, remote_agent, *rest, **more)
        self._guard("a transfer", lambda: self._note(handle, operation, _size(local_descs), remote_agent))
        return handle

    def _note(self, handle: Any, operation: str, size: int, remote: str) -> None:
        peer = self._peers.get(remote)
        selector = None if peer is None else self._resolver.way(peer.address, peer.ports, reads=operation == "READ")
        if selector is not None and size > 0:
            name = f"nixl-{os.getpid()}-{next(self._numbers)}"
            self._transfers[id(handle)] = handle, _Transfer(name, selector, size)

    def transfer(self, handle: Any, *rest: Any, **more: Any) -> Any:
        """As the agent's; the hint goes before the bytes."""
        self._guard("a transfer's hint", lambda: self._begin(handle))
        return self._agent.transfer(handle, *rest, **more)

    def _begin(self, handle: Any) -> None:
        _, one = self._transfers.get(id(handle), (None, None))
        if one is None:
            return
        owner: Owner = getattr(_here, "owner", _NOBODY)
        if one.begun:  # a handle may be used again
            self._client.done(transfer=one.name)
            one.name = f"nixl-{os.getpid()}-{next(self._numbers)}"
        one.begun = True
        owner.announce(self._client, one.name, one.selector, one.size)

    def check_xfer_state(self, handle: Any) -> Any:
        """As the agent's."""
        state = self._agent.check_xfer_state(handle)
        if state in OVER:
            self._guard("a completion's hint", lambda: self._end(handle, cancelled=state != "DONE"))
        return state

    def _end(self, handle: Any, *, cancelled: bool) -> None:
        _, one = self._transfers.get(id(handle), (None, None))
        if one is None or not one.begun:
            return
        one.begun = False
        end = self._client.cancel if cancelled else self._client.done
        end(transfer=one.name)

    def release_xfer_handle(self, handle: Any) -> Any:
        """As the agent's; what is still on its way will not come."""
        self._guard("a cancellation's hint", lambda: self._end(handle, cancelled=True))
        self._transfers.pop(id(handle), None)
        return self._agent.release_xfer_handle(handle)


def _size(descs: Any) -> int:
    """Bytes of a list of descriptors; 0: unknown."""
    return sum(int(descs[i][1]) for i in range(descs.descCount()))
