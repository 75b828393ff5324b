# SPDX-License-Identifier: Apache-2.0
"""What enforcement would do to one device, in words and in tc's language, before it does it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from mfsd.datapath.facts import QUEUE_LENGTH, default_qdisc, kernel_has
from mfsd.datapath.qdisc import htb, prio
from mfsd.datapath.qdisc.tree import How
from mfsd.datapath.undo.snapshot import MQ
from mfsd.ground.bands import MAX_HTB_LEVELS
from mfsd.ground.units import Rate

if TYPE_CHECKING:
    from mfsd.datapath.facts import DeviceFacts
    from mfsd.datapath.qdisc.tree import Difference, Tree
    from mfsd.datapath.tc import TcSocket
    from mfsd.datapath.undo.snapshot import Snapshot
    from mfsd.ground.bands import Bands

BACKENDS: Final = ("auto", "htb", "prio")
_SHARE: Final = 0.98
"""Of a reported speed that htb is given: what is paced is without preamble, gap and checksum, 24 bytes per frame or
1.6 % at an MTU of 1500; a queue in the device instead of in htb would be beyond any priority."""


@dataclass(frozen=True, slots=True)
class Step:
    """One change. ``command`` is the equivalent for a shell."""

    text: str
    command: str


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A dry run. ``found`` and the commands are in tc's notation; with ``refusals``, nothing would be done."""

    ifname: str
    backend: str
    major: int
    rate: Rate | None
    found: tuple[str, ...]
    steps: tuple[Step, ...]
    undo: tuple[Step, ...]
    reasons: tuple[str, ...]
    refusals: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """It could be applied."""
        return not self.refusals


@dataclass(slots=True)
class Choice:
    """The backend chosen for a device. ``tree`` is None exactly when there are refusals."""

    backend: str
    rate: Rate | None
    tree: Tree | None = None
    reasons: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)


def choose(sock: TcSocket, device: DeviceFacts, bands: Bands, backend: str, rate: Rate | None) -> Choice:
    """Settle on a backend and build its tree. Raises ValueError for a backend that does not exist."""
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of {', '.join(BACKENDS)}")
    choice = Choice(backend, rate)
    if backend == "auto":
        _auto(sock, bands, choice)
    if choice.refusals:
        return choice
    try:
        if choice.backend == "htb":
            _htb(sock, device, bands, choice)
        else:
            _prio(sock, device, bands, choice)
    except ValueError as e:
        choice.refusals.append(str(e))
    if choice.tree is not None and device.tx_queues > 1:
        choice.reasons.append(
            f"{device.ifname} has {device.tx_queues} transmit queues; one {choice.backend} at the root serves them all "
            "under one lock. That is what makes the order strict: one tree per queue (mq) would be strict only within "
            "each queue, since the device serves its queues in turns"
        )
    return choice


def _auto(sock: TcSocket, bands: Bands, choice: Choice) -> None:
    many = not htb.fits(bands)
    if choice.rate is not None and not many and kernel_has(sock, "htb"):
        choice.backend = "htb"
        choice.reasons.append(f"auto: htb, because a rate is given ({choice.rate}): strict bands with floors and lanes")
    elif kernel_has(sock, "ets") or kernel_has(sock, "prio"):
        choice.backend = "prio"
        why = (
            "no rate is given: bands at line rate"
            if choice.rate is None
            else f"{len(bands.level_bands)} levels are more than htb's {MAX_HTB_LEVELS}"
            if many
            else "the kernel has no htb"
        )
        choice.reasons.append(f"auto: prio, because {why}")
    elif kernel_has(sock, "htb"):
        choice.backend = "htb"
        choice.reasons.append("auto: htb, because the kernel has neither ets nor prio")
    else:
        choice.refusals.append(
            "the kernel has none of htb, ets and prio (CONFIG_NET_SCH_HTB, CONFIG_NET_SCH_ETS, CONFIG_NET_SCH_PRIO)"
        )


def _htb(sock: TcSocket, device: DeviceFacts, bands: Bands, choice: Choice) -> None:
    if not kernel_has(sock, "htb"):
        choice.refusals.append("backend = htb: the kernel has no htb (CONFIG_NET_SCH_HTB)")
        return
    if choice.rate is None:
        if device.speed is None:
            choice.refusals.append(
                f"rate: {device.ifname} reports no link speed and htb must know one: "
                f'set device.rate of {device.ifname}, e.g. rate = "10gbit"'
            )
            return
        choice.rate = Rate(float(int(device.speed.bytes_per_s * _SHARE)))
        choice.reasons.append(
            f"rate {choice.rate}: {_SHARE:.0%} of the reported link speed {device.speed}, so that the queue stays in "
            "htb and not in the device"
        )
        if device.virtual:
            choice.reasons.append(
                f"{device.ifname} is virtual ({device.kind}): its reported speed is nominal. Set device.rate to what "
                "the path really gives"
            )
    choice.tree = htb.build(bands, choice.rate, gso=device.gso)


def _prio(sock: TcSocket, device: DeviceFacts, bands: Bands, choice: Choice) -> None:
    weights = kernel_has(sock, "ets")
    wanted = any(b.lanes > 1 for b in bands.bands)
    lanes = wanted and kernel_has(sock, "drr")
    shaper = "htb" if lanes and not weights else "tbf"  # prio.py says why
    needs = ([] if weights else ["prio"]) + ([shaper] if choice.rate is not None else [])
    missing = [kind for kind in needs if not kernel_has(sock, kind)]
    if missing:
        names = ", ".join(f"CONFIG_NET_SCH_{kind.upper()}" for kind in missing)
        choice.refusals.append(f"backend = prio: the kernel has no {' and no '.join(missing)} ({names})")
        return
    if wanted and not lanes:
        choice.reasons.append(
            "one queue per band instead of lanes, because the kernel has no drr (CONFIG_NET_SCH_DRR): a rescue also "
            "frees packets of other connections of the band"
        )
    if weights:
        choice.reasons.append("bands by weight (ets): nearly strict, but each has its floor, at any rate")
    else:
        choice.reasons.append(
            "the kernel has no ets (CONFIG_NET_SCH_ETS), and prio no floors: what stands below a busy band waits for "
            "as long as that is busy, and nothing can be guaranteed to it"
        )
    limit = device.txqlen or QUEUE_LENGTH
    choice.tree = prio.build(bands, choice.rate, lanes=lanes, weights=weights, gso=device.gso, limit=limit)


def steps_of(device: DeviceFacts, tree: Tree, off: list[Difference] | None) -> list[Step]:
    """What makes the tree; ``off``: how a tree of ours on the device differs, None if there is none."""
    name = shlex.quote(device.ifname)  # which may have all but blanks, slashes and colons
    every = [Step(g.text, g.command.replace("DEV", name)) for g in tree.groups]
    if off is None:
        if not device.txqlen:
            text = f"Let queues have {QUEUE_LENGTH} packets: with a queue length of 0 they would take none"
            every.insert(0, Step(text, f"ip link set dev {name} txqueuelen {QUEUE_LENGTH}"))
        return every
    if not off:
        return []
    if any(d.how is How.REBUILD for d in off):
        return [Step(f"Remove an older tree of mfsd ({off[0].text})", f"tc qdisc del dev {name} root"), *every]
    changed = {d.node for d in off if d.node is not None}
    gone = [Step(f"Remove: {d.text}", d.command.replace("DEV", name)) for d in off if d.how is How.REMOVE]
    return gone + [
        Step(f"Repair: {step.text}", step.command.replace(" add ", " replace "))
        for g, step in zip(tree.groups, every, strict=True)
        if any(node in changed for node in g.nodes)
    ]


def undo_of(device: DeviceFacts, before: Snapshot) -> list[Step]:
    """What puts back what was there before."""
    if before.by_kernel:
        name = shlex.quote(device.ifname)
        now, kinds = default_qdisc(), before.defaults - {"noqueue"}
        root = f"tc qdisc del dev {name} root"
        if now is None or kinds <= {now}:
            return [Step(f"Delete the root; the kernel's default ({before.root.kind}) returns", root)]
        (kind,) = kinds
        text = f"net.core.default_qdisc is {now} by now, so {kind} is put back by name"
        root = f"tc qdisc replace dev {name} root {before.root.kind}"
        queues = Step(f"Put {kind} on each of its queues", f"# tc qdisc replace dev {name} parent ... {kind}")
        return [Step(text, root), queues] if before.root.kind == MQ else [Step(text, root)]
    return [Step(f"Put back {item.text}", "# replayed from the recorded netlink message") for item in before.ordered()]
