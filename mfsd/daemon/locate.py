# SPDX-License-Identifier: Apache-2.0
"""Which device a configured name means now, and what becomes of the one that it meant before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from mfsd.daemon import leftovers
from mfsd.datapath import links
from mfsd.datapath.errors import DatapathError, NoDeviceError

if TYPE_CHECKING:
    from pathlib import Path

    from mfsd.daemon.device import Device
    from mfsd.datapath.tc import TcSocket

log = structlog.get_logger(__name__)


def locate(sock: TcSocket, state_dir: Path, gone: dict[int, bool] | None, device: Device) -> None:
    """Find out which index the name means now, and let go of another one that it meant before.

    ``gone``: who has been away since the last time (links.Departures); None: nobody knows. Raises OSError.
    """
    try:
        ifindex = links.by_name(sock, device.name).ifindex
    except NoDeviceError:
        ifindex = 0
    old = device.ifindex
    if old and gone is not None and old in gone:
        _lost(sock, device, state_dir, moved=gone[old])
    elif old and old != ifindex:
        try:
            links.by_index(sock, old)
        except NoDeviceError:
            _lost(sock, device, state_dir, moved=gone is None)
        else:
            _release(device)
    if ifindex:
        device.was = 0
    device.ifindex = ifindex


def _lost(sock: TcSocket, device: Device, state_dir: Path, *, moved: bool) -> None:
    """The device is gone, on the kernel's word, and everything on it.

    Also when it only moved to another namespace (dev_shutdown, net/core/dev.c).
    """
    shape, old = device.shape, device.ifindex
    _let_go(device)
    if shape is not None:
        shape.enforcer.close()
    try:
        leftovers.forget(sock, state_dir, old, moved=moved)
    except OSError as e:  # leftovers.put_back tries again, and the next device of the name needs its turn
        log.warning("the note of a device that is gone stays", device=device.name, index=old, problem=str(e))


def _release(device: Device) -> None:
    """The device lives, but under another name, so it is not the one that is to be shaped."""
    shape, device.was = device.shape, device.ifindex
    _let_go(device)
    if shape is None:
        return
    try:
        problems = shape.enforcer.restore()
    except (OSError, DatapathError) as e:
        problems = [str(e)]  # its note is still there: leftovers.put_back tries again
    shape.enforcer.close()
    log.warning("renamed", device=device.name, index=device.was, restored=not problems, problems=problems)


def _let_go(device: Device) -> None:
    device.ifindex = 0
    device.given_up = ""
    device.put_in_force(None)
    device.detach_quietly()
