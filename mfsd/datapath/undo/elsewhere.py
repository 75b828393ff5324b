# SPDX-License-Identifier: Apache-2.0
"""Devices that have left their network namespace while no daemon ran: gone, or in another namespace.

The kernel takes all qdiscs off a device that moves (dev_shutdown, net/core/dev.c), and may give it another index. What
stays with it is its hardware's address, and the queue length that mfsd gave to a device that had none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from mfsd.datapath import links, tc
from mfsd.datapath.errors import DatapathError
from mfsd.datapath.facts import QUEUE_LENGTH
from mfsd.datapath.undo.notes import Namespace
from mfsd.host import namespaces

if TYPE_CHECKING:
    from mfsd.datapath.undo.notes import State
    from mfsd.host.namespaces import Place


class Seen(NamedTuple):
    """A device that may be the note's."""

    place: Place
    state: State
    """The note, of the device where it is now."""

    @property
    def name(self) -> str:
        """What it is called, and where."""
        return f"{self.state.ifname} in {self.place.called}"


def keeps(state: State) -> bool:
    """Something of mfsd stays on the device when it moves."""
    return state.before.txqlen == 0


def left(state: State) -> str:
    """What is to be said, and done, of a device that is not in its namespace any more."""
    name, where = state.ifname, "" if state.path is None else f", or remove {state.path}"
    state_dir = "" if state.path is None else f" --state-dir {state.path.parent}"
    return (
        f"{name} has left this network namespace: it was deleted, or moved to another one with the queue length of "
        f"{QUEUE_LENGTH} that mfsd gave it; mfsctl restore {name}{state_dir}, run as root, looks for it and takes that "
        f"back, as does ip link set dev {name} txqueuelen 0 in its namespace{where} if it is deleted"
    )


def find(state: State) -> tuple[list[Seen], bool]:
    """(where a device like the note's is, False if some namespaces can't be looked into)."""
    if not state.address:
        return [], False
    places, whole = namespaces.every()
    home = state.namespace.inode  # where devices get another index by being made anew only
    out: list[Seen] = []
    for place in [p for p in places if p.inode != home]:
        try:
            out += namespaces.inside(place, lambda place=place: _like(state, place))  # type: ignore[misc]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except (OSError, DatapathError):
            whole = False
    return out, whole


def _like(state: State, place: Place) -> list[Seen]:
    with tc.TcSocket() as sock:
        here = Namespace.of(sock)
        return [
            Seen(place, replace(state, ifname=link.name, ifindex=link.ifindex, namespace=here))
            for link in links.every(sock)
            # VLANs of one device share its address. Who moves keeps its index unless somebody else has it there.
            if (link.address, link.kind) == (state.address, state.kind)
            and (link.ifindex == state.ifindex or link.name == state.ifname)
        ]
