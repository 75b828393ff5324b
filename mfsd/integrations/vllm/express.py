# SPDX-License-Identifier: Apache-2.0
"""A second way for reads that are due before one that is on its way.

UCX brings what a connection is asked for in that order, so a tight read that is asked for behind a loose one waits for
all of it, whatever becomes of the packets. Here it goes by a second agent of NIXL, which has connections of its own to
the same prefill hosts, and shares the link with the loose one. That host needs no second agent, and hears from either
that it may free its blocks.

Stands between vLLM's worker and its agent, whose place in the worker it takes before KV caches are registered. Memory
is registered with both, and descriptors are prepared for both. If the second one fails at any of that, there is none.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mfsd.integrations.vllm.hold import LONGEST_S

if TYPE_CHECKING:
    from collections.abc import Callable

DUE: Final = "mfsd_due"
"""Attribute of the metadata: seconds until reads are due, by request."""
HEARD_MAX: Final = 65_536

log = logging.getLogger("mfsd.integrations")


def second(agent: Any) -> Any:
    """Another agent like this one, with a worker of its own. Raises whatever NIXL raises."""
    settings = getattr(sys.modules[type(agent).__module__], "nixl_agent_config", None)
    config = None if settings is None else settings(backends=list(agent.backends), capture_telemetry=True)
    return type(agent)(str(uuid.uuid4()), config)


@dataclass(frozen=True, eq=False, slots=True)
class Descriptors:
    """What both agents have prepared."""

    usual: Any
    express: Any
    """None: nothing, the second agent has failed."""


@dataclass(eq=False, slots=True)
class Read:
    """What vLLM takes for a transfer's handle."""

    agent: Any
    handle: Any
    peer: Descriptors | None
    """The remote side of one that goes the usual way."""
    due: float
    """Monotonic seconds."""
    usually: Callable[[], Read] | None = None
    """Makes one that goes the usual way, of one that does not."""


class Express:
    """As NIXL's agent. See the module."""

    def __init__(self, agent: Any, other: Any) -> None:
        self._agent, self._other = agent, other
        self._going: dict[Descriptors, set[Read]] = {}
        """Reads on their usual way, by remote side."""
        self._due: dict[str, float] = {}
        """By the name that the prefill host has for a request; monotonic seconds."""

    def __getattr__(self, name: str) -> Any:
        """What is not for both."""
        return getattr(self._agent, name)

    def hear(self, meta: Any, now: float) -> None:
        """The metadata of a step: what is about to be read, and when it is due."""
        for name, left in getattr(meta, DUE, {}).items():
            remote = getattr(getattr(meta.reqs_to_recv.get(name), "remote", None), "request_id", None)
            if remote is not None:
                self._due[remote] = now + left
                if len(self._due) > HEARD_MAX:
                    del self._due[next(iter(self._due))]

    def _too(self, body: Callable[[Any], Any]) -> Any:
        """What ``body`` returns for the second agent; None: there is none any more."""
        if self._other is None:
            return None
        try:
            return body(self._other)
        except Exception:  # whatever NIXL's agent raises
            log.exception("mfsd: reads have no second way any more")
            self._other = None
            return None

    # --- what both need -----------------------------------------------------------------------------------------------

    def register_memory(self, *args: Any, **more: Any) -> Any:
        """Memory that is read into."""
        out = self._agent.register_memory(*args, **more)
        self._too(lambda other: other.register_memory(*args, **more))
        return out

    def deregister_memory(self, *args: Any, **more: Any) -> Any:
        """No longer."""
        self._too(lambda other: other.deregister_memory(*args, **more))
        return self._agent.deregister_memory(*args, **more)

    def add_remote_agent(self, metadata: Any) -> Any:
        """A prefill host."""
        out = self._agent.add_remote_agent(metadata)
        self._too(lambda other: other.add_remote_agent(metadata))
        return out

    def remove_remote_agent(self, name: Any) -> Any:
        """It is gone."""
        self._too(lambda other: other.remove_remote_agent(name))
        return self._agent.remove_remote_agent(name)

    def prep_xfer_dlist(self, *args: Any, **more: Any) -> Any:
        """Descriptors of either side."""
        usual = self._agent.prep_xfer_dlist(*args, **more)
        return Descriptors(usual, self._too(lambda other: other.prep_xfer_dlist(*args, **more)))

    def release_dlist_handle(self, handle: Any) -> Any:
        """No longer."""
        self._going.pop(handle, None)
        if handle.express is not None:
            self._too(lambda other: other.release_dlist_handle(handle.express))
        return self._agent.release_dlist_handle(handle.usual)

    # --- reads --------------------------------------------------------------------------------------------------------

    def make_prepped_xfer(
        self, operation: str, mine: Any, mine_ids: Any, theirs: Any, theirs_ids: Any, notif_msg: Any = b"", **more: Any
    ) -> Any:
        """By the second agent if it is due before one that is on its usual way."""
        word = notif_msg.decode(errors="replace") if isinstance(notif_msg, bytes) else str(notif_msg)
        longest = time.monotonic() + LONGEST_S
        due = min(self._due.get(word.rpartition(":")[0], longest), longest)
        behind = any(read.due > due for read in self._going.get(theirs, ()))

        def made(agent: Any, ours: Any, others: Any) -> Any:
            return agent.make_prepped_xfer(operation, ours, mine_ids, others, theirs_ids, notif_msg=notif_msg, **more)

        def usually() -> Read:
            return Read(self._agent, made(self._agent, mine.usual, theirs.usual), theirs, due)

        if behind and None not in (mine.express, theirs.express):
            read = self._too(lambda other: Read(other, made(other, mine.express, theirs.express), None, due, usually))
            if read is not None:
                return read
        return usually()

    def transfer(self, read: Read, *rest: Any, **more: Any) -> Any:
        """Begin; the usual way if the second agent can't."""
        if read.usually is not None:
            out = self._too(lambda other: other.transfer(read.handle, *rest, **more))
            if self._other is not None:
                return out
            other, handle, instead = read.agent, read.handle, read.usually()
            read.agent, read.handle, read.peer, read.usually = instead.agent, instead.handle, instead.peer, None
            with contextlib.suppress(Exception):  # it has failed already
                other.release_xfer_handle(handle)
        out = read.agent.transfer(read.handle, *rest, **more)
        if read.peer is not None:
            self._going.setdefault(read.peer, set()).add(read)
        return out

    def check_xfer_state(self, read: Read) -> Any:
        """Whether it is here."""
        state = read.agent.check_xfer_state(read.handle)
        if state != "PROC":
            self._over(read)
            if state != "DONE" and read.usually is not None and self._other is not None:
                log.warning("mfsd: a read by the second way has failed (%s): there is none any more", state)
                self._other = None  # this one's blocks are vLLM's to see to: what has begun may still write
        return state

    def get_xfer_telemetry(self, read: Read) -> Any:
        """What it took."""
        return read.agent.get_xfer_telemetry(read.handle)

    def release_xfer_handle(self, read: Read) -> Any:
        """No more of it. Raises what the agent raises, if it can't be cancelled: ask again then."""
        out = read.agent.release_xfer_handle(read.handle)
        self._over(read)
        return out

    def _over(self, read: Read) -> None:
        if read.peer is not None:
            self._going.get(read.peer, set()).discard(read)
