# SPDX-License-Identifier: Apache-2.0
"""The classifier at the head of a device's egress hook: hung there, put back when somebody takes it off or goes before.

Who runs first is read from the hook, not guessed from counters: those stand still only when somebody takes everything,
and only while there is traffic. Before somebody who comes first the classifier is put once; whoever goes before it
again insists, and is named in a notice instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import structlog

from mfsd.datapath.bpf.attach import attach, inherit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mfsd.daemon.device import Device
    from mfsd.datapath.bpf.attach import HookUser, Standing

log = structlog.get_logger(__name__)


def keep(device: Device, method: Literal["auto", "tcx", "clsact"], link: int = -1) -> list[str]:
    """See to it that the classifier hangs where it should; returns what an operator should know.

    ``method`` is as configured. ``link``: the TCX link of the daemon before, where there is one and no attachment yet;
    it is not the caller's any more. Raises AttachError.
    """
    standing = None if device.attachment is None else device.attachment.standing()
    if standing is not None and not standing.attached:
        log.warning("somebody has taken the classifier off", device=device.name, hook=device.hook)
    if standing is None or not standing.attached:
        standing = _attach(device, method, link)
    if not standing.ahead:
        return []
    new = {user.prog_id for user in standing.ahead if user.hook == device.hook} - device.passed
    if not new:
        return [_before(standing.ahead)]
    device.passed |= new
    who = _names(standing.ahead)
    log.warning("somebody runs before the classifier, which goes to the head again", device=device.name, who=who)
    standing = _attach(device, method)
    if standing.ahead:
        return [_before(standing.ahead)]
    return [f"{who} had been put before mfsd's classifier, which has gone to the head again"]


def _attach(device: Device, method: Literal["auto", "tcx", "clsact"], link: int = -1) -> Standing:
    device.detach_quietly()
    device.write_map()
    inherited = inherit(device.classifier, device.ifindex, link) if link >= 0 else None
    device.attachment = inherited or attach(device.classifier, device.ifindex, method)
    log.info("attached", device=device.name, hook=device.attachment.method, inherited=inherited is not None)
    return device.attachment.standing()


def _names(users: Sequence[HookUser]) -> str:
    return ", ".join(map(str, users))


def _before(users: Sequence[HookUser]) -> str:
    return f"{_names(users)} runs before mfsd's classifier: what it takes, or lets through for good, is not steered"
