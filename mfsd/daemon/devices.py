# SPDX-License-Identifier: Apache-2.0
"""The configured devices: classifiers loaded, attached, qdiscs installed and put back; one failing leaves the others.

Everything here that touches a device blocks for some milliseconds and, because pyroute2 runs an event loop of its own,
must not be called from the daemon's: the daemon calls it in a worker thread, one call at a time. What the event loop
reads meanwhile (``Port.enforcer``) is assigned whole.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog

from mfsd.daemon.device import KernelKeys, Port
from mfsd.datapath import _abi
from mfsd.datapath.bpf.attach import attach, remove_leftover
from mfsd.datapath.bpf.bcc import BccLoader
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.loader import DatapathError, LoaderError
from mfsd.datapath.netlink import TcSocket
from mfsd.datapath.qdisc.enforcer import DeviceEnforcer
from mfsd.datapath.qdisc.tree import is_ours
from mfsd.datapath.undo import notes
from mfsd.datapath.undo.snapshot import read_tree, root_of
from mfsd.engine.slots import MemoryKeys, SlotRows, memory_rows
from mfsd.logs import Seldom
from mfsd.model import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import numpy.typing as npt

    from mfsd.bands import Bands
    from mfsd.daemon.config import Config, DeviceConfig
    from mfsd.datapath.bpf.loader import Classifier, Loader
    from mfsd.datapath.qdisc.plan import DevicePlan
    from mfsd.engine.slots import KeyMap

MS: Final = 1_000_000
"""Nanoseconds."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BandRow:
    """One band of one device, as operators see it; bytes and packets are those sent, backlog those queued now."""

    index: int
    classid: str
    lanes: int
    bytes: int
    packets: int
    drops: int
    backlog: int


class GuardedPort(Port):
    """A port whose failures are noted and logged, and never reach the engine."""

    def __init__(
        self, config: DeviceConfig, bands: Bands, classifier: Classifier, loader: str, dscp: Mapping[str, int]
    ) -> None:
        rate = config.rate.bytes_per_s if config.rate is not None else 0.0
        super().__init__(config, 0, bands, classifier, None, None, rate, dscp)
        self.loader = loader
        self.notice = ""
        """Why the device is only observed, or not even that; empty when all is as configured."""
        self.failure = ""
        """Why the last access to the qdiscs failed; empty when it did not."""
        self.backend = ""
        """Of the qdiscs in force; empty when only observed."""
        self.given_up = False
        """The qdiscs were put back on request, or somebody replaced them: not to be installed again unasked."""
        self.plan: DevicePlan | None = None
        """What was planned before the qdiscs in force were installed."""
        self._seldom = Seldom()

    def read(self) -> tuple[int, int, npt.NDArray[np.float64]] | None:
        """See Port; None also when the device can't be asked."""
        try:
            reading = super().read()
        except (OSError, DatapathError) as e:
            self._failed("read", e)
            return None
        self.failure = ""
        return reading

    def backlog(self, band: int, lane: int) -> int:
        """See Port; 0 also when the device can't be asked."""
        try:
            return super().backlog(band, lane)
        except (OSError, DatapathError) as e:
            self._failed("backlog", e)
            return 0

    def purge(self, lanes: Sequence[tuple[int, int]]) -> None:
        """See Port."""
        try:
            super().purge(lanes)
        except (OSError, DatapathError) as e:
            self._failed("rescue", e)

    def _failed(self, what: str, error: Exception) -> None:
        self.failure = f"{what}: {error}"
        if self._seldom(what):
            log.warning("device access failed", device=self.name, what=what, error=str(error))

    def band_rows(self) -> list[BandRow]:
        """All bands: the qdisc's counters where we enforce, else what the classifier counted."""
        counted = self.classifier.bands()
        if self.enforcer is not None:
            try:
                counters = self.enforcer.counters()
                maps = self.enforcer.band_maps()
            except (OSError, DatapathError) as e:
                self._failed("counters", e)
            else:
                return [
                    BandRow(i, f"{classid >> 16:x}:{classid & 0xFFFF:x}", lanes, *map(int, list(row)[:4]))
                    for i, ((classid, lanes), row) in enumerate(zip(maps, counters.tolist(), strict=True))
                ]
        return [
            BandRow(b.index, "", b.lanes, int(counted["bytes"][b.index]), int(counted["packets"][b.index]), 0, 0)
            for b in self.bands.bands
        ]

    def detach_quietly(self) -> None:
        """Take the classifier off the device; where that fails, its heartbeat is lost and it does nothing."""
        try:
            self.close()
        except (OSError, DatapathError) as e:
            self.attachment = None
            log.warning("detaching failed", device=self.name, error=str(e))


class Devices:
    """All devices of one daemon, and the table and keys that their classifiers share."""

    def __init__(self, config: Config, bands: Bands) -> None:
        """Load the classifiers. Without devices the table is plain memory. Raises LoaderError."""
        self.config = config
        self.bands = bands
        self.ports: list[GuardedPort] = []
        self._host: npt.NDArray[Any] | None = None
        self.rows: SlotRows
        self.keys: KeyMap
        if not config.device:
            self.rows, self.keys = memory_rows(config.daemon.slots), MemoryKeys()
            return
        name, loader = _loader(config.daemon.loader)
        first: Classifier | None = None
        try:
            for device in config.device:
                classifier = loader.open_classifier(config.daemon.slots, first)
                first = first or classifier
                self.ports.append(GuardedPort(device, bands, classifier, name, config.bands.dscp))
        except BaseException:
            self.close()
            raise
        shared = self.ports[0].classifier
        self.rows, self.keys = shared.slots, KernelKeys(shared)
        self._host = shared.host
        self._host["abi_version"] = _abi.ABI_VERSION
        self.set_timeout(config.daemon.heartbeat_timeout_ms)

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
        for port in self.ports:
            port.dscp = dscp
            port.write_device_map()

    def set_configs(self, configs: Sequence[DeviceConfig]) -> None:
        """Take other classifier flags; names, backends and rates must be as before."""
        for port, config in zip(self.ports, configs, strict=True):
            port.config = config
            port.write_device_map()

    # --- devices (a worker thread) ------------------------------------------------------------------------------------

    def care(self, mode: Mode) -> None:
        """Bring every device to the state it should be in. Called at the start, on a change of mode, and regularly.

        A device that is missing is looked for again, one that came back is set up again, and qdiscs that somebody
        else replaced are given up, with a notice: whoever did it wants them.
        """
        for port in self.ports:
            try:
                self._care(port, mode)
            except (OSError, DatapathError) as e:
                self._note(port, str(e))

    def _care(self, port: GuardedPort, mode: Mode) -> None:
        try:
            ifindex = socket.if_nametoindex(port.name)
        except OSError:
            self._lost(port)
            self._note(port, "there is no such device; it is set up when it appears")
            return
        if ifindex != port.ifindex:
            self._lost(port)
            port.ifindex = ifindex
        if port.attachment is None:
            remove_leftover(ifindex)  # of a daemon that was killed on a kernel without TCX
            port.write_device_map()
            port.attachment = attach(port.classifier, ifindex, self.config.daemon.attach)
            log.info("attached", device=port.name, hook=port.attachment.method)
        if port.enforcer is not None:
            self._verify(port, port.enforcer)
        elif mode is Mode.ENFORCE and not port.given_up:
            self._enforce(port)
        elif mode is Mode.OBSERVE:
            self._note(port, "")

    def _enforce(self, port: GuardedPort) -> None:
        enforcer = self._enforcer(port)
        try:
            plan = enforcer.plan()
            if plan.refusals:
                self._note(port, f"observed only: {'; '.join(plan.refusals)}")
                enforcer.close()
                return
            enforcer.apply()
        except BaseException:
            enforcer.close()
            raise
        if plan.rate is not None:
            port.estimator.configured = plan.rate.bytes_per_s
        port.backend, port.plan = plan.backend, plan
        port.enforcer = enforcer
        port.write_device_map()
        self._note(port, "")
        log.info(
            "enforcing",
            device=port.name,
            backend=plan.backend,
            rate=str(plan.rate or "line rate"),
            adopted=enforcer.adopted,
        )

    def _verify(self, port: GuardedPort, enforcer: DeviceEnforcer) -> None:
        problems = enforcer.verify()
        if not problems:
            self._note(port, "")
            return
        if self._root_is_ours(port.ifindex):
            log.warning("repairing the qdiscs", device=port.name, problems=problems)
            try:
                enforcer.apply()
            except DatapathError:
                self._stop_enforcing(port)
                enforcer.close()
                raise
            port.write_device_map()
            return
        # Whoever replaced the root wants something else there, and would do it again.
        self._stop_enforcing(port)
        port.given_up = True
        self._note(port, "observed only: somebody replaced the root qdisc; set the mode to enforce again to retry")
        for problem in enforcer.restore():
            log.warning("after the root was replaced", device=port.name, problem=problem)
        enforcer.close()

    @staticmethod
    def _root_is_ours(ifindex: int) -> bool:
        with TcSocket() as sock:
            root = root_of(read_tree(sock, ifindex)[0])
        return root is not None and is_ours(root)

    def _stop_enforcing(self, port: GuardedPort) -> None:
        # The classifier first, so that no packet is sent to classes that are about to go.
        port.enforcer = None
        port.backend = ""
        port.write_device_map()

    def _lost(self, port: GuardedPort) -> None:
        """The device is gone, and everything on it."""
        enforcer, port.ifindex = port.enforcer, 0
        self._stop_enforcing(port)
        if enforcer is not None:
            enforcer.close()
            # Its qdiscs went with it, also when it only moved to another namespace (dev_shutdown, net/core/dev.c).
            notes.forget(self.config.daemon.state_dir, port.name)
        port.detach_quietly()

    def retry(self) -> None:
        """Forget that enforcement was given up."""
        for port in self.ports:
            port.given_up = False

    def plans(self, ports: Sequence[GuardedPort]) -> list[tuple[GuardedPort, DevicePlan | DatapathError]]:
        """What enforcing would do, or has done."""
        out: list[tuple[GuardedPort, DevicePlan | DatapathError]] = []
        for port in ports:
            if port.enforcer is not None and port.plan is not None:
                out.append((port, port.plan))
                continue
            try:
                with self._enforcer(port) as enforcer:
                    out.append((port, enforcer.plan()))
            except DatapathError as e:
                out.append((port, e))
            except OSError as e:
                out.append((port, DatapathError(f"device {port.name}", str(e))))
        return out

    def restore(self, ports: Sequence[GuardedPort]) -> tuple[list[str], list[str]]:
        """Put qdiscs back; names of the restored devices, and problems. They stay as they are until ``retry``."""
        restored: list[str] = []
        problems: list[str] = []
        for port in ports:
            port.given_up = True
            enforcer = port.enforcer
            if enforcer is None:
                continue
            self._stop_enforcing(port)
            try:
                wrong = enforcer.restore()
            except (OSError, DatapathError) as e:
                wrong = [f"{port.name}: {e}"]
            enforcer.close()
            problems += wrong
            if not wrong:
                restored.append(port.name)
            log.info("restored", device=port.name, problems=wrong)
        return restored, problems

    def close(self) -> None:
        """Detach and unload the classifiers; qdiscs stay as they are. Idempotent."""
        self.fall_silent()
        self._host = None
        ports, self.ports = self.ports, []
        for port in ports:
            port.detach_quietly()
            if port.enforcer is not None:
                port.enforcer.close()
            port.classifier.close()

    def _enforcer(self, port: GuardedPort) -> DeviceEnforcer:
        daemon = self.config.daemon
        return DeviceEnforcer(port.name, self.bands, port.config.backend, port.config.rate, daemon.state_dir)

    @staticmethod
    def _note(port: GuardedPort, notice: str) -> None:
        if notice and notice != port.notice:
            log.warning("device", device=port.name, notice=notice)
        port.notice = notice


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
