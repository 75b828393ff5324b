# SPDX-License-Identifier: Apache-2.0
"""The daemon: life cycle, regular work, reload, and what operators ask of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import TYPE_CHECKING, Final

import structlog

import mfsd
from mfsd.api.control import ControlService
from mfsd.api.decode import Decoder
from mfsd.api.hints import HintsService
from mfsd.api.identity import Identities
from mfsd.api.room import Room
from mfsd.api.server import Server
from mfsd.daemon import config as configuration
from mfsd.daemon import config_bands, measures, reload, wiring
from mfsd.daemon.care import Care
from mfsd.daemon.devices import Devices
from mfsd.daemon.ear import Ear
from mfsd.daemon.exposition import Exposition
from mfsd.daemon.lock import StartError, lock
from mfsd.daemon.predecessor import Predecessor
from mfsd.daemon.rights import rights_of
from mfsd.daemon.rules import Rules, cgroup_root
from mfsd.daemon.sockets import HostSockets
from mfsd.daemon.supervisor import Supervisor
from mfsd.daemon.ticker import Periods, Ticker
from mfsd.ground import logs
from mfsd.ground.model import Mode
from mfsd.host import bridges, clock
from mfsd.host.makers import Census
from mfsd.relay.relay import Relay

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from mfsd.api.operations import Figures, RuleState, Verdict, Way
    from mfsd.daemon.config import Config
    from mfsd.daemon.device import Device
    from mfsd.v1 import control_pb2 as pb

STATUS_S: Final = 5.0
"""How often the one-line status for systemctl is renewed."""
SNAPSHOT_S: Final = 5.0
"""How long a scrape waits for the event loop."""

log = structlog.get_logger(__name__)


class Daemon:
    """One running mfsd. ``run`` returns when a signal asks it to."""

    def __init__(self, config: Config, path: Path | None, predecessor: Predecessor | None = None) -> None:
        self.config = config
        self.path = path
        self.started = clock.monotonic()
        self._predecessor = predecessor or Predecessor({})
        self.ready = asyncio.Event()
        """The endpoints are open."""
        self._stopping = asyncio.Event()
        self._hand_over = self._put_back = False
        self._verbose = False
        self._reloads = 0
        """Asked for since the last one began; that one counts, too."""
        self._reload_problems: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._lock_file = lock(config.daemon.state_dir)
        with contextlib.ExitStack() as undo:
            undo.callback(self._lock_file.close)
            policy = config_bands.policy_of(config)
            self._supervisor = Supervisor(os.environ, self._predecessor.names)
            undo.callback(self._supervisor.close)
            self.devices = Devices(config, config_bands.bands_of(config, policy), self._predecessor)
            undo.callback(self.devices.close)
            loop = asyncio.get_running_loop()
            self._cgroups = cgroup_root(undo)
            self._sockets = HostSockets(self.devices.teller, lambda: _soon(loop, self._ear.hear), self._cgroups)
            undo.callback(self._sockets.close)
            self.engine = wiring.engine_of(config, self.devices, policy, self._sockets)
            self._care = Care(self.devices, self.engine, self._supervisor)
            self._rules = Rules(self.engine, cgroups=self._cgroups is not None)
            self._rules.put(config, clock.monotonic())
            # The engine's times stand in the table beside the kernel's: all of them are the kernel's.
            self.ticker = Ticker(self.engine, Periods.of(config.daemon), self._beat, clock=clock.monotonic)
            self._ear = Ear(self.engine, self.ticker, self.devices.teller, clock.monotonic)
            self._decoder = Decoder(config.limits)
            try:
                rights = rights_of(config.daemon)
            except LookupError as e:
                raise StartError(str(e)) from None
            self._identities = Identities(config.limits.max_sessions_per_user, rights=rights)
            hints = HintsService(
                self.engine,
                self._decoder,
                self._identities,
                self.ticker,
                anonymous=config.daemon.anonymous,
                clock=clock.monotonic,
            )
            self._relay: Relay | None = None
            if config.relay.on:
                self._relay = Relay(config.relay, self.engine, self._decoder, self.ticker.poke, clock.monotonic)
                hints.elsewhere = self._relay.advice
            control = ControlService(self, clock=clock.monotonic)
            self._server = Server(hints, control, self._identities, config.daemon)
            self._registry = measures.registry_of(lambda: self._snapshot(loop))
            self._exposition = Exposition(config.metrics, config.daemon.socket, self._registry)
            self._undo = undo.pop_all()

    # --- life cycle ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until told to stop. Raises ServerError when the endpoints can't be opened."""
        with self._undo:
            try:
                self.devices.host.set_steering(steers=self.engine.steers)
                self.devices.host.beat()
                await self._care.look()
                if self._sockets.entered is not None:
                    # Else clients that come back would be told what can't be, as long as it is not known what has gone.
                    await asyncio.wrap_future(self._sockets.entered)
                await self._server.start()
                if self._relay is not None:
                    await self._relay.start()
                self._exposition.start(self._server.places)
                self._server.others = {self._exposition.path: lambda: self._exposition.again(self._server.places)}
                self.ticker.start()
                self._ear.start()
                room = Room(self._server.bound, self._identities)
                work = self._care.succeed(), self._care.keep_looking(), self._keep_status()
                self._tasks = [asyncio.create_task(w) for w in (*work, room.keep(), self._server.keep())]
                self._supervisor.tell(f"READY=1\n{self._status_line()}")
                log.info("ready", version=mfsd.__version__, socket=str(self.config.daemon.socket))
                self.ready.set()
                await self._stopping.wait()
            finally:
                await self._shut_down()

    async def _shut_down(self) -> None:
        self._supervisor.tell("STOPPING=1")
        self._ear.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._hand_over and self._supervisor.present:
            # What clients have said stays in force until the next daemon knows it.
            self._identities.ended = lambda _peer: None
        await self._server.stop()
        if self._relay is not None:
            await self._relay.stop()
        await asyncio.to_thread(self._exposition.close)  # what it waits for may wait for the loop
        self.ticker.stop()
        if self._hand_over and self._supervisor.present:
            # Nothing is drained: packets follow what was decided last until the next daemon has taken over.
            await self._care.do(self.devices.leave)
            log.info("stopped", qdiscs="kept", classifiers="kept")
            return
        problems: list[str] = []
        keep = self._hand_over or self.config.daemon.on_exit == "keep"
        await self._care.take_over()  # only who has taken over can put things back
        self._supervisor.keep({})
        # From here on packets are default traffic, whatever happens to the qdiscs.
        self.devices.host.fall_silent()
        if keep:
            await self._care.do(self.devices.drain)
        else:
            _, problems = await self._care.do(lambda: self.devices.restore([d.name for d in self.devices.all]))
            for problem in problems:
                log.error("not restored", problem=problem)
        await self._care.do(self.devices.close)
        log.info("stopped", qdiscs="kept" if keep else "restored" if not problems else "see above")

    def stop(self) -> None:
        """End, and put the qdiscs back (unless daemon.on_exit says to keep them), also if asked to hand over, too."""
        self._hand_over, self._put_back = False, True
        self._stopping.set()

    def hand_over(self) -> None:
        """End and leave the qdiscs to the next daemon, which adopts them without a graft.

        With a service manager the classifiers stay at work, too, until the next daemon's take their place.
        """
        self._hand_over = not self._put_back
        self._stopping.set()

    # --- regular work -------------------------------------------------------------------------------------------------

    def _beat(self, now: float) -> None:
        """After a successful tick: signs of life for the classifier and for systemd."""
        self.devices.host.beat()
        self.devices.network.beat(self.engine, now)
        self._supervisor.beat(now)

    async def _keep_status(self) -> None:
        last = ""
        while True:
            await asyncio.sleep(STATUS_S)
            line = self._status_line()
            if line != last:
                self._supervisor.tell(line)
                last = line

    def _status_line(self) -> str:
        return f"STATUS={measures.line(self.engine, self.all_devices)}"

    # --- reload -------------------------------------------------------------------------------------------------------

    def reload_soon(self) -> None:
        """Reload in the background, with the notes that systemd wants."""
        self._reloads += 1
        if self._reloads == 1:
            self._tasks.append(asyncio.create_task(self._reload_all()))

    async def _reload_all(self) -> None:
        """However often it is asked for meanwhile, once more is enough."""
        await self.ready.wait()  # else systemd would be told so too early
        while self._reloads:
            self._reloads = 1
            await self._reload_notified()
            self._reloads -= 1
        self._tasks = [t for t in self._tasks if t is not asyncio.current_task()]

    async def _reload_notified(self) -> None:
        # MONOTONIC_USEC is what Type=notify-reload wants, see sd_notify(3).
        self._supervisor.tell(f"RELOADING=1\nMONOTONIC_USEC={clock.monotonic_ns() // 1000}")
        try:
            await self.reload()
        finally:
            self._supervisor.tell(f"READY=1\n{self._status_line()}")

    async def reload(self) -> None:
        """Read the configuration again and change what can be changed; the rest is named in the log and the status.

        A file with any problem changes nothing.
        """
        self._reload_problems = []
        if self.path is None:
            self._reload_problems = ["reload: there is no configuration file to read again"]
            log.warning("reload", problem=self._reload_problems[0])
            return
        try:
            new = configuration.load(self.path, again=True)
        except configuration.ConfigError as e:
            self._reload_problems = [f"reload refused, nothing changed: {p}" for p in e.lines]
            log.warning("reload refused, nothing changed", problems=e.lines)
            return
        old = self.config
        changes = reload.changes(old, new)
        waiting = [*changes.restart, *await self._change(old, new, set(changes.now))]
        self._reload_problems = [f"{key}: changed in the file, takes effect at the next restart" for key in waiting]
        self._reload_problems += reload.let_go(old, new)
        log.info("reloaded", changed=[k for k in changes.now if k not in waiting], needs_restart=waiting)

    def change_verbosity(self) -> None:
        """Log everything, or again what the configuration says. A reload ends it, too."""
        self._verbose = not self._verbose
        level = "debug" if self._verbose else self.config.daemon.log_level
        logs.set_level(level)
        log.warning("log level", now=level)

    async def _change(self, old: Config, new: Config, keys: set[str]) -> list[str]:
        """Apply the changed keys; returns those that turn out to need a restart."""
        self.config = merged = reload.merge(old, new)
        self.devices.config = merged
        waiting: list[str] = []
        if reload.touches(keys, "policy.") and not wiring.change_policy(self.engine, merged):
            waiting = sorted(k for k in keys if k.startswith("policy."))
            self.config = self.devices.config = merged.model_copy(update={"policy": old.policy})
        self.engine.set_limits(merged.limits, merged.rescue, merged.tenants)
        self._decoder.set_limits(merged.limits)
        if keys & {"rule", "rules.library"}:
            self._rules.put(merged, clock.monotonic())
        self._identities.limit = merged.limits.max_sessions_per_user
        if "bands.dscp" in keys or reload.touches(keys, "policy."):  # whose classes its levels are
            self.devices.set_dscp(config_bands.dscp_of(self.config))
        if reload.touches(keys, "device["):
            self.devices.set_configs(merged.device)
        if self._verbose or reload.touches(keys, "daemon.log_"):
            self._verbose = False
            logs.configure(merged.daemon.log_format, merged.daemon.log_level)
        self.ticker.periods = Periods.of(merged.daemon)
        self.devices.host.set_timeout(merged.daemon.heartbeat_timeout_ms)
        if "daemon.mode" in keys:
            await self.set_mode(merged.daemon.mode)
        return waiting

    # --- what operators ask (control.Operations) ----------------------------------------------------------------------

    @property
    def all_devices(self) -> Sequence[Device]:
        """The configured devices."""
        return self.devices.all

    async def figures(self) -> list[Figures]:
        """Of all devices, read by their threads."""
        return list(await asyncio.gather(*(asyncio.wrap_future(d.figures()) for d in self.all_devices)))

    @property
    def yields(self) -> bool:
        """Deferred connections yield in the network."""
        return bool(self.devices.network.algorithm)

    async def ways(self) -> list[Way]:
        """To peers, where they do."""
        return await asyncio.to_thread(self.devices.network.ways) if self.yields else []

    def notices(self) -> list[str]:
        """Things an operator should know, most important first."""
        out = [f"engine: the last tick failed: {self.ticker.failure}"] if self.ticker.failure else []
        out += [self._care.failure] if self._care.failure else []
        out += [f"{p.name}: {p.notice}" for p in self.all_devices if p.notice]
        out += [f"{p.name}: {p.failure}" for p in self.all_devices if p.failure]
        out += self.devices.problems + self._server.problems
        out += bridges.notices(p.name for p in self.all_devices)
        out += [p for p in (self.devices.teller_problem, self.devices.network.problem) if p]
        out += [] if self._relay is None else self._relay.notices()
        out += [f"rule {r.name!r} names nothing: {r.problem}" for r in self.rules if r.problem]
        if not self.all_devices:
            out.append("no [[device]] is configured: hints are taken, nothing is shaped")
        return out + self._reload_problems

    @property
    def rules(self) -> Sequence[RuleState]:
        """Rules in force."""
        return self._rules.states

    async def verdicts(self, cookie: int, port: int) -> list[Verdict]:
        """What rules say of connections."""
        if not cookie and not port:
            return []
        return await asyncio.to_thread(
            lambda: self._rules.verdicts(self._sockets.named(cookie, port), Census(self._cgroups))
        )

    def tick_durations(self) -> tuple[float, float]:
        """See Ticker."""
        return self.ticker.durations()

    async def metrics(self) -> str:
        """All metrics in OpenMetrics' text format."""
        return await asyncio.to_thread(measures.text_of, self._registry)

    def _snapshot(self, loop: asyncio.AbstractEventLoop) -> measures.Snapshot:
        """Have the loop take one; for other threads."""

        async def take() -> measures.Snapshot:
            ticks = self.ticker.count, self.ticker.busy_s, self.ticker.failure
            return measures.snapshot(self, await self.figures(), await self.ways(), ticks, clock.monotonic())

        return asyncio.run_coroutine_threadsafe(take(), loop).result(SNAPSHOT_S)

    def set_log_level(self, level: str | None) -> str:
        """Until a reload or restart."""
        if level is not None and level != logs.level():
            logs.set_level(level)
            self._verbose = level != self.config.daemon.log_level
            log.warning("log level", now=level)
        return logs.level()

    def steering_changed(self) -> None:
        """Mode or pause have changed."""
        self.devices.host.set_steering(steers=self.engine.steers)
        log.info("steering", mode=self.engine.mode.value, paused=self.engine.paused, steers=self.engine.steers)

    async def set_mode(self, mode: Mode) -> None:
        """Observe or enforce; enforcing tries again where it was given up before."""
        self.engine.set_mode(mode)
        if mode is Mode.ENFORCE:
            self.devices.retry()
            await self._care.look()
        self.steering_changed()

    async def plans(self, names: Sequence[str]) -> list[pb.DevicePlan]:
        """What enforcing changes, or has changed, on these devices."""
        return await self._care.plans(names)

    async def restore(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Put qdiscs back. With none left to enforce on, the mode is observe from then on."""
        await self._care.take_over()  # else the classifiers of the daemon before went on sending packets there
        out = await self._care.do(lambda: self.devices.restore(names))
        if not any(p.enforced for p in self.all_devices):
            self.engine.set_mode(Mode.OBSERVE)
            self.steering_changed()
        return out


def _soon(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Have the loop call, from any thread; nothing when it is over."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call)
