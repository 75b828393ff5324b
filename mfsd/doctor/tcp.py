# SPDX-License-Identifier: Apache-2.0
"""TCP settings that decide how fast a rescued connection recovers.

A rescue frees the packets that sit in a starved queue; TCP must send them again. New data behind them makes SACK find
the hole within a round trip. A message that was queued as a whole has nothing behind it: only the tail loss probe or
the retransmission timeout, which is never below rto_min, brings it back.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import TYPE_CHECKING, Final

from pyroute2 import IPRoute

from mfsd.doctor.finding import Finding, Severity
from mfsd.host.inet_diag import Diag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.doctor.finding import Check, Context

RTO_MIN_MS: Final = 200
"""TCP_RTO_MIN, include/net/tcp.h."""
_LOW_MS: Final = 20
_PACED: Final = ("bbr",)
_OURS: Final = "mfsd_yield"
_ROUTE_TABLE_MAIN: Final = 254


def recovery(context: Context) -> Iterator[Finding]:
    """SACK, RACK and the tail loss probe."""
    values = {
        name: context.read(f"proc/sys/net/ipv4/{name}") for name in ("tcp_sack", "tcp_recovery", "tcp_early_retrans")
    }
    seen = ", ".join(f"{name} = {value}" for name, value in values.items() if value is not None)
    off = [name for name, value in values.items() if value == "0"]
    if off:
        yield Finding(
            "tcp.recovery",
            Severity.WARN,
            f"TCP's loss recovery is crippled: {', '.join(off)} off",
            seen,
            "a rescued connection has packets to repair; without these it does so by timeouts, which takes longer than "
            "the rescue saves",
            "; ".join(f"sysctl -w net.ipv4.{name}={3 if name == 'tcp_early_retrans' else 1}" for name in off),
        )
    elif seen:
        yield Finding("tcp.recovery", Severity.OK, "TCP repairs losses quickly", seen, "rescued connections need it")


def route_rto_min() -> list[int]:
    """rto_min of routes of the main table that set one, milliseconds."""
    out = []
    with IPRoute() as ip:
        for route in ip.get_routes(table=_ROUTE_TABLE_MAIN):
            metrics = route.get_attr("RTA_METRICS")
            value = metrics.get_attr("RTAX_RTO_MIN") if metrics is not None else None
            if value is not None:
                out.append(int(value))
    return out


def rto_min(context: Context) -> Iterator[Finding]:
    """The longest wait of a rescued short message."""
    text = context.read("proc/sys/net/ipv4/tcp_rto_min_us")  # 6.11 and later
    default = int(text) / 1000 if text is not None else RTO_MIN_MS
    routes = route_rto_min()
    seen = f"{default:g} ms" + (f" (routes: {', '.join(f'{r} ms' for r in sorted(set(routes)))})" if routes else "")
    if min([default, *routes]) <= _LOW_MS:
        yield Finding("tcp.rto_min", Severity.OK, "Retransmission timeouts are short", f"rto_min {seen}")
        return
    fix = (
        "sysctl -w net.ipv4.tcp_rto_min_us=5000"
        if text is not None
        else "ip route change <prefix> <as it is> rto_min 5ms for the data centre's routes"
    )
    yield Finding(
        "tcp.rto_min",
        Severity.INFO,
        "A rescued short message may wait for a long retransmission timeout",
        f"rto_min {seen}",
        "a rescue frees what sits in the starved queue. Where more data follows, SACK repairs that in a round trip. A "
        "message that was queued as a whole (some 100 KB) has nothing behind it, and waits for a probe or this timeout",
        f"on every host of the data centre: {fix}. At the sender alone it makes recovery slower, because the receiver "
        "delays its acknowledgements; and never for connections over the Internet",
    )


def congestion_control(context: Context) -> Iterator[Finding]:
    """Pacing changes what sits in queues."""
    value = context.read("proc/sys/net/ipv4/tcp_congestion_control")
    if value is None:
        return
    if value.startswith(_PACED):
        yield Finding(
            "tcp.congestion_control",
            Severity.INFO,
            f"Connections use {value} by default",
            f"net.ipv4.tcp_congestion_control = {value}",
            "it models the bandwidth from what it was given lately: a connection that was deferred may start "
            "slowly after a promotion, where cubic goes on with its old window",
            "consider cubic or dctcp for the workers' sockets (sysctl, route congctl, or TCP_CONGESTION)",
        )
    else:
        yield Finding(
            "tcp.congestion_control",
            Severity.OK,
            f"Connections use {value} by default",
            f"net.ipv4.tcp_congestion_control = {value}",
        )


def choices(context: Context) -> Iterator[Finding]:
    """Congestion control that connections have chosen themselves, which network.yield leaves to them."""
    network = context.config.network
    default = context.read("proc/sys/net/ipv4/tcp_congestion_control")
    if network.mode == "off" or network.replace or default is None:
        return
    chosen = Counter(name for name in algorithms() if name != default and not name.startswith(_OURS))
    if not chosen:
        title = "All connections run the default congestion control, so that those that are deferred can yield"
        yield Finding("tcp.choices", Severity.OK, title, f"{default}, loopback left out")
        return
    yield Finding(
        "tcp.choices",
        Severity.INFO,
        "Some connections have chosen their congestion control, and keep it",
        f"{', '.join(f'{n} run {name}' for name, n in chosen.most_common())}; the default is {default}",
        "where they are deferred they don't yield in the network, and fill its queues as ever",
        "have the workers choose none (TCP_CONGESTION, a route's congctl), or set network.replace = true",
    )


def algorithms() -> Iterator[str]:
    """Congestion control of each established connection of this network namespace to another host."""
    with Diag() as diag:
        for peer, name in diag.algorithms():
            if not ipaddress.ip_address(peer).is_loopback:
                yield name


def mptcp(context: Context) -> Iterator[Finding]:
    """Multipath TCP in use: its sockets are not those that send."""
    lines = [line.split() for line in (context.read("proc/net/netstat") or "").splitlines()]
    rows = [words[1:] for words in lines if words[:1] == ["MPTcpExt:"]]
    if len(rows) != 2:
        return
    counts = dict(zip(rows[0], map(int, rows[1]), strict=False))
    now = counts.get("MPCurrEstab")  # Linux 6.8
    made = counts.get("MPCapableSYNACKRX", 0) + counts.get("MPCapableACKRX", 0)
    if not (made if now is None else now):
        return
    yield Finding(
        "tcp.mptcp",
        Severity.INFO,
        "There are Multipath TCP connections",
        f"{made} made since the start" if now is None else f"{now} established",
        "their bytes go out on sockets of the kernel's own, which a hint by the connection's socket can't name: such "
        "hints are refused, and what nobody names is default traffic",
        "hint them by addresses (tuple_of), or use plain TCP: net.mptcp.enabled = 0, or no mptcpize",
    )


CHECKS: Final[tuple[Check, ...]] = (recovery, rto_min, congestion_control, choices, mptcp)
