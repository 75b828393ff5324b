# SPDX-License-Identifier: Apache-2.0
"""The configured devices: classifiers loaded, attached, qdiscs installed and put back; one failing leaves the others.

Everything here that touches a device blocks for some milliseconds and, because pyroute2 runs an event loop of its own,
must not be called from the daemon's: the daemon calls it in a worker thread, one call at a time. What the event loop
reads meanwhile (``Device.shape``) is one immutable value.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any, Final

import structlog

from mfsd.daemon.device import Device, Shape
from mfsd.daemon.predecessor import HOST, Predecessor, link_name
from mfsd.datapath import _abi, tc
from mfsd.datapath.bpf.attach import Attachment, attach, remove_leftover
from mfsd.datapath.bpf.bcc import BccLoader
from mfsd.datapath.bpf.keys import cookie_key, tuple_key
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.teller import Teller
from mfsd.datapath.errors import AttachError, DatapathError, LoaderError
from mfsd.datapath.handles import is_ours
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.datapath.undo import notes
from mfsd.engine.slots import MemoryKeys, SlotRows, memory_rows
from mfsd.model import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from mfsd.bands import Bands
    from mfsd.daemon.config import Config, DeviceConfig
    from mfsd.datapath.bpf.loader import Classifier, Loader
    from mfsd.datapath.qdisc.plan import DevicePlan
    from mfsd.engine.slots import KeyMap
    from mfsd.model import Endpoints

MS: Final = 1_000_000
"""Nanoseconds."""

log = structlog.get_logger(__name__)


class KernelKeys:
    """engine.slots.KeyMap on the classifier's hash maps, which all devices share."""

    def __init__(self, classifier: Classifier) -> None:
        self._cookies, self._tuples = classifier.cookies, classifier.tuples

    def add_cookie(self, cookie: int, slot: int) -> None:
        """See engine.slots.KeyMap."""
        self._cookies.add(cookie_key(cookie), slot)

    def delete_cookie(self, cookie: int) -> None:
        """See engine.slots.KeyMap."""
        self._cookies.delete(cookie_key(cookie))

    def add_tuple(self, endpoints: Endpoints, slot: int) -> None:
        """See engine.slots.KeyMap."""
        self._tuples.add(tuple_key(endpoints), slot)

    def delete_tuple(self, endpoints: Endpoints) -> None:
        """See engine.slots.KeyMap."""
        self._tuples.delete(tuple_key(endpoints))


class Devices:
    """All devices of one daemon, and the table and keys that their classifiers share."""

    def __init__(self, config: Config, bands: Bands, predecessor: Predecessor | None = None) -> None:
        """Load the classifiers. Without devices the table is plain memory. Raises LoaderError."""
        self.predecessor = predecessor or Predecessor({})
        self.config = config
        self.bands = bands
        self.all: list[Device] = []
        self.teller: Teller | None = None
        self.teller_problem = ""
        """Why the kernel does not tell of connections, though it should."""
        self._host: npt.NDArray[Any] | None = None
        self.rows: SlotRows
        self.keys: KeyMap
        if not config.device:
            self.rows, self.keys = memory_rows(config.daemon.slots), MemoryKeys()
            return
        name, loader = _loader(config.daemon.loader)
        first: Classifier | None = None
        try:
            for wanted in config.device:
                classifier = loader.open_classifier(config.daemon.slots, first)
                first = first or classifier
                self.all.append(Device(wanted, bands, classifier, name, config.bands.dscp))
        except BaseException:
            self.close()
            raise
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
        """Give the sign of life."""
        if self._host is not None:
            self._host["heartbeat_ns"] = time.monotonic_ns()

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

        A device that is missing is looked for again, one that came back is set up again, and qdiscs that somebody
        else replaced are given up, with a notice: whoever did it wants them. Nothing is touched while classifiers of
        the daemon before are at work.
        """
        if not self.predecessor.at_work:
            self._care_for_all(mode)

    def succeed(self, mode: Mode) -> None:
        """Take over from the daemon before."""
        try:
            self._care_for_all(mode)
        finally:
            self.predecessor.retire()

    def descriptors(self) -> dict[str, int]:
        """By name, what has to outlive this process for another to take over."""
        if not self.all:
            return {}
        links = {link_name(d.ifindex): d.attachment.link_fd for d in self.all if d.attachment is not None}
        return {HOST: self.all[0].classifier.map_fds[HOST]} | {name: fd for name, fd in links.items() if fd >= 0}

    def _care_for_all(self, mode: Mode) -> None:
        for device in self.all:
            try:
                self._care(device, mode)
            except (OSError, DatapathError) as e:
                device.note(str(e))

    def _care(self, device: Device, mode: Mode) -> None:
        try:
            ifindex = socket.if_nametoindex(device.name)
        except OSError:
            self._lost(device)
            device.note("there is no such device; it is set up when it appears")
            return
        if ifindex != device.ifindex:
            self._lost(device)
            device.ifindex = ifindex
        if device.attachment is None:
            device.write_map()
            if self.predecessor.at_work:
                # The qdiscs first: until the classifiers change places, packets follow the old one into them.
                if mode is Mode.ENFORCE and not device.given_up:
                    self._enforce(device)
            else:
                remove_leftover(ifindex)  # of a daemon that was killed on a kernel without TCX
            device.attachment = self._attach(device)
            log.info("attached", device=device.name, hook=device.attachment.method)
        shape = device.shape
        if shape is not None:
            self._verify(device, shape.enforcer)
        elif mode is Mode.ENFORCE and not device.given_up:
            self._enforce(device)
        elif mode is Mode.OBSERVE:
            device.note("")

    def _attach(self, device: Device) -> Attachment:
        link = self.predecessor.link(device.ifindex)
        if link >= 0:
            attachment = Attachment(device.ifindex, "tcx", link)
            try:
                attachment.update(device.classifier)
            except AttachError:  # it was another device's, which is gone
                attachment.detach()
            else:
                return attachment
        # With clsact this puts the program into the filter that is there.
        return attach(device.classifier, device.ifindex, self.config.daemon.attach)

    def _enforce(self, device: Device) -> None:
        enforcer = self._enforcer(device)
        try:
            plan = enforcer.plan()
            if plan.refusals:
                device.note(f"observed only: {'; '.join(plan.refusals)}")
                enforcer.close()
                return
            enforcer.apply()
        except BaseException:
            enforcer.close()
            raise
        device.put_in_force(Shape.of(enforcer, plan))
        device.note("")
        log.info(
            "enforcing",
            device=device.name,
            backend=plan.backend,
            rate=str(plan.rate or "line rate"),
            adopted=enforcer.adopted,
        )

    def _verify(self, device: Device, enforcer: DeviceEnforcer) -> None:
        problems = enforcer.verify()
        if not problems:
            device.note("")
            return
        if self._root_is_ours(device.ifindex):
            log.warning("repairing the qdiscs", device=device.name, problems=problems)
            try:
                plan = enforcer.apply()
            except (OSError, DatapathError):
                device.put_in_force(None)
                enforcer.close()
                raise
            device.put_in_force(Shape.of(enforcer, plan))
            return
        # Whoever replaced the root wants something else there, and would do it again. The classifier first, here and
        # below, so that no packet is sent to classes that are about to go.
        device.put_in_force(None)
        device.given_up = True
        device.note("observed only: somebody replaced the root qdisc; set the mode to enforce again to retry")
        for problem in enforcer.restore():
            log.warning("after the root was replaced", device=device.name, problem=problem)
        enforcer.close()

    @staticmethod
    def _root_is_ours(ifindex: int) -> bool:
        with tc.TcSocket() as sock:
            root = tc.root_of(sock.tree(ifindex)[0])
        return root is not None and is_ours(root)

    def _lost(self, device: Device) -> None:
        """The device is gone, and everything on it."""
        shape, device.ifindex = device.shape, 0
        device.put_in_force(None)
        if shape is not None:
            shape.enforcer.close()
            # Its qdiscs went with it, also when it only moved to another namespace (dev_shutdown, net/core/dev.c).
            notes.forget(self.config.daemon.state_dir, device.name)
        device.detach_quietly()

    def retry(self) -> None:
        """Forget that enforcement was given up."""
        for device in self.all:
            device.given_up = False

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
        """Put qdiscs back; names of the restored devices, and problems. They stay as they are until ``retry``."""
        restored: list[str] = []
        problems: list[str] = []
        for device in self._named(names):
            device.given_up = True
            shape = device.shape
            if shape is None:
                continue
            device.put_in_force(None)
            try:
                wrong = shape.enforcer.restore()
            except (OSError, DatapathError) as e:
                wrong = [f"{device.name}: {e}"]
            shape.enforcer.close()
            problems += wrong
            if not wrong:
                restored.append(device.name)
            log.info("restored", device=device.name, problems=wrong)
        return restored, problems

    def _named(self, names: Sequence[str]) -> list[Device]:
        return [d for d in self.all if d.name in names]

    def leave(self) -> None:
        """End with everything at work, for the next daemon to take over; ``close`` does nothing from then on."""
        self._host, self.all = None, []

    def close(self) -> None:
        """Detach and unload the classifiers; qdiscs stay as they are. Idempotent."""
        self.predecessor.retire()
        self.fall_silent()
        self._host = None
        if self.teller is not None:
            self.teller.close()
            self.teller = None
        devices, self.all = self.all, []
        for device in devices:
            device.detach_quietly()
            shape = device.shape
            device.close()
            if shape is not None:
                shape.enforcer.close()
            device.classifier.close()

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
