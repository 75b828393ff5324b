# SPDX-License-Identifier: Apache-2.0
"""The configured devices: classifiers loaded, attached, qdiscs installed and put back; one failing leaves the others.

A device is its interface index; the configuration names it. So in each round of care all names are looked up first, and
whatever has lost its name is put back as it was, before those that have the names now are set up.

Everything here that touches a device blocks for some milliseconds, so the daemon calls it in a worker thread, one call
at a time. What the event loop reads meanwhile (``Device.shape``) is one immutable value.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import structlog

from mfsd.daemon import hook, leftovers, locate
from mfsd.daemon.config_bands import dscp_of
from mfsd.daemon.device import Device, Shape
from mfsd.daemon.drain import drain
from mfsd.daemon.host_map import HostMap
from mfsd.daemon.keys import KernelKeys
from mfsd.daemon.network import Network
from mfsd.daemon.predecessor import HAND_OVER_S, HOST, Predecessor, link_name
from mfsd.daemon.reserve import Reserve
from mfsd.datapath import links, tc
from mfsd.datapath.bpf.bcc import BccLoader
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.teller import Teller
from mfsd.datapath.errors import DatapathError, LoaderError
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.engine.slots import MemoryKeys, SlotRows, memory_rows
from mfsd.ground.model import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mfsd.daemon.config import Config, DeviceConfig
    from mfsd.datapath.bpf.attach import Attachment
    from mfsd.datapath.bpf.loader import Classifier, Loader
    from mfsd.datapath.qdisc.plan import DevicePlan
    from mfsd.engine.slots import KeyMap
    from mfsd.ground.bands import Bands

log = structlog.get_logger(__name__)


class Devices:
    """All devices of one daemon, and the table and keys that their classifiers share."""

    def __init__(self, config: Config, bands: Bands, predecessor: Predecessor | None = None) -> None:
        """Load the classifiers. Without devices the table is plain memory. Raises LoaderError, OSError."""
        self.predecessor = predecessor or Predecessor({})
        self.config = config
        self.bands = bands
        self.all: list[Device] = []
        self.problems: list[str] = []
        """What is wrong with no configured device in particular: notes, devices that have lost their name."""
        self.teller: Teller | None = None
        self.teller_problem = ""
        """Why the kernel does not tell of connections, or perhaps not of their ends; empty where it does."""
        self.network = Network(config.network, bands)
        self.host = HostMap()
        self._open = contextlib.ExitStack()
        self._reserve: Reserve | None = None
        self.rows: SlotRows
        self.keys: KeyMap
        if not config.device:
            self.rows, self.keys = memory_rows(config.daemon.slots), MemoryKeys()
            return
        name, loader = _loader(config.daemon.loader)
        first: Classifier | None = None
        dscp = dscp_of(config)
        try:
            self._sock = self._open.enter_context(tc.TcSocket())
            self._departures = self._open.enter_context(links.Departures())
            for wanted in config.device:
                classifier = loader.open_classifier(config.daemon.slots, first)
                first = first or classifier
                self.all.append(Device(wanted, bands, classifier, name, dscp))
        except BaseException:
            self.close()
            raise
        self._reserve = self._open.enter_context(Reserve())
        shared = self.all[0].classifier
        self.rows, self.keys = shared.slots, KernelKeys(shared)
        self.host = HostMap(shared.host)
        self.host.set_timeout(config.daemon.heartbeat_timeout_ms)
        try:
            self._listen(shared)
            self.network = Network.start(config.network, bands, shared, self._rate)
        except BaseException:
            self.close()
            raise

    def _listen(self, classifier: Classifier) -> None:
        """Have the kernel tell of connections, if it can and shall. Raises LoaderError where it must."""
        wanted = self.config.daemon.sockets
        why = 'daemon.sockets = "listing"'
        if wanted != "listing":
            try:
                self.teller = Teller(classifier)
            except LoaderError as e:
                if wanted == "kernel":
                    raise
                why = str(e)
                log.warning("sockets", problem=why)
        if self.teller is None:
            said = "the kernel does not tell of connections, so inet_diag lists them again and again"
            self.teller_problem = f"{said}: {why}"

    # --- the maps of the devices (any thread) -------------------------------------------------------------------------

    def set_dscp(self, dscp: Mapping[str, int]) -> None:
        """Write other code points from the next packet on."""
        for device in self.all:
            device.dscp = dscp
            device.write_map()

    def set_configs(self, configs: Sequence[DeviceConfig]) -> None:
        """Take other classifier flags; names, backends and rates must be as before."""
        for device, config in zip(self.all, configs, strict=True):
            device.config = config
            device.write_map()

    # --- devices (a worker thread) ------------------------------------------------------------------------------------

    def care(self, mode: Mode) -> None:
        """Bring every device to the state it should be in. Called at the start, on a change of mode, and regularly.

        A device that is missing is looked for again, one that came back is set up again, one that is called otherwise
        now is put back as it was, and qdiscs that somebody else replaced are given up, with a notice: whoever did it
        wants them. Nothing is touched while classifiers of the daemon before are at work.
        """
        if not self.predecessor.at_work:
            self.succeed(mode)

    def succeed(self, mode: Mode) -> None:
        """The same, and take over from the daemon before, if it is at work still."""
        try:
            if self.all:
                self._care_for_all(mode)
        finally:
            # Else the next algorithm takes over connections that yield, one by one, and none of them has to stop.
            self.predecessor.retire(lapse=not self.network.algorithm)

    @property
    def _rate(self) -> float:
        """Of the fastest device, bytes/s; 0: unknown."""
        return max(d.estimator.configured for d in self.all)

    def descriptors(self) -> dict[str, int | Attachment]:
        """By name, what has to outlive this process for another to take over."""
        if not self.all:
            return {}
        found = ((d.ifindex, d.attachment) for d in self.all)
        hung = {link_name(i): a for i, a in found if a is not None and a.link_fd >= 0}
        return {HOST: self.all[0].classifier.map_fds[HOST], **hung}

    def _care_for_all(self, mode: Mode) -> None:
        with self._spare():
            state_dir, gone = self.config.daemon.state_dir, self._departures.since()
            look = partial(locate.locate, self._sock, state_dir, gone)
            found = [device for device in self.all if self._guarded(device, look)]
            ours = {d.ifindex for d in self.all}
            leftovers.cut(self.predecessor.others(ours))
            self.problems = leftovers.put_back(self._sock, state_dir, ours, [d.name for d in self.all])
            for device in found:
                self._guarded(device, lambda d: self._care(d, mode, sure=gone is not None))
                device.asked = False
            self.network.care(self._rate)
            if self.teller is not None:
                if amiss := self.teller.keep():
                    log.warning(amiss)
                self.teller_problem = self.teller.problem

    @staticmethod
    def _guarded(device: Device, work: Callable[[Device], None]) -> bool:
        """False, with a notice, when it failed."""
        try:
            work(device)
        except (OSError, DatapathError) as e:
            device.note(str(e))
            return False
        return True

    def _care(self, device: Device, mode: Mode, *, sure: bool) -> None:
        if not device.ifindex:
            device.note(leftovers.absent(self._sock, device))
            return
        shape = device.shape
        fit = mode is Mode.ENFORCE and not device.given_up and not device.put_back
        if shape is None and fit and self.predecessor.at_work:
            # The qdiscs first: until the classifiers change places, packets follow the old one into them.
            device.note("; ".join(_tried(lambda: self._enforce(device)) + self._hook(device)))
            return
        notices = self._hook(device)
        if shape is not None:
            notices += self._verify(device, shape.enforcer, sure=sure)
        elif mode is Mode.ENFORCE and device.given_up:
            notices.append(device.given_up)
        elif fit and device.attachment is not None:
            notices += self._enforce(device)
        else:
            notices += leftovers.notices(self._sock, self.config.daemon.state_dir, device.ifindex, device.name)
        device.note("; ".join(notices + self._late(device)))

    def _hook(self, device: Device) -> list[str]:
        method = self.config.daemon.attach
        # One that is to change to the other hook is let go, when this one hangs there.
        link = self.predecessor.link(device.ifindex) if device.attachment is None and method != "clsact" else -1
        # Also if that fails, what is on the device must be looked after.
        return _tried(lambda: hook.keep(device, method, link))

    def _late(self, device: Device) -> list[str]:
        """Whether the classifier has taken a daemon that lives for dead."""
        if not self.host.obeyed:
            return []
        before, device.stale = device.stale, device.stats()["stale"]
        if device.stale <= before:
            return []
        missed = f"{device.stale - before} packets were left alone, because the classifier saw no sign of life in time"
        return [f"{missed} (daemon.heartbeat_timeout_ms)"]

    def _enforce(self, device: Device) -> list[str]:
        enforcer = self._enforcer(device)
        try:
            plan = enforcer.plan()
            if plan.refusals:
                enforcer.close()
                return [f"observed only: {'; '.join(plan.refusals)}"]
            enforcer.apply()
        except BaseException:
            enforcer.close()
            raise
        device.put_in_force(Shape.of(enforcer, plan))
        log.info(
            "enforcing",
            device=device.name,
            backend=plan.backend,
            rate=str(plan.rate or "line rate"),
            adopted=enforcer.adopted,
        )
        return []

    def _verify(self, device: Device, enforcer: DeviceEnforcer, *, sure: bool) -> list[str]:
        """``sure``: the device has not been away."""
        problems = enforcer.verify()
        if not problems:
            return enforcer.remarks()
        if enforcer.in_place():
            log.warning("repairing the qdiscs", device=device.name, problems=problems)
            try:
                plan = enforcer.apply()
            except (OSError, DatapathError):
                device.put_in_force(None)
                enforcer.close()
                raise
            device.put_in_force(Shape.of(enforcer, plan))
            return enforcer.remarks()
        # The classifier first, here and below, so that no packet is sent to classes that are about to go.
        device.put_in_force(None)
        device.lost = enforcer.restore()
        for problem in device.lost:
            log.warning("after the root was replaced", device=device.name, problem=problem)
        enforcer.close()
        if device.asked or not sure:  # not sure: too much has happened to tell
            return self._enforce(device)
        # Whoever replaced the root wants something else there, and would do it again.
        device.given_up = "observed only: somebody replaced the root qdisc; set the mode to enforce again to retry"
        return [device.given_up]

    def retry(self) -> None:
        """Forget that enforcement was given up, also where the next look at a device would find a reason to."""
        for device in self.all:
            device.given_up, device.put_back, device.lost, device.asked = "", False, [], True

    def plans(self, names: Sequence[str]) -> list[tuple[Device, DevicePlan | DatapathError]]:
        """What enforcing would do, or has done."""
        out: list[tuple[Device, DevicePlan | DatapathError]] = []
        for device in self._named(names):
            shape = device.shape
            if shape is not None:
                out.append((device, shape.plan))
                continue
            try:
                with self._enforcer(device) as enforcer:
                    out.append((device, enforcer.plan()))
            except DatapathError as e:
                out.append((device, e))
            except OSError as e:
                out.append((device, DatapathError(f"device {device.name}", str(e))))
        return out

    def restore(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Put qdiscs back; names of the restored devices, and problems. They stay as they are until ``retry``.

        Also those that an earlier daemon has left, and this one has not taken over.
        """
        restored: list[str] = []
        problems: list[str] = []
        with self._spare():
            for device in self._named(names):
                wrong = self._restore(device)
                if wrong is None:
                    continue
                problems += wrong
                if not wrong:
                    restored.append(device.name)
                log.info("restored", device=device.name, problems=wrong)
        return restored, problems

    def _restore(self, device: Device) -> list[str] | None:
        """Problems; None when there is nothing to put back."""
        shape, device.put_back = device.shape, True
        device.put_in_force(None)
        try:
            if shape is not None:
                drain(shape.enforcer)
                return shape.enforcer.restore()
            if device.given_up and device.lost:
                return device.lost
            return leftovers.undo(self._sock, self.config.daemon.state_dir, device.ifindex, device.name)
        except (OSError, DatapathError) as e:
            return [f"{device.name}: {e}"]
        finally:
            if shape is not None:
                shape.enforcer.close()

    def _spare(self) -> contextlib.AbstractContextManager[None]:
        """Have descriptors for the work, whoever holds the others."""
        return self._reserve.given_up() if self._reserve is not None else contextlib.nullcontext()

    def drain(self) -> None:
        """Packets go nowhere but to the default band from now on: let out what is queued in the others, if it goes."""
        for device in self.all:
            shape = device.shape
            if shape is not None:
                drain(shape.enforcer)

    def _named(self, names: Sequence[str]) -> list[Device]:
        return [d for d in self.all if d.name in names]

    def leave(self) -> None:
        """End with everything at work, for the next daemon to take over; ``close`` detaches nothing from then on.

        From the last sign of life of this process to the first one of the next, on a busy machine, longer may pass than
        the classifiers wait for otherwise. So they are told to wait.
        """
        self.host.set_timeout(HAND_OVER_S * 1000)
        self.host.beat()
        self.host, devices, self.all = HostMap(), self.all, []
        for device in devices:
            device.close()

    def close(self) -> None:
        """Detach and unload the classifiers; qdiscs stay as they are. Idempotent."""
        self.predecessor.retire()
        self.host.fall_silent()
        self.host = HostMap()
        self.network.close()
        if self.teller is not None:
            self.teller.close()
            self.teller = None
        devices, self.all = self.all, []
        with self._spare():
            for device in devices:
                device.detach_quietly()
                shape = device.shape
                device.close()
                if shape is not None:
                    shape.enforcer.close()
                device.classifier.close()
        self._open.close()

    def _enforcer(self, device: Device) -> DeviceEnforcer:
        daemon = self.config.daemon
        return DeviceEnforcer(device.name, self.bands, device.config.backend, device.config.rate, daemon.state_dir)


def _tried(work: Callable[[], list[str]]) -> list[str]:
    """What is to be said of it, which may be that it failed."""
    try:
        return work()
    except (OSError, DatapathError) as e:
        return [str(e)]


def _loader(wanted: str) -> tuple[str, Loader]:
    """The configured way into the kernel; "auto" is libbpf, or BCC where libbpf 1.x is missing. Raises LoaderError."""
    if wanted != "bcc":
        try:
            return "libbpf", LibbpfLoader()
        except LoaderError as e:
            if wanted == "libbpf":
                raise
            log.warning("loader", chosen="bcc", reason=str(e))
    return "bcc", BccLoader()
