# SPDX-License-Identifier: Apache-2.0
"""One network device: can it be shaped, put back, measured; who else is on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyroute2 import IPRoute

from mfsd.datapath import tc
from mfsd.datapath.bpf.attach import ETHERNET, hook_users
from mfsd.datapath.bpf.clsact import alive
from mfsd.datapath.errors import EnforceError, NoDeviceError
from mfsd.datapath.facts import QUEUE_LENGTH, read_facts
from mfsd.datapath.handles import is_ours
from mfsd.datapath.qdisc.plan import undo_of
from mfsd.datapath.undo import notes
from mfsd.datapath.undo.notes import Namespace
from mfsd.datapath.undo.snapshot import capture, obstacles
from mfsd.doctor import hardware
from mfsd.doctor.finding import Finding, Severity
from mfsd.doctor.leftovers import answers
from mfsd.host.bridges import netfilter_sees

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mfsd.daemon.config import DeviceConfig
    from mfsd.datapath.bpf.attach import HookUser
    from mfsd.datapath.facts import DeviceFacts
    from mfsd.doctor.finding import Context, DeviceCheck

KNOWN: Final = {"cil_": "Cilium", "cali": "Calico"}
"""Prefixes of BPF program names -> who loads them."""


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
        if not isinstance(e, NoDeviceError):
            return [Finding(f"device.exists:{name}", Severity.FAIL, f"Can't look at device {name}", str(e),
                            "whether it can be shaped is unknown")]  # fmt: skip
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
    if device.up and not device.carrier:
        return [
            Finding(
                f"device.exists:{name}",
                Severity.WARN,
                f"{name} has no carrier",
                f"index {device.ifindex}{kind}",
                "nothing leaves by it",
                "look at the cable, or at whatever is at its other end",
            )
        ]
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
    if link["ifi_type"] not in ETHERNET:
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
            "behind a bond, shape the members, whose queues are real; behind a bridge, packets of pods keep their "
            "socket unless netfilter sees them (device.bridged)",
        )


def bridged(context: Context, name: str) -> Iterator[Finding]:
    """Netfilter takes the socket of bridged packets away."""
    bridge = netfilter_sees(name, context.root)
    if bridge:
        yield Finding(
            f"device.bridged:{name}",
            Severity.WARN,
            f"Netfilter sees the packets that {bridge} brings to {name}",
            f"{name} is a port of {bridge}; net.bridge.bridge-nf-call-iptables or -ip6tables is 1, or {bridge}'s own",
            "packets of pods reach the device without their socket: hints by socket do nothing for them, and nobody "
            "is told; the host's own connections are not concerned",
            "hint pods by addresses, as root or a trusted user; or, if no firewall rule needs to see bridged packets, "
            "sysctl -w net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0",
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
            yield from _own_root(context, sock, device)
            return
        problems = obstacles(sock, device.ifindex, qdiscs, classes)
        found = capture(qdiscs, classes, device.txqlen)
        lines = "; ".join(found.lines()) if root is not None else "no root"
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
        undo = "; ".join(step.text for step in undo_of(device, found)) if found.qdiscs else ""
        title = f"The qdiscs of {name} can be recorded and put back"
        yield Finding(f"device.qdisc:{name}", Severity.OK, title, lines, undo)


def _own_root(context: Context, sock: tc.TcSocket, device: DeviceFacts) -> Iterator[Finding]:
    name, folder = device.ifname, context.config.daemon.state_dir
    try:
        note = notes.find(folder, device.ifindex, name, Namespace.of(sock))
    except EnforceError as e:
        note, lacks = None, str(e)
    else:
        lacks = f"no note about it in {folder}"
    if note is not None:
        yield Finding(f"device.qdisc:{name}", Severity.OK, f"{name} carries mfsd's own bands", "see state.notes")
    else:
        yield Finding(
            f"device.qdisc:{name}",
            Severity.FAIL,
            f"{name} carries mfsd's bands, but nobody knows what was there before",
            lacks,
            "mfsd will not take them over, because it could not put the device back",
            f"if state_dir is right, mfsctl restore {name} --delete (or tc qdisc del dev {name} root) removes them, "
            "and the kernel's default returns",
        )


def queue_length(_: Context, name: str) -> Iterator[Finding]:
    """Queues without a limit of their own have the device's."""
    device = read_facts(name)
    if device.txqlen == 0:
        yield Finding(
            f"device.queue_length:{name}",
            Severity.INFO,
            f"{name} has a queue length of 0",
            "txqueuelen 0",
            f"queues on it would take nothing: mfsd sets {QUEUE_LENGTH} while it enforces, and 0 again afterwards",
            f"ip link set {name} txqueuelen {QUEUE_LENGTH}, to have it for good",
        )


def hooks(_: Context, name: str) -> Iterator[Finding]:
    """Others that see the packets before or after."""
    index = read_facts(name).ifindex
    try:
        users = hook_users(index)
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
    with tc.TcSocket() as sock:
        kinds = {q.kind for q in sock.tree(index)[0]}
    yield _on_the_hook(name, users, kinds)


def _on_the_hook(name: str, users: Sequence[HookUser], kinds: set[str]) -> Finding:
    """What it means that these are there, in this order, beside qdiscs of these kinds."""
    check = f"device.hooks:{name}"
    if any(u.hook == "tcx" and not u.name for u in users):
        return Finding(
            check,
            Severity.INFO,
            f"Can't see whose programs hang on the egress of {name}",
            ", ".join(map(str, users)),
            "the kernel tells names to CAP_SYS_ADMIN only; one of them is mfsd's own where it runs",
            "run mfsctl doctor as root, outside of containers",
        )
    others = [u for u in users if not u.ours]
    if not others:
        return Finding(check, Severity.OK, f"Nobody else's programs hang on the egress of {name}")
    owners = sorted({owner for u in others if (owner := _owner(u))})
    seen = ", ".join(map(str, others))
    if "Cilium" in owners and "fq" in kinds:
        return Finding(
            check,
            Severity.WARN,
            f"Cilium's bandwidth manager seems to work on {name}",
            f"{seen}; fq at the root",
            "it paces pods by departure times that only fq obeys: while mfsd has the root, pods' egress limits "
            "(kubernetes.io/egress-bandwidth) and BBR's pacing for pods don't hold",
            "switch it off (bandwidthManager.enabled=false), or leave mfsd in observe mode on this node",
        )
    named = f" ({', '.join(owners)})" if owners else ""
    position = next((n for n, u in enumerate(users) if u.ours), None)
    if position:
        return Finding(
            check,
            Severity.WARN,
            f"Other programs run before mfsd's classifier on {name}{named}",
            ", ".join(map(str, users)),
            "what they take, or let through for good, never gets to the classifier and is not steered. A running mfsd "
            "goes to the head once; who is there now has come back, or can't be passed (tcx comes before clsact)",
            "have them run after it: detach and attach them anew, clsact filters with a priority above 1",
        )
    return Finding(
        check,
        Severity.INFO,
        f"Other programs hang on the egress of {name}{named}",
        seen,
        ("mfsd's classifier runs first" if position == 0 else "mfsd's classifier will run first, when it is there,")
        + " and lets them run after it. A program that writes skb->priority after it undoes what mfsd has decided; one "
        "that redirects packets takes them past the qdiscs",
        "check `mfsctl status` (packets per band) under load",
    )


def classifier(context: Context, name: str) -> Iterator[Finding]:
    """A daemon that runs has its classifier on all its devices, whatever its mode."""
    if configured(context, name) is None or not answers(context.config.daemon.socket):
        return
    try:
        users = hook_users(read_facts(name).ifindex)
    except OSError:
        return  # `hooks` says so
    if any(u.hook == "tcx" and not u.name for u in users):
        return  # names are not for us to see
    if not any(u.ours and not (u.filter and not alive(read_facts(name).ifindex, u.handle)) for u in users):
        yield Finding(
            f"device.classifier:{name}",
            Severity.FAIL,
            f"mfsd runs, but its classifier is not on {name}",
            ", ".join(map(str, users)) or "nothing hangs on the egress hook",
            "all its packets are default traffic. A running mfsd hangs it there again within seconds, unless it can't",
            "mfsctl status says why it can't",
        )


def leftover(_: Context, name: str) -> Iterator[Finding]:
    """A classifier on clsact outlives a daemon that was killed."""
    index = read_facts(name).ifindex
    try:
        ours = [u for u in hook_users(index) if u.filter and not alive(index, u.handle)]
    except OSError:
        return  # `hooks` says so
    if ours:
        yield Finding(
            f"device.leftover:{name}",
            Severity.INFO,
            f"A classifier that nobody feeds hangs on {name}",
            ", ".join(map(str, ours)),
            "without signs of life from a daemon it leaves all packets alone; the next start of mfsd replaces it",
            f"start mfsd, or mfsctl restore, or: tc filter del dev {name} egress prio 1",
        )


def _owner(user: HookUser) -> str:
    return next((who for prefix, who in KNOWN.items() if user.name.startswith(prefix)), "")


CHECKS: Final[tuple[DeviceCheck, ...]] = (
    link_type,
    bridged,
    queues,
    queue_length,
    speed,
    qdisc,
    *hardware.CHECKS,
    hooks,
    classifier,
    leftover,
)
