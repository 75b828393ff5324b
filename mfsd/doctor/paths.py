# SPDX-License-Identifier: Apache-2.0
"""What it means which way bulk bytes take: TCP beside idle RDMA, one NIC of several, classes that lead nowhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mfsd.doctor.finding import Finding, Severity
from mfsd.doctor.transports import PROBE_S, measure, ports
from mfsd.ground import units

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.doctor.finding import Check, Context
    from mfsd.doctor.transports import Report

BULK: Final = 12.5e6
"""Bytes/s from which it is worth asking why: 100 Mbit/s."""
IDLE: Final = 0.01
"""An RDMA link, or a NIC, that moves less than this share of what the other way takes is idle."""
NAMED: Final = 5
"""Flows that a finding names."""


def judge(report: Report, bulk: float = BULK) -> Iterator[Finding]:
    """What lies between two looks, in findings."""
    yield from _fall_back(report, bulk)
    yield from _one_of_several(report, bulk)
    yield from _classes(report)


def _fall_back(report: Report, bulk: float) -> Iterator[Finding]:
    flows = [f for f in report.flows if f.bytes_per_s >= bulk and not f.local]
    active = [(p, sent + received) for p, sent, received in report.ports if p.active]
    if not active:
        return
    over_tcp = sum(f.bytes_per_s for f in flows)
    if not flows:
        yield Finding("paths.tcp", Severity.OK, "No bulk TCP beside the RDMA links", _links(report))
        return
    idle = [p.name for p, moved in active if moved < IDLE * over_tcp]
    verbs = {p.pid for p in report.processes if p.verbs}
    told = {p.pid: p.variables for p in report.processes}
    shown = []
    for f in flows[:NAMED]:
        words = ["has an RDMA device open"] if f.pid in verbs else []
        words += [f"{name}={value}" for name, value in sorted(told.get(f.pid, {}).items())]
        shown.append(
            f"{f.process} ({f.pid or 'unknown'}) to {f.peer}: {units.rate(f.bytes_per_s)}"
            + (f" ({', '.join(words)})" if words else "")
        )
    yield Finding(
        "paths.tcp",
        Severity.WARN if len(idle) == len(active) else Severity.INFO,
        "Bulk bytes go over TCP while RDMA is idle" if len(idle) == len(active) else "Bulk bytes go over TCP and RDMA",
        f"{'; '.join(shown)}{'; ...' if len(flows) > NAMED else ''}. {_links(report)}",
        "NCCL, UCX and Mooncake fall back to TCP without an error when no RDMA device suits them: it works, at a "
        "fraction of the speed. What goes over TCP is what mfsd can govern; what goes over RDMA goes past it",
        "if it should be RDMA: NCCL_DEBUG=INFO, UCX_LOG_LEVEL=info or Mooncake's log say which device was refused "
        "and why; is it in the container (/dev/infiniband), is memlock unlimited, does NCCL_IB_HCA or UCX_NET_DEVICES "
        "name it? If TCP is meant, nothing needs to be done",
    )


def _links(report: Report) -> str:
    return "RDMA: " + "; ".join(
        f"{p.name} {p.state.lower()}, {p.rate}, out {units.rate(sent, '0')}, in {units.rate(received, '0')}"
        for p, sent, received in report.ports
    )


def _one_of_several(report: Report, bulk: float) -> Iterator[Finding]:
    kinds = (
        ("rdma", "RDMA links", {p.name: out for p, out, _ in report.ports if p.active}),
        ("nic", "NICs", report.netdevs),
    )
    for key, words, rates in kinds:
        if len(rates) < 2 or max(rates.values()) < bulk:
            continue
        first = max(rates, key=lambda name: rates[name])
        rest = [name for name, rate in rates.items() if name != first and rate < IDLE * rates[first]]
        if len(rest) == len(rates) - 1:
            yield Finding(
                f"paths.one_{key}",
                Severity.WARN,
                f"One of {len(rates)} {words} carries everything",
                f"{first} {units.rate(rates[first])}; idle: {', '.join(rest)}",
                "the others could carry as much: the bottleneck is a choice of configuration",
                "NCCL_IB_HCA, NCCL_SOCKET_IFNAME, UCX_NET_DEVICES and Mooncake's device_name take several devices; "
                "each GPU's nearest NIC is best (nvidia-smi topo -m). Shape each with a [[device]] section of its own",
            )


def _classes(report: Report) -> Iterator[Finding]:
    if not report.classes:
        return
    said = [f"{c.who}: class {c.traffic_class}, DSCP {c.dscp}" for c in report.classes]
    lost = [c for c in report.classes if c.device and report.mapped[c.device] != "dcb tells nothing" and c.priority < 0]
    by_way: dict[str, set[int]] = {}
    for c in report.classes:
        by_way.setdefault("forced" if "(all its packets)" in c.who else c.who.partition(" ")[0], set()).add(c.dscp)
    differing = sorted(name for name, found in by_way.items() if len(found) > 1)
    forced = by_way.get("forced", set())
    overridden = sorted({c.who for c in report.classes if forced and c.dscp not in forced})
    problems = [f"{c.who}: DSCP {c.dscp} is mapped to no priority on {c.device}" for c in lost]
    problems += [f"processes disagree about {name}" for name in differing if name != "forced"]
    problems += [f"{who} has no effect: the link gives all its packets another class" for who in overridden]
    yield Finding(
        "paths.roce_classes",
        Severity.WARN if problems else Severity.OK,
        "Traffic classes of RoCE lead nowhere, or apart" if problems else "Traffic classes of RoCE are consistent",
        "; ".join(dict.fromkeys([*problems, *said, *(f"{name}: {words}" for name, words in report.mapped.items())])),
        "switches and NICs sort RoCE by DSCP (the traffic class divided by four). A class that is not mapped is served "
        "as everything else is, without PFC or ECN thresholds of its own, and mfsd's DSCP marks (bands.dscp) should "
        "not fall into a lossless class",
        "map the DSCP on NIC (dcb app add dev NIC dscp-prio DSCP:PRIO) and switches, or give all processes the same "
        "NCCL_IB_TC and MC_IB_TC",
    )


def check(context: Context) -> Iterator[Finding]:
    """Where there are RDMA links, look for a second who moves what."""
    if not any(port.active for port in ports(context)):
        yield Finding("paths.tcp", Severity.OK, "There is no RDMA link that bulk TCP could have taken")
        return
    yield from judge(measure(context, PROBE_S))


CHECKS: Final[tuple[Check, ...]] = (check,)
