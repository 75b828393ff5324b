# SPDX-License-Identifier: Apache-2.0
"""What else is on the machine: RDMA links, containers behind bridges, the default qdisc."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyroute2 import IPRoute

from mfsd.doctor.finding import Finding, Severity
from mfsd.doctor.transports import netdevs_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.doctor.finding import Check, Context

SOFT_RDMA: Final = ("rxe", "siw")
"""Drivers in software, whose packets go through the netdev's qdiscs (drivers/infiniband/sw)."""


def rdma(context: Context) -> Iterator[Finding]:
    """RDMA goes past every qdisc."""
    folder = context.root / "sys/class/infiniband"
    links = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not links:
        yield Finding("host.rdma", Severity.OK, "There are no RDMA links", f"{folder} is empty or missing")
        return
    seen, shared = [], set()
    for link in links:
        netdevs = netdevs_of(context, link)
        soft = link.startswith(SOFT_RDMA)
        seen.append(f"{link} ({', '.join(netdevs) or 'no netdev'}{', in software' if soft else ''})")
        if not soft:
            shared |= set(netdevs) & set(context.devices)
    yield Finding(
        "host.rdma",
        Severity.WARN if shared else Severity.INFO,
        f"RDMA traffic of {', '.join(sorted(shared))} goes past mfsd" if shared else "RDMA traffic goes past mfsd",
        "; ".join(seen),
        "RoCE and InfiniBand (NCCL's IB transport, UCX rc, Mooncake's and NIXL's rdma) never meet a qdisc: mfsd "
        "neither sees nor shapes it, and what it sends on a shared port makes the measured rate smaller",
        "to have transfers governed, move them to TCP (NCCL_IB_DISABLE=1, UCX_TLS=tcp, Mooncake protocol tcp), or "
        "separate the traffic classes on NIC and switches (DSCP, PFC)",
    )


def containers(context: Context) -> Iterator[Finding]:
    """Traffic that is routed through the host has lost its socket."""
    del context
    with IPRoute() as ip:
        links = ip.get_links()
        bridges = [str(link.get("ifname")) for link in links if link.get(("linkinfo", "kind")) == "bridge"]
        veths = [str(link.get("ifname")) for link in links if link.get(("linkinfo", "kind")) == "veth"]
    if not bridges and not veths:
        yield Finding("host.containers", Severity.OK, "No containers behind bridges or veths", "no such devices")
        return
    yield Finding(
        "host.containers",
        Severity.INFO,
        "There may be containers with network namespaces of their own",
        f"bridges: {', '.join(bridges) or 'none'}; veth devices: {len(veths)}",
        "where their packets are routed, they reach the host's device without their socket, so cookies don't match "
        "them: hints for them must name addresses and ports as the device sends them, by root or a trusted user. "
        "Bridged ones keep it, unless netfilter sees them (device.bridged). Crossing a veth also resets skb->priority",
        "best: host networking for workers. Else hints by tuple, both ports exact",
    )


def default_qdisc(context: Context) -> Iterator[Finding]:
    """What comes back when a root is deleted."""
    value = context.read("proc/sys/net/core/default_qdisc")
    if value is None:
        return  # visible in the initial network namespace only
    yield Finding(
        "host.default_qdisc",
        Severity.OK,
        f"New devices and queues get {value}",
        f"net.core.default_qdisc = {value}",
        "what a device had from the kernel itself comes back as this kind when mfsd is taken away; leave it unchanged "
        "while mfsd enforces, or the device will not be as it was found",
    )


CHECKS: Final[tuple[Check, ...]] = (rdma, containers, default_qdisc)
