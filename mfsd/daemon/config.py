# SPDX-License-Identifier: Apache-2.0
"""The daemon's configuration: a TOML file, checked as a whole before anything is touched.

The defaults below are the only ones; systemd/mfsd.toml is generated from them (``python -m mfsd.daemon.config``).
A
faulty file gives one ConfigError that lists every problem as ``section.key = value: what is allowed``; the wording is
in config_text.py.
"""

from __future__ import annotations

import ipaddress
import os
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from mfsd.bands import (
    BACKGROUND_FLOOR,
    CONTROL_FLOOR,
    DEFAULT_FLOOR,
    HTB_PRIOS,
    LEVEL_FLOOR,
    MAX_FLOORS,
    MAX_HTB_LEVELS,
    MAX_LEVELS,
    SCAVENGER_FLOOR,
    band_names,
    fill_floors,
)
from mfsd.daemon.config_rules import RuleConfig, RulesConfig
from mfsd.daemon.config_rules import problems as rule_problems
from mfsd.daemon.config_text import example, explain, key, render, toml
from mfsd.datapath import _abi
from mfsd.engine.settings import LimitsConfig, RescueConfig, Section, setting
from mfsd.model import Mode
from mfsd.policy import registry
from mfsd.relay.settings import RelayConfig
from mfsd.units import Rate

__all__ = [
    "BandsConfig",
    "Config",
    "ConfigError",
    "DaemonConfig",
    "DeviceConfig",
    "PeerConfig",
    "PolicyConfig",
    "RuleConfig",
    "load",
    "parse",
    "render",
]

DEFAULT_PATH: Final = Path("/etc/mfsd/mfsd.toml")
IFNAMSIZ: Final = 16
"""Length of a device name, the final 0 included (include/uapi/linux/if.h)."""
A_RATE: Final = 'a rate above zero as tc writes it, e.g. "10gbit" or "950mbit"'
MAX_LANES: Final = 256
"""Minors of a band: its classids are 0xBBLL with band BB and lane LL."""


class ConfigError(ValueError):
    """A configuration that can't be used; the text has one line per problem."""

    def __init__(self, problems: list[str], path: Path | None = None) -> None:
        super().__init__("\n".join(f"{path}: {p}" if path else p for p in problems))
        self.problems = problems


def _rate(value: Any) -> Any:
    return Rate.parse(value) if isinstance(value, str) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _path(value: Any) -> Any:
    if isinstance(value, str):
        value = Path(value)
    if isinstance(value, Path) and not value.is_absolute():
        raise ValueError("relative")
    return value


def _mode(value: Any) -> Any:
    return Mode(value) if isinstance(value, str) and value in set(Mode) else value


def _network(value: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    if not isinstance(value, str):  # ip_network takes numbers, too
        raise ValueError("not a text")  # noqa: TRY004 - pydantic wants this one
    return ipaddress.ip_network(value)


RateValue = Annotated[InstanceOf[Rate], BeforeValidator(_rate)]
NetworkValue = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, PlainValidator(_network)]
AbsolutePath = Annotated[InstanceOf[Path], BeforeValidator(_path)]
ModeValue = Annotated[InstanceOf[Mode], BeforeValidator(_mode)]
Share = Annotated[float, Field(ge=0.0, le=MAX_FLOORS)]
Dscp = Annotated[int, Field(ge=0, le=63)]


class DaemonConfig(Section):
    """``[daemon]``: process, endpoints, clock."""

    socket: AbsolutePath = setting(
        Path("/run/mfsd/mfsd.sock"), "Unix socket of the gRPC API.", allowed="an absolute path of at most 107 bytes"
    )
    socket_group: str | None = setting(
        None, "Group that may use the socket (mode 0660). Unset: the daemon's own.", allowed="the name of a group"
    )
    listen: str | None = setting(
        None,
        "Second endpoint, plain TCP without authentication.",
        allowed='"host:port" with a loopback address; others need daemon.listen_remote = true',
    )
    listen_remote: bool = setting(
        False, "Lets listen name an address that other hosts reach. They all become operators."
    )
    state_dir: AbsolutePath = setting(
        Path("/run/mfsd"), "Snapshots of the qdiscs that were found, and the lock file.", allowed="an absolute path"
    )
    mode: ModeValue = setting(
        Mode.OBSERVE,
        "observe: classify, count and predict. enforce: also steer and install qdiscs.",
        allowed='"observe" or "enforce"',
    )
    loader: Literal["auto", "libbpf", "bcc"] = setting("auto", "How the classifier gets into the kernel.")
    sockets: Literal["auto", "kernel", "listing"] = setting(
        "auto",
        "How connections become known. kernel: it tells of them (programs on the root of cgroup v2). listing: they are "
        "listed again and again. auto: kernel where it can.",
    )
    attach: Literal["auto", "tcx", "clsact"] = setting(
        "auto", "Hook of the classifier; auto: tcx where the kernel has it."
    )
    slots: int = setting(_abi.DEFAULT_SLOTS, "Rows of the flow table: hinted connections at a time.", ge=16, le=1 << 20)
    tick_ms: float = setting(10.0, "Period of the engine while transfers are under way.", ge=1.0, le=1000.0)
    idle_tick_ms: float = setting(100.0, "Period of the engine while there are none.", ge=1.0, le=10_000.0)
    heartbeat_ms: float = setting(
        100.0, "Longest time between two signs of life for the classifier.", ge=1.0, le=10_000.0
    )
    heartbeat_timeout_ms: float = setting(
        1000.0, "Without a sign of life for so long, the classifier leaves all packets alone.", ge=50.0, le=60_000.0
    )
    on_exit: Literal["restore", "keep"] = setting("restore", "What becomes of the qdiscs on SIGTERM and SIGINT.")
    log_format: Literal["console", "json"] = setting("console", "One line for people, or one JSON object, per event.")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe events to log.")

    @field_validator("socket")
    @classmethod
    def _socket_fits(cls, value: Path) -> Path:
        if len(os.fsencode(value)) > 107:  # sun_path is 108 bytes with its final 0 (unix(7))
            raise ValueError("too long")
        return value

    @field_validator("listen")
    @classmethod
    def _listen_address(cls, value: str | None) -> str | None:
        if value is not None:
            _host_port(value)
        return value


class DeviceConfig(Section):
    """``[[device]]``: one network device to shape."""

    name: str = setting(
        ..., "The device.", allowed="the name of a network device: 1 to 15 characters, no '/' and no space"
    )
    backend: Literal["auto", "htb", "prio"] = setting(
        "auto", "Qdisc that enforces the bands. auto: htb when a rate is given, else prio."
    )
    rate: RateValue | None = setting(
        None,
        "What the device may send; just below the bottleneck, so that the queue is here. Unset: htb takes 98 % of the "
        "link speed, prio sends at line rate.",
        allowed=A_RATE,
    )
    overwrite_foreign: bool = setting(
        False, "Also steer packets whose priority names a class of somebody else's qdisc."
    )
    control_unhinted: bool = setting(False, "Pure ACKs of unhinted TCP connections go to the control band, too.")
    tiny_len: int = setting(
        128, "Hinted packets other than TCP of at most so many bytes count as control; 0: none.", ge=0, le=1500
    )

    @field_validator("name")
    @classmethod
    def _device_name(cls, value: str) -> str:
        if not 0 < len(os.fsencode(value)) < IFNAMSIZ or "/" in value or any(c.isspace() for c in value):
            raise ValueError("bad name")
        return value


class PeerConfig(Section):
    """``[[peer]]``: links that are slower than ours, at the far end."""

    network: NetworkValue = setting(
        ..., "Addresses of the hosts behind such links.", allowed='a network, e.g. "10.1.2.0/24", or one address'
    )
    rate: RateValue = setting(
        ...,
        "What the link into each of these hosts carries: bounds of what can be in time use it.",
        allowed=A_RATE,
    )


class BandsConfig(Section):
    """``[bands]``: the strict-priority bands, the same on every device."""

    levels: int = setting(
        5,
        "Bands for hinted traffic, besides control, default, background and scavenger. htb takes at most "
        f"{MAX_HTB_LEVELS}.",
        ge=1,
        le=MAX_LEVELS,
    )
    lanes: int = setting(32, "Leaf queues per band: a rescue purges only the packets of one lane.", ge=1, le=MAX_LANES)
    control_floor: Share = setting(CONTROL_FLOOR, "Share of the link that control packets always get.")
    default_floor: Share = setting(DEFAULT_FLOOR, "Share of the link that unhinted traffic always gets.")
    floors: Annotated[tuple[Share, ...], BeforeValidator(_tuple)] = setting(
        (), f"Share that each level always gets, most urgent first; {LEVEL_FLOOR:g} where it is short."
    )
    background_floor: Share = setting(
        BACKGROUND_FLOOR, "Share of the link that background traffic (stores, offload, prefetch, weights) always gets."
    )
    scavenger_floor: Share = setting(SCAVENGER_FLOOR, "Share of the link that pruned and doomed requests always get.")
    dscp: dict[str, Dscp] = setting({}, 'DSCP to write by band name, e.g. { "level 0" = 46 }; others are left alone.')

    @property
    def names(self) -> list[str]:
        """Names of all bands that a DSCP may be given for."""
        return band_names(self.levels)


class PolicyConfig(BaseModel):
    """``[policy]``: the policy by name; every other key is a parameter of it."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str = setting(registry.DEFAULT, "Scheduling policy; other keys of this section are its parameters.")

    @property
    def params(self) -> dict[str, float | int | bool | str]:
        """Parameters by name, as written."""
        return dict(self.__pydantic_extra__ or {})


class Config(Section):
    """The whole file."""

    daemon: DaemonConfig = DaemonConfig()
    device: Annotated[tuple[DeviceConfig, ...], BeforeValidator(_tuple)] = ()
    peer: Annotated[tuple[PeerConfig, ...], BeforeValidator(_tuple)] = ()
    bands: BandsConfig = BandsConfig()
    policy: PolicyConfig = PolicyConfig()
    limits: LimitsConfig = LimitsConfig()
    rescue: RescueConfig = RescueConfig()
    rules: RulesConfig = RulesConfig()
    relay: RelayConfig = RelayConfig()
    rule: Annotated[tuple[RuleConfig, ...], BeforeValidator(_tuple)] = ()

    @model_validator(mode="after")
    def _together(self) -> Config:
        problems = [*_daemon_problems(self.daemon), *_band_problems(self), *_limit_problems(self.limits)]
        problems += [*rule_problems(self.rule, self.rules.library), *self.relay.problems()]
        if problems:
            raise ConfigError(problems)
        return self


# --- checks across keys -----------------------------------------------------------------------------------------------


def _host_port(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError("not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _daemon_problems(d: DaemonConfig) -> list[str]:
    out = []
    if d.listen is not None and not d.listen_remote and not _loopback(_host_port(d.listen)[0]):
        out.append(
            f"daemon.listen = {toml(d.listen)}: must be a loopback address; "
            "set daemon.listen_remote = true to let other hosts in (there is no authentication)"
        )
    if d.idle_tick_ms < d.tick_ms:
        out.append(f"daemon.idle_tick_ms = {toml(d.idle_tick_ms)}: must be at least daemon.tick_ms ({d.tick_ms:g})")
    beat = max(d.heartbeat_ms, d.tick_ms)
    if d.heartbeat_timeout_ms < 3 * beat:
        out.append(
            f"daemon.heartbeat_timeout_ms = {toml(d.heartbeat_timeout_ms)}: must be at least three heartbeats "
            f"({3 * beat:g}), or one late tick sends all traffic to the default band"
        )
    return out


def _band_problems(c: Config) -> list[str]:
    b = c.bands
    out = [
        f"bands.dscp.{key(name)} = {dscp}: no such band; allowed: {', '.join(b.names)}"
        for name, dscp in b.dscp.items()
        if name not in b.names
    ]
    if len(b.floors) > b.levels:
        out.append(f"bands.floors = {toml(b.floors)}: at most one per level (bands.levels = {b.levels})")
    total = b.control_floor + b.default_floor + b.background_floor + b.scavenger_floor
    total += sum(fill_floors(b.floors, b.levels))
    if total > MAX_FLOORS:
        out.append(
            f"bands.floors = {toml(b.floors)}: all floors together are {total:.2f} of the link; at most {MAX_FLOORS}"
        )
    names = [d.name for d in c.device]
    for i, device in enumerate(c.device):
        if device.name in names[:i]:
            out.append(f"device[{i}].name = {toml(device.name)}: each device once; device[{names.index(device.name)}]"
                       " has this name")  # fmt: skip
        if device.backend == "htb" and b.levels > MAX_HTB_LEVELS:
            out.append(f"bands.levels = {b.levels}: at most {MAX_HTB_LEVELS} with backend htb (device[{i}]),"
                       f" which has {HTB_PRIOS} priorities")  # fmt: skip
    return out


def _limit_problems(limits: LimitsConfig) -> list[str]:
    out = []
    if limits.default_ttl_s > limits.max_ttl_s:
        out.append(f"limits.default_ttl_s = {toml(limits.default_ttl_s)}: at most limits.max_ttl_s"
                   f" ({limits.max_ttl_s:g})")  # fmt: skip
    if limits.min_deadline_ms > limits.max_deadline_s * 1000:
        out.append(f"limits.min_deadline_ms = {toml(limits.min_deadline_ms)}: at most limits.max_deadline_s"
                   f" ({limits.max_deadline_s:g} s)")  # fmt: skip
    return out


def _policy_problems(c: Config) -> list[str]:
    where = {"policy": "policy.name", "levels": "bands.levels"}
    return [
        str(replace(p, field=f"policy.{p.field}" if p.parameter else where[p.field]))
        for p in registry.problems(c.policy.name, c.bands.levels, c.policy.params)
    ]


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: Path) -> Config:
    """Read and check a file. Raises ConfigError with every problem that can be found in one go."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError([f"can't be read: {e.strerror}"], path) from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError([f"is not TOML: {e}"], path) from e
    try:
        return parse(data)
    except ConfigError as e:
        raise ConfigError(e.problems, path) from None


def parse(data: dict[str, Any]) -> Config:
    """Check what a TOML file says. Raises ConfigError."""
    try:
        config = Config.model_validate(data)
    except ValidationError as e:
        raise ConfigError(explain(e, Config)) from None
    problems = _policy_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


if __name__ == "__main__":
    sys.stdout.write(example(Config))
