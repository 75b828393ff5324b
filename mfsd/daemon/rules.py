# SPDX-License-Identifier: Apache-2.0
"""Rules of the configuration, as marks of a session of our own: nothing else knows that there are rules."""

from __future__ import annotations

import os
import pwd
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from mfsd.api.messages import RULES
from mfsd.api.operations import RuleState, Verdict
from mfsd.daemon import config_rules
from mfsd.daemon.meant import made
from mfsd.datapath.bpf.cgroup import open_root
from mfsd.datapath.errors import LoaderError
from mfsd.ground.model import INF, HintError, Maker, MarkHint, PortRange, RuleSelector, Stage
from mfsd.host.privileges import CAP_SYS_PTRACE, effective

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping, Sequence

    from mfsd.daemon.config import Config
    from mfsd.daemon.config_rules import RuleConfig
    from mfsd.engine.engine import Engine
    from mfsd.engine.sockets import Socket
    from mfsd.host.makers import Census, Makers

VERDICTS_MAX: Final = 32
"""Connections that are explained at once."""
HIDDEN: Final = (
    "executable: which programs other users' processes run is hidden from the daemon without CAP_SYS_PTRACE; name them "
    "by unit, user or ports, or give it that (systemctl edit mfsd)"
)

log = structlog.get_logger(__name__)


class Rules:
    """Rules in force."""

    def __init__(self, engine: Engine, *, cgroups: bool) -> None:
        """``cgroups``: they can be read."""
        self._engine = engine
        self._cgroups = cgroups
        self.states: list[RuleState] = []

    def put(self, config: Config, now: float) -> None:
        """Have just the configuration's rules in force."""
        wanted = [state_of(source, rule) for source, rule in config_rules.in_force(config.rule, config.rules.library)]
        session = self._engine.books.sessions.get(RULES)
        if session is not None:
            kept = {s.selector for s in wanted if not s.problem}
            for selector in [s for s in session.marks if s not in kept]:
                self._engine.apply(session, MarkHint(selector, Stage.NONE), now)
        self.states = []
        for state in wanted:
            unknown = state.selector.maker.cgroup and not self._cgroups
            problem = state.problem or ("cgroup v2 can't be read here" if unknown else "") or self._mark(state, now)
            problem = problem or (HIDDEN if state.selector.maker.executable and not _sees_programs() else "")
            if problem:
                log.warning("rule", name=state.name, problem=problem)
            self.states.append(replace(state, problem=problem))

    def _mark(self, state: RuleState, now: float) -> str:
        """Why a rule can't be in force; empty: it is."""
        if any(s.selector == state.selector for s in self.states):
            return "another rule before it has the same conditions"
        hint = MarkHint(state.selector, state.stage, state.ordered, state.due_in, gives_way=True)
        try:
            session = self._engine.session(RULES, now, maker=self)
            old = session.marks.get(state.selector)
            if old is None or (old.stage, old.ordered, old.due_in) != (state.stage, state.ordered, state.due_in):
                self._engine.apply(session, hint, now)
        except HintError as e:
            return str(e)
        return ""

    def verdicts(self, sockets: Sequence[Socket], census: Census) -> list[Verdict]:
        """What each rule says of each of these connections. Reads /proc and cgroups: for another thread."""
        single = {one for state in self.states for one in _single(state.selector.maker).values()}
        meant = census.look(single)
        session = self._engine.books.sessions.get(RULES)
        marks = {} if session is None else dict(session.marks)
        named = {selector: {c.cookie for c in list(mark.conns)} for selector, mark in marks.items()}
        return [
            Verdict(
                socket,
                state,
                () if socket.cookie in named.get(state.selector, ()) else tuple(_failing(state, socket, meant)),
            )
            for socket in sockets[:VERDICTS_MAX]
            for state in self.states
        ]


def state_of(source: str, rule: RuleConfig) -> RuleState:
    """A rule with its names looked up on this host."""
    uid, problem = -1, ""
    if rule.user is not None:
        try:
            uid = int(rule.user) if rule.user.isdecimal() else pwd.getpwnam(rule.user).pw_uid
        except KeyError:
            problem = f"there is no user {rule.user!r} on this host"
    maker = Maker(
        pid=rule.pid or 0,
        executable=rule.executable or "",
        thread=rule.thread or "",
        cgroup=rule.cgroup or ("" if rule.unit is None else f"*/{rule.unit}"),
        uid=uid,
    )
    selector = RuleSelector(maker, rule.remote, rule.local_ports or PortRange(), rule.remote_ports or PortRange())
    due_in = INF if rule.deadline_ms is None else rule.deadline_ms / 1000
    return RuleState(rule.name, source, selector, Stage[rule.stage.upper()], rule.ordered, due_in, problem)


def cgroup_root(undo: contextlib.ExitStack) -> Path | None:
    """The root of cgroup v2, open until ``undo``; None: it can't be had, and no rule by cgroup names anything."""
    try:
        fd = open_root()
    except LoaderError as e:
        log.info("rules by cgroup and unit name nothing", reason=str(e))
        return None
    undo.callback(os.close, fd)
    return Path(f"/proc/self/fd/{fd}")


def _sees_programs() -> bool:
    """Those of all users. Capabilities are this thread's, which are the process's."""
    status = Path("/proc/thread-self/status").read_text(encoding="ascii", errors="replace")
    return bool((effective(status) or 0) >> CAP_SYS_PTRACE & 1)


def _single(maker: Maker) -> dict[str, Maker]:
    """Its conditions in words, each by itself, but for the user, which every socket tells."""
    given = {n: v for n in ("pid", "executable", "thread", "cgroup") if (v := getattr(maker, n))}
    return {f"{name} {value}": Maker(**{name: value}) for name, value in given.items()}


def _failing(state: RuleState, socket: Socket, meant: Mapping[Maker, Makers]) -> Sequence[str]:
    """Conditions of a rule that don't hold for a connection, in words."""
    if state.problem:
        return [state.problem]
    selector, e = state.selector, socket.endpoints
    out = []
    if selector.remote is not None and e.dst not in selector.remote:
        out.append(f"its peer {e.dst} is not in {selector.remote}")
    if e.dport not in selector.dport:
        out.append(f"its remote port {e.dport} is not {selector.dport}")
    if e.sport not in selector.sport:
        out.append(f"its local port {e.sport} is not {selector.sport}")
    uid = selector.maker.uid
    if uid >= 0 and socket.uid != uid:
        out.append(f"{'nobody knows its user' if socket.uid < 0 else f'its user is {socket.uid}'}; it must be {uid}")
    for words, one in _single(selector.maker).items():
        if not made(socket, one, meant[one]):
            who = f"thread {socket.tid} of process {socket.pid}" if socket.pid else "nobody knows who"
            out.append(f"{who} made it; {words} means others")
    return out
