# SPDX-License-Identifier: Apache-2.0
"""The configured devices: classifiers loaded, attached, qdiscs installed and put back; one failing leaves the others.

A device is its interface index; the configuration names it. So in each round of care all names are looked up first, and
whatever has lost its name is put back as it was, before those that have the names now are set up.

Everything here that touches a device blocks for some milliseconds, so the daemon calls it in a worker thread, one call
at a time. What the event loop reads meanwhile (``Device.shape``) is one immutable value.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import structlog

from mfsd.daemon import hook, leftovers
from mfsd.daemon.device import Device, Shape
from mfsd.daemon.drain import drain
from mfsd.daemon.keys import KernelKeys
from mfsd.daemon.reserve import Reserve
from mfsd.datapath import _abi, links, tc
from mfsd.datapath.bpf.bcc import BccLoader
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.teller import Teller
from mfsd.datapath.errors import DatapathError, LoaderError, NoDeviceError
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.engine.slots import MemoryKeys, SlotRows, memory_rows
from mfsd.host import clock
from mfsd.model import Mode

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from mfsd.bands import Bands
    from mfsd.daemon.config import Config, DeviceConfig
    from mfsd.datapath.bpf.loader import Classifier, Loader
    from mfsd.datapath.qdisc.plan import DevicePlan
    from mfsd.engine.slots import KeyMap

MS: Final = 1_000_000
"""Nanoseconds."""

log = structlog.get_logger(__name__)


class Devices:
    """All devices of one daemon, and the table and keys that their classifiers share."""

    def __init__(self, config: Config, bands: Bands) -> None:
        """Load the classifiers. Without devices the table is plain memory. Raises LoaderError, OSError."""
        self.config = config
        self.bands = bands
        self.all: list[Device] = []
        self.problems: list[str] = []
        """What is wrong with no configured device in particular: notes, devices that have lost their name."""
        self.teller: Teller | None = None
        self.teller_problem = ""
        """Why the kernel does not tell of connections, though it should."""
        self._host: npt.NDArray[Any] | None = None
        self._open = contextlib.ExitStack()
        self._reserve: Reserve | None = None
        self._beaten = 0
        self.rows: SlotRows
        self.keys: KeyMap
        if not config.device:
            self.rows, self.keys = memory_rows(config.daemon.slots), MemoryKeys()
            return
        name, loader = _loader(config.daemon.loader)
        first: Classifier | None = None
        try:
            self._sock = self._open.enter_context(tc.TcSocket())
            self._departures = self._open.enter_context(links.Departures())
            for wanted in config.device:
                classifier = loader.open_classifier(config.daemon.slots, first)
                first = first or classifier
                self.all.append(Device(wanted, bands, classifier, name, config.bands.dscp))
        except BaseException:
            self.close()
            raise
        self._reserve = self._open.enter_context(Reserve())
        shared = self.all[0].classifier
        self.rows, self.keys = shared.slots, KernelKeys(shared)
        self._host = shared.host
        self._host["abi_version"] = _abi.ABI_VERSION
        self.set_timeout(config.daemon.heartbeat_timeout_ms)
        try:
            self._listen(shared)
        except BaseException:
            self.close()
            raise

    def _listen(self, classifier: Classifier) -> None:
        """Have the kernel tell of connections, if it can and shall. Raises LoaderError where it must."""
        wanted = self.config.daemon.sockets
        if wanted == "listing":
            return
        try:
            self.teller = Teller(classifier)
        except LoaderError as e:
            if wanted == "kernel":
                raise
            self.teller_problem = f"the kernel does not tell of connections, so they are listed again and again: {e}"
            log.warning("sockets", problem=str(e))

    # --- the host map (any thread) ------------------------------------------------------------------------------------

    def set_timeout(self, ms: float) -> None:
        """How long the classifier obeys without a sign of life."""
        if self._host is not None:
            self._host["timeout_ns"] = int(ms * MS)

    def set_steering(self, *, steers: bool) -> None:
        """Let packets follow the levels, or not; takes effect at the next packet."""
        if self._host is not None:
            self._host["flags"] = _abi.HOST_ENFORCE if steers else 0

    def beat(self) -> None:
        """Give the sign of life, by the clock that the classifier goes by."""
        if self._host is not None:
            self._host["heartbeat_ns"] = self._beaten = clock.monotonic_ns()

    def fall_silent(self) -> None:
        """From the next packet on the classifier leaves everything alone."""
        if self._host is not None:
            self._host["flags"] = 0
            self._host["heartbeat_ns"] = 0

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
        wants them.
        """
        if not self.all:
            return
        with self._spare():
            gone = self._departures.since()
            found = [device for device in self.all if self._guarded(device, lambda d: self._locate(d, gone))]
            self.problems = leftovers.put_back(
                self._sock, self.config.daemon.state_dir, {d.ifindex for d in self.all}, [d.name for d in self.all]
            )
            for device in found:
                self._guarded(device, lambda d: self._care(d, mode, sure=gone is not None))

    @staticmethod
    def _guarded(device: Device, work: Callable[[Device], None]) -> bool:
        """False, with a notice, when it failed."""
        try:
            work(device)
        except (OSError, DatapathError) as e:
            device.note(str(e))
            return False
        return True

    def _locate(self, device: Device, gone: set[int] | None) -> None:
        """Find out which index the name means now, and let go of another one that it meant before."""
        try:
            ifindex = links.by_name(self._sock, device.name).ifindex
        except NoDeviceError:
            ifindex = 0
        old = device.ifindex
        if old and gone is not None and old in gone:
            self._lost(device)
        elif old and old != ifindex:
            try:
                links.by_index(self._sock, old)
            except NoDeviceError:
                self._lost(device)
            else:
                self._release(device)
        if ifindex:
            device.was = 0
        device.ifindex = ifindex

    def _lost(self, device: Device) -> None:
        """The device is gone, on the kernel's word, and everything on it.

        Also when it only moved to another namespace (dev_shutdown, net/core/dev.c).
        """
        shape, old = device.shape, device.ifindex
        self._let_go(device)
        if shape is not None:
            shape.enforcer.close()
        leftovers.forget(self._sock, self.config.daemon.state_dir, old)

    def _release(self, device: Device) -> None:
        """The device lives, but under another name, so it is not the one that is to be shaped."""
        shape, device.was = device.shape, device.ifindex
        self._let_go(device)
        if shape is None:
            return
        try:
            problems = shape.enforcer.restore()
        except (OSError, DatapathError) as e:
            problems = [str(e)]  # its note is still there: leftovers.put_back tries again
        shape.enforcer.close()
        log.warning("renamed", device=device.name, index=device.was, restored=not problems, problems=problems)

    @staticmethod
    def _let_go(device: Device) -> None:
        device.ifindex = 0
        device.given_up = ""
        device.put_in_force(None)
        device.detach_quietly()

    def _care(self, device: Device, mode: Mode, *, sure: bool) -> None:
        if not device.ifindex:
            device.note(leftovers.absent(self._sock, device))
            return
        shape = device.shape
        notices = self._hook(device)
        if shape is not None:
            notices += self._verify(device, shape.enforcer, sure=sure)
        elif mode is Mode.ENFORCE and device.given_up:
            notices.append(device.given_up)
        elif mode is Mode.ENFORCE and not device.put_back and device.attachment is not None:
            notices += self._enforce(device)
        else:
            notices += leftovers.notices(self._sock, self.config.daemon.state_dir, device.ifindex, device.name)
        device.note("; ".join(notices + self._late(device)))

    def _hook(self, device: Device) -> list[str]:
        try:
            return hook.keep(device, self.config.daemon.attach)
        except (OSError, DatapathError) as e:
            return [str(e)]  # what is on the device must be looked after all the same

    def _late(self, device: Device) -> list[str]:
        """Whether the classifier has taken a daemon that lives for dead."""
        if self._host is None or clock.monotonic_ns() - self._beaten > int(self._host["timeout_ns"][0]):
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
        for problem in enforcer.restore():
            log.warning("after the root was replaced", device=device.name, problem=problem)
        enforcer.close()
        if not sure:  # too much has happened to tell
            return self._enforce(device)
        # Whoever replaced the root wants something else there, and would do it again.
        device.given_up = "observed only: somebody replaced the root qdisc; set the mode to enforce again to retry"
        return [device.given_up]

    def retry(self) -> None:
        """Forget that enforcement was given up."""
        for device in self.all:
            device.given_up, device.put_back = "", False

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

    def close(self) -> None:
        """Detach and unload the classifiers; qdiscs stay as they are. Idempotent."""
        self.fall_silent()
        self._host = None
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
