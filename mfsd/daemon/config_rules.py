# SPDX-License-Identifier: Apache-2.0
"""``[[rule]]`` and ``[rules]``: stages for connections of programs that send no hints."""

from __future__ import annotations

import tomllib
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, InstanceOf, ValidationError, field_validator

from mfsd.daemon.config_text import explain, toml
from mfsd.daemon.config_values import NetworkValue  # noqa: TC001 - pydantic reads annotations
from mfsd.engine.settings import Section, as_tuple, setting
from mfsd.ground.model import PID_MAX, PORT_MAX, PortRange

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

COMM_MAX: Final = 15
"""Bytes of a thread's name (TASK_COMM_LEN without its 0, include/linux/sched.h)."""
UID_MAX: Final = 2**32 - 2
"""-1 is nobody's number; in the kernel's rules it means anybody."""
PORTS: Final = 'a port, or a range such as "15000-17000"'
CONDITIONS: Final = (
    "remote", "remote_ports", "local_ports", "pid", "executable", "thread", "cgroup", "unit", "user"
)  # fmt: skip


def _ports(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | str):
        return value
    first, dash, last = str(value).partition("-")
    if not (first.isdecimal() and first.isascii() and (last.isdecimal() and last.isascii() if dash else True)):
        raise ValueError("no ports")
    ports = PortRange(int(first), int(last or first))
    if not 0 < ports.first <= ports.last <= PORT_MAX:
        raise ValueError("no ports")
    return ports


PortsValue = Annotated[InstanceOf[PortRange], BeforeValidator(_ports)]


class RuleConfig(Section):
    """``[[rule]]``: connections that belong to a stage although nobody announces what is sent on them."""

    name: str = setting(..., "What it is called in `mfsctl rules`.", allowed="a text of 1 to 64 characters, each once")
    stage: Literal["kv_reuse", "collective", "p2d", "background"] = setting(
        ..., "What they carry: stage 1, 2, 3 of serving, or what nobody waits for."
    )
    ordered: bool = setting(
        True, "false: transfers that are announced on them are written in turns (as by Mooncake), and advance together."
    )
    deadline_ms: float | None = setting(
        None,
        "Their bytes rank as if due in so long. Unset: as the policy ranks the stage without a deadline.",
        allowed="a number of milliseconds above 0, at most 600000",
        gt=0,
        le=600_000,
    )
    remote: NetworkValue | None = setting(
        None, "Peers. All conditions that are given must hold.", allowed='a network, e.g. "10.1.2.0/24", or one address'
    )
    remote_ports: PortsValue | None = setting(None, "Peer's ports.", allowed=PORTS)
    local_ports: PortsValue | None = setting(None, "Ports here, such as a server's.", allowed=PORTS)
    pid: int | None = setting(
        None, "A process, and its descendants.", allowed=f"a whole number from 1, at most {PID_MAX}", ge=1, le=PID_MAX
    )
    executable: str | None = setting(
        None, "Pattern of the program's file; without a slash of its last part.", allowed='a pattern, e.g. "redis-*"'
    )
    thread: str | None = setting(
        None,
        "Pattern of the name of the thread that makes the socket.",
        allowed=f'a pattern of at most {COMM_MAX} bytes, e.g. "NCCL*"',
    )
    cgroup: str | None = setting(
        None,
        "Pattern of a cgroup's path from the root of cgroup v2, with all below it.",
        allowed='a pattern that begins with a slash, e.g. "/kubepods.slice/*"',
    )
    unit: str | None = setting(
        None, "A systemd unit, whatever slice it is in.", allowed='the name of a unit, e.g. "vllm.service"'
    )
    user: str | None = setting(None, "Owner of the process.", allowed="the name of a user, or a number in quotes")

    @field_validator("name")
    @classmethod
    def _name_fits(cls, value: str) -> str:
        if not 0 < len(value.strip()) <= 64 or not value.isprintable():
            raise ValueError("bad name")
        return value

    @field_validator("executable", "user", "unit", "cgroup", "thread")
    @classmethod
    def _text(cls, value: str | None) -> str | None:
        if value is not None and (not value or not value.isprintable()):
            raise ValueError("empty, or not printable")
        return value

    @field_validator("cgroup")
    @classmethod
    def _path(cls, value: str | None) -> str | None:
        if value is not None and (not value.startswith("/") or (value.endswith("/") and len(value) > 1)):
            raise ValueError("no path")
        return value

    @field_validator("unit")
    @classmethod
    def _unit(cls, value: str | None) -> str | None:
        if value is not None and ("/" in value or "." not in value):
            raise ValueError("no unit")
        return value

    @field_validator("user")
    @classmethod
    def _user(cls, value: str | None) -> str | None:
        number = value if value is not None and value.isdecimal() else "0"
        if not number.isascii() or len(number) > len(str(UID_MAX)) or int(number) > UID_MAX:
            raise ValueError("no user")
        return value

    @field_validator("thread")
    @classmethod
    def _thread(cls, value: str | None) -> str | None:
        if value is not None and len(value.encode()) > COMM_MAX:
            raise ValueError("longer than a thread's name can be")
        return value


class RulesConfig(Section):
    """``[rules]``: rules that mfsd ships."""

    library: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = setting(
        (), "Shipped rules that are in force, by name: `mfsctl rules --library` lists them."
    )


class RulesError(ValueError):
    """Rules that can't be used; ``problems`` has one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class _File(Section):
    """What a shipped file holds."""

    rule: Annotated[tuple[RuleConfig, ...], BeforeValidator(as_tuple)] = Field(min_length=1)


def shipped() -> dict[str, Traversable]:
    """Files of shipped rules by name."""
    folder = resources.files("mfsd.daemon") / "library"
    files = {f.name.removesuffix(".toml"): f for f in folder.iterdir() if f.name.endswith(".toml")}
    return dict(sorted(files.items()))


def of_library(name: str) -> tuple[RuleConfig, ...]:
    """The rules of a shipped file. Raises KeyError for a name that there is not, RulesError for a faulty file."""
    try:
        return _File.model_validate(tomllib.loads(shipped()[name].read_text(encoding="utf-8"))).rule
    except ValidationError as e:
        raise RulesError(explain(e, _File)) from None


def problems(own: tuple[RuleConfig, ...], library: tuple[str, ...]) -> list[str]:
    """What is wrong with rules taken together."""
    out = []
    files = shipped()
    for i, name in enumerate(library):
        if name not in files:
            out.append(f"rules.library = {toml(library)}: there is no {toml(name)}; shipped: {', '.join(files)}")
        elif name in library[:i]:
            out.append(f"rules.library = {toml(library)}: {toml(name)} stands there twice")
    seen: dict[str, str] = {}
    same: dict[tuple[Any, ...], str] = {}
    for i, rule in enumerate(own):
        where = f"rule[{i}]"
        if rule.unit is not None and rule.cgroup is not None:
            out.append(f"{where}.unit = {toml(rule.unit)}: give unit or cgroup, not both: a unit is a cgroup")
        if all(getattr(rule, c) is None for c in CONDITIONS):
            out.append(f"{where}: names no connection; give one of {', '.join(CONDITIONS)}")
        if rule.name in seen:
            out.append(f"{where}.name = {toml(rule.name)}: each name once; {seen[rule.name]} has it")
        conditions = tuple(getattr(rule, c) for c in CONDITIONS)
        if conditions in same:
            out.append(f"{where}: has the same conditions as {same[conditions]}; leave one of them out")
        seen.setdefault(rule.name, where)
        same.setdefault(conditions, where)
    return out


def in_force(own: tuple[RuleConfig, ...], library: tuple[str, ...]) -> list[tuple[str, RuleConfig]]:
    """All rules with where they come from: the configuration's own first."""
    return [("configuration", r) for r in own] + [(f"library {n}", r) for n in library for r in of_library(n)]
