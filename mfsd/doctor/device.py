# SPDX-License-Identifier: Apache-2.0
"""One network device: can it be shaped, put back, measured; who else is on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from pyroute2 import IPRoute
from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool

from mfsd.datapath import tc
from mfsd.datapath.bpf.attach import hook_users
from mfsd.datapath.errors import EnforceError
from mfsd.datapath.facts import read_facts
from mfsd.datapath.handles import is_ours
from mfsd.datapath.undo import notes
from mfsd.datapath.undo.snapshot import capture, obstacles
from mfsd.doctor.finding import Finding, Severity
from mfsd.doctor.leftovers import answers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mfsd.daemon.config import DeviceConfig
    from mfsd.datapath.bpf.attach import HookUser
    from mfsd.doctor.finding import Context, DeviceCheck

KNOWN: Final = {"cil_": "Cilium", "cali": "Calico"}
"""Prefixes of BPF program names -> who loads them."""
_ETHERNET: Final = (1, 772)
"""ARPHRD_ETHER, ARPHRD_LOOPBACK (include/uapi/linux/if_arp.h)."""
_SEGMENTATION: Final = ("tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-udp-segmentation", "tx-generic-segmentation")
"""Features by the kernel's names (net/ethtool/common.c)."""


def default_route_devices() -> list[str]:
    """Devices of the default routes in the calling thread's network namespace."""
    with IPRoute() as ip:
        found = {route.get_attr("RTA_OIF") for family in (2, 10) for route in ip.get_default_routes(family=family)}
        return sorted(str(ip.get_links(index)[0].get("ifname")) for index in found if index)


def configured(context: Context, name: str) -> DeviceConfig | None:
    """Section of the configuration."""
    return next((d for d in context.config.device if d.name == name), None)


def exists(_: Context, name: str) -> list[Finding]:
    """Whether there is such a device; without one the other checks make no sense."""
    try:
        device = read_facts(name)
    except EnforceError as e:
        return [
            Finding(
                f"device.exists:{name}",
                Severity.FAIL,
                f"There is no device {name}",
                str(e),
                "mfsd can't shape it; the daemon goes on with its other devices",
                "correct [[device]] name, or wait until the device is there",
            )
        ]
    kind = f" ({device.kind})" if device.kind else ""
    if device.up:
        return [
            Finding(f"device.exists:{name}", Severity.OK, f"{name} is there and up", f"index {device.ifindex}{kind}")
        ]
    return [
        Finding(
            f"device.exists:{name}",
            Severity.WARN,
            f"{name} is down",
            f"index {device.ifindex}{kind}",
            "a device that is down has no qdisc to record, so mfsd does not enforce on it",
            f"ip link set {name} up",
        )
    ]


def link_type(_: Context, name: str) -> Iterator[Finding]:
    """The classifier reads Ethernet headers."""
    with IPRoute() as ip:
        link = ip.get_links(read_facts(name).ifindex)[0]
    if link["ifi_type"] not in _ETHERNET:
        yield Finding(
            f"device.link_type:{name}",
            Severity.FAIL,
            f"{name} has no Ethernet header",
            f"hardware type {link['ifi_type']}",
            "the classifier would misread its packets and is not attached",
            "name the Ethernet device below the tunnel; packets carry their socket there, too",
        )
    master = link.get("master")
    if master:
        yield Finding(
            f"device.master:{name}",
            Severity.INFO,
            f"{name} belongs to another device",
            f"master has index {master}",
            "behind a bond, shape the members, whose queues are real; behind a bridge, forwarded packets have lost "
            "their socket and are matched by addresses and ports only",
        )


def queues(_: Context, name: str) -> Iterator[Finding]:
    """Strict order holds inside one qdisc only."""
    n = read_facts(name).tx_queues
    if n <= 1:
        yield Finding(f"device.queues:{name}", Severity.OK, f"{name} has one transmit queue", meaning="order is strict")
        return
    yield Finding(
        f"device.queues:{name}",
        Severity.INFO,
        f"{name} has {n} transmit queues",
        f"{n} transmit queues",
        "while mfsd enforces, one qdisc at the root serves them all: that makes the order strict, and one lock "
        "handles all packets. With one tree per queue (mq) deferred packets of one queue would overtake urgent ones of "
        "another. The device serves its queues in turns, so packets that have left the qdisc may still "
        "pass each other",
        "with a rate just below the link's (backend htb) nothing waits in the device's queues",
    )


def speed(context: Context, name: str) -> Iterator[Finding]:
    """A rate above the link's moves the queue out of mfsd's reach."""
    device, config = read_facts(name), configured(context, name)
    rate = config.rate if config is not None else None
    nominal = " (nominal)" if device.speed is not None and device.virtual else ""
    known = f"link speed {device.speed or 'unknown'}{nominal}, configured rate {rate or 'none'}"
    if rate is not None and device.speed is not None and not device.virtual and rate > device.speed:
        yield Finding(
            f"device.speed:{name}",
            Severity.WARN,
            f"The configured rate of {name} is above its link speed",
            known,
            "packets queue in the device, where there are no bands",
            f'set the rate just below the link speed, e.g. rate = "{type(rate)(device.speed.bytes_per_s * 0.98)}"',
        )
    elif rate is None and (device.speed is None or device.virtual):
        yield Finding(
            f"device.speed:{name}",
            Severity.WARN if config is not None else Severity.INFO,
            f"Nobody knows how fast {name} is",
            known,
            "backend htb needs a rate, and deadlines can be judged only after the link has been busy for a while",
            f'set device.rate of {name} to what the path gives, e.g. rate = "10gbit"',
        )
    else:
        yield Finding(f"device.speed:{name}", Severity.OK, f"The rate of {name} is known", known)


def qdisc(context: Context, name: str) -> Iterator[Finding]:
    """Whether what is at the root can come back exactly."""
    device = read_facts(name)
    with tc.TcSocket() as sock:
        qdiscs, classes = sock.tree(device.ifindex)
        root = tc.root_of(qdiscs)
        if root is not None and is_ours(root):
            yield from _own_root(context, name)
            return
        problems = obstacles(sock, device.ifindex, qdiscs, classes)
        lines = "; ".join(capture(qdiscs, classes, device.txqlen).lines()) if root is not None else "no root"
    if problems and device.up:
        yield Finding(
            f"device.qdisc:{name}",
            Severity.FAIL,
            f"What is at the root of {name} could not be put back exactly",
            f"{lines}: {'; '.join(problems)}",
            "mfsd refuses to enforce there, and only observes",
            f"remove it if it is not needed: tc qdisc del dev {name} root",
        )
    else:
        yield Finding(f"device.qdisc:{name}", Severity.OK, f"The qdiscs of {name} can be recorded and put back", lines)


def _own_root(context: Context, name: str) -> Iterator[Finding]:
    folder = context.config.daemon.state_dir
    if notes.path_of(folder, name).exists():
        yield Finding(f"device.qdisc:{name}", Severity.OK, f"{name} carries mfsd's own bands", "see state.notes")
    else:
        yield Finding(
            f"device.qdisc:{name}",
            Severity.FAIL,
            f"{name} carries mfsd's bands, but nobody knows what was there before",
            f"no {notes.path_of(folder, name)}",
            "mfsd will not take them over, because it could not put the device back",
            f"if state_dir is right, remove them: tc qdisc del dev {name} root; the kernel's default returns",
        )


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
    tool = IoctlEthtool(name)
    try:
        features: Any = tool.get_features()
        return {str(k): bool(features.is_active(k)) for k in features.keys()}  # noqa: SIM118 - iterating gives tuples
    except (EthtoolError, OSError, KeyError):
        return {}
    finally:
        tool.close()


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


def hooks(_: Context, name: str) -> Iterator[Finding]:
    """Others that see the packets before or after."""
    device = read_facts(name)
    try:
        users = [u for u in hook_users(device.ifindex) if not u.ours]
    except OSError as e:
        yield Finding(
            f"device.hooks:{name}",
            Severity.INFO,
            f"Can't see the programs on {name}",
            str(e),
            "whether Cilium or others are there is unknown",
            "run mfsctl doctor as root",
        )
        return
    if not users:
        yield Finding(f"device.hooks:{name}", Severity.OK, f"Nobody else's programs hang on the egress of {name}")
        return
    owners = sorted({owner for u in users if (owner := _owner(u))})
    seen = ", ".join(_describe(u) for u in users)
    with tc.TcSocket() as sock:
        kinds = {q.kind for q in sock.tree(device.ifindex)[0]}
    if "Cilium" in owners and "fq" in kinds:
        yield Finding(
            f"device.hooks:{name}",
            Severity.WARN,
            f"Cilium's bandwidth manager seems to work on {name}",
            f"{seen}; fq at the root",
            "it paces pods by departure times that only fq obeys: while mfsd has the root, pods' egress limits "
            "(kubernetes.io/egress-bandwidth) and BBR's pacing for pods don't hold",
            "switch it off (bandwidthManager.enabled=false), or leave mfsd in observe mode on this node",
        )
        return
    yield Finding(
        f"device.hooks:{name}",
        Severity.INFO,
        f"Other programs hang on the egress of {name}" + (f" ({', '.join(owners)})" if owners else ""),
        seen,
        "mfsd's classifier runs first and lets them run after it. A program that writes skb->priority after it undoes "
        "what mfsd has decided; one that redirects packets takes them past the qdiscs",
        "check `mfsctl status` (packets per band) under load",
    )


def leftover(context: Context, name: str) -> Iterator[Finding]:
    """A classifier on clsact outlives a daemon that was killed."""
    try:
        ours = [u for u in hook_users(read_facts(name).ifindex) if u.ours and u.hook == "clsact"]
    except OSError:
        return  # `hooks` says so
    state = notes.load(context.config.daemon.state_dir, name)
    if ours and (state is None or not state.owner.alive) and not answers(context.config.daemon.socket):
        yield Finding(
            f"device.leftover:{name}",
            Severity.INFO,
            f"A classifier that nobody feeds hangs on {name}",
            ", ".join(_describe(u) for u in ours),
            "without signs of life from a daemon it leaves all packets alone; the next start of mfsd replaces it",
            f"start mfsd, or mfsctl restore, or: tc filter del dev {name} egress prio 1",
        )


def _owner(user: HookUser) -> str:
    return next((who for prefix, who in KNOWN.items() if user.name.startswith(prefix)), "")


def _describe(user: HookUser) -> str:
    where = "tcx" if user.hook == "tcx" else f"clsact, priority {user.prio}"
    what = user.name or f"a {user.kind} filter"
    return f"{what} ({where}{f', program {user.prog_id}' if user.prog_id else ''})"


CHECKS: Final[tuple[DeviceCheck, ...]] = (link_type, queues, speed, qdisc, offloads, htb_offload, bql, hooks, leftover)
