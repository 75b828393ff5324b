# SPDX-License-Identifier: Apache-2.0
"""What a network device does by itself: segmentation, traffic control, its own queue."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool

from mfsd.datapath.facts import read_facts
from mfsd.doctor.finding import Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.doctor.finding import Context, DeviceCheck

_SEGMENTATION: Final = ("tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-udp-segmentation", "tx-generic-segmentation")
"""Features by the kernel's names (net/ethtool/common.c)."""


def offloads(_: Context, name: str) -> Iterator[Finding]:
    """What a packet is, when mfsd counts it."""
    features = _features(name)
    if not features:
        yield Finding(f"device.offloads:{name}", Severity.INFO, f"{name} doesn't tell its offloads", "ethtool -k fails")
        return
    on = [k for k in _SEGMENTATION if features.get(k)]
    gso = read_facts(name).gso
    yield Finding(
        f"device.offloads:{name}",
        Severity.OK,
        f"{name} takes large packets" if on else f"{name} takes single segments",
        f"{', '.join(on) or 'no segmentation offload'}; GSO packets up to {gso} bytes",
        "a large packet counts as the wire bytes of all its segments, headers included, so byte counts are right; it "
        "is also the least that a band can send at a time, and the least that a rescue frees",
    )


def htb_offload(_: Context, name: str) -> Iterator[Finding]:
    """Hardware htb has another order."""
    features = _features(name)
    if features.get("hw-tc-offload"):
        yield Finding(
            f"device.hw_tc:{name}",
            Severity.INFO,
            f"{name} can take over traffic control (hw-tc-offload is on)",
            "hw-tc-offload: on",
            "mfsd installs its htb without the offload flag: in hardware its bands would have no strict order, and "
            "could not be purged",
        )


def _features(name: str) -> dict[str, bool]:
    with contextlib.closing(IoctlEthtool(name)) as tool, contextlib.suppress(EthtoolError, OSError, KeyError):
        features: Any = tool.get_features()
        return {str(k): bool(features.is_active(k)) for k in features.keys()}  # noqa: SIM118 - iterating gives tuples
    return {}


def bql(context: Context, name: str) -> Iterator[Finding]:
    """Without byte queue limits the driver's ring is a queue beyond any band."""
    device = read_facts(name)
    base = context.root / "sys/class/net" / name
    # A sysfs that was mounted in another namespace shows other devices.
    if context.read(f"sys/class/net/{name}/ifindex") != str(device.ifindex) or device.virtual or name == "lo":
        return
    limits = list(base.glob("queues/tx-*/byte_queue_limits/limit_max"))
    if limits:
        yield Finding(f"device.bql:{name}", Severity.OK, f"The driver of {name} keeps its ring short (BQL)")
        return
    yield Finding(
        f"device.bql:{name}",
        Severity.WARN,
        f"The driver of {name} has no byte queue limits",
        "no byte_queue_limits below /sys/class/net",
        "what has left the qdisc waits in the device's ring, where there are no bands: with backend prio an urgent "
        "packet waits for a full ring",
        "set a rate just below the link speed (backend htb), or make the ring small: ethtool -G",
    )


CHECKS: Final[tuple[DeviceCheck, ...]] = (offloads, htb_offload, bql)
