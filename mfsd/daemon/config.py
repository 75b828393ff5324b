# SPDX-License-Identifier: Apache-2.0
"""The daemon's configuration: a TOML file, checked as a whole before anything is touched.

The defaults below are the only ones; systemd/mfsd.toml is generated from them (``python -m mfsd.daemon.config_text``).
A
faulty file gives one ConfigError that lists every problem as ``section.key = value: what is allowed``; the wording is
in config_text.py.
"""

from __future__ import annotations

import ipaddress
import os
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

from mfsd.bands import CONTROL_FLOOR, DEFAULT_FLOOR, HTB_PRIOS, MAX_FLOORS, MAX_HTB_LEVELS, MAX_LEVELS, band_names
from mfsd.daemon.config_text import explain, key, render, toml
from mfsd.datapath import _abi
from mfsd.model import Mode
from mfsd.policy import registry
from mfsd.units import Rate

__all__ = [
    "BandsConfig",
    "Config",
    "ConfigError",
    "DaemonConfig",
    "DeviceConfig",
    "LimitsConfig",
    "PeerConfig",
    "PolicyConfig",
    "RescueConfig",
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


def _f(default: Any, doc: str, *, allowed: str | None = None, **constraints: Any) -> Any:
    """A field with what it means (``doc``) and, where the type does not say it, what is allowed."""
    extra: dict[str, Any] | None = {"allowed": allowed} if allowed else None
    return Field(default, description=doc, json_schema_extra=extra, **constraints)


class _Section(BaseModel):
    # strict: in TOML a number in quotes or a bool for a number is a mistake, not something to convert silently.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DaemonConfig(_Section):
    """``[daemon]``: process, endpoints, clock."""

    socket: AbsolutePath = _f(
        Path("/run/mfsd/mfsd.sock"), "Unix socket of the gRPC API.", allowed="an absolute path of at most 107 bytes"
    )
    socket_group: str | None = _f(
        None, "Group that may use the socket (mode 0660). Unset: the daemon's own.", allowed="the name of a group"
    )
    listen: str | None = _f(
        None,
        "Second endpoint, plain TCP without authentication.",
        allowed='"host:port" with a loopback address; others need daemon.listen_remote = true',
    )
    listen_remote: bool = _f(False, "Lets listen name an address that other hosts reach. They all become operators.")
    state_dir: AbsolutePath = _f(
        Path("/run/mfsd"), "Snapshots of the qdiscs that were found, and the lock file.", allowed="an absolute path"
    )
    mode: ModeValue = _f(
        Mode.OBSERVE,
        "observe: classify, count and predict. enforce: also steer and install qdiscs.",
        allowed='"observe" or "enforce"',
    )
    loader: Literal["auto", "libbpf", "bcc"] = _f("auto", "How the classifier gets into the kernel.")
    attach: Literal["auto", "tcx", "clsact"] = _f("auto", "Hook of the classifier; auto: tcx where the kernel has it.")
    slots: int = _f(_abi.DEFAULT_SLOTS, "Rows of the flow table: hinted connections at a time.", ge=16, le=1 << 20)
    tick_ms: float = _f(10.0, "Period of the engine while transfers are under way.", ge=1.0, le=1000.0)
    idle_tick_ms: float = _f(100.0, "Period of the engine while there are none.", ge=1.0, le=10_000.0)
    heartbeat_ms: float = _f(100.0, "Longest time between two signs of life for the classifier.", ge=1.0, le=10_000.0)
    heartbeat_timeout_ms: float = _f(
        1000.0, "Without a sign of life for so long, the classifier leaves all packets alone.", ge=50.0, le=60_000.0
    )
    on_exit: Literal["restore", "keep"] = _f("restore", "What becomes of the qdiscs on SIGTERM and SIGINT.")
    log_format: Literal["console", "json"] = _f("console", "One line for people, or one JSON object, per event.")
    log_level: Literal["debug", "info", "warning", "error"] = _f("info", "Least severe events to log.")

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


class DeviceConfig(_Section):
    """``[[device]]``: one network device to shape."""

    name: str = _f(..., "The device.", allowed="the name of a network device: 1 to 15 characters, no '/' and no space")
    backend: Literal["auto", "htb", "prio"] = _f(
        "auto", "Qdisc that enforces the bands. auto: htb when a rate is given, else prio."
    )
    rate: RateValue | None = _f(
        None,
        "What the device may send; just below the bottleneck, so that the queue is here. Unset: htb takes 98 % of the "
        "link speed, prio sends at line rate.",
        allowed=A_RATE,
    )
    overwrite_foreign: bool = _f(False, "Also steer packets whose priority names a class of somebody else's qdisc.")
    control_unhinted: bool = _f(False, "Pure ACKs of unhinted TCP connections go to the control band, too.")
    tiny_len: int = _f(
        128, "Hinted packets other than TCP of at most so many bytes count as control; 0: none.", ge=0, le=1500
    )

    @field_validator("name")
    @classmethod
    def _device_name(cls, value: str) -> str:
        if not 0 < len(os.fsencode(value)) < IFNAMSIZ or "/" in value or any(c.isspace() for c in value):
            raise ValueError("bad name")
        return value


class PeerConfig(_Section):
    """``[[peer]]``: links that are slower than ours, at the far end."""

    network: NetworkValue = _f(
        ..., "Addresses of the hosts behind such links.", allowed='a network, e.g. "10.1.2.0/24", or one address'
    )
    rate: RateValue = _f(
        ...,
        "What the link into each of these hosts carries: bounds of what can be in time use it.",
        allowed=A_RATE,
    )


class BandsConfig(_Section):
    """``[bands]``: the strict-priority bands, the same on every device."""

    levels: int = _f(
        5,
        f"Bands for hinted traffic, besides control, default and scavenger. htb takes at most {MAX_HTB_LEVELS}.",
        ge=1,
        le=MAX_LEVELS,
    )
    lanes: int = _f(32, "Leaf queues per band: a rescue purges only the packets of one lane.", ge=1, le=MAX_LANES)
    control_floor: Share = _f(CONTROL_FLOOR, "Share of the link that control packets always get.")
    default_floor: Share = _f(DEFAULT_FLOOR, "Share of the link that unhinted traffic always gets.")
    floors: Annotated[tuple[Share, ...], BeforeValidator(_tuple)] = _f(
        (), "Share that each level always gets, most urgent first; none where it is short."
    )
    scavenger_floor: Share = _f(0.0, "Share of the link that pruned and doomed requests always get.")
    dscp: dict[str, Dscp] = _f({}, 'DSCP to write by band name, e.g. { "level 0" = 46 }; others are left alone.')

    @property
    def names(self) -> list[str]:
        """Names of all bands that a DSCP may be given for."""
        return band_names(self.levels)


class PolicyConfig(BaseModel):
    """``[policy]``: the policy by name; every other key is a parameter of it."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str = _f("deadline-ladder", "Scheduling policy; other keys of this section are its parameters.")

    @property
    def params(self) -> dict[str, float | int | bool | str]:
        """Parameters by name, as written."""
        return dict(self.__pydantic_extra__ or {})


class LimitsConfig(_Section):
    """``[limits]``: how far hints are believed, and how much one client may ask."""

    max_hints_per_batch: int = _f(1024, "Hints in one message.", ge=1, le=65_536)
    max_requests_per_batch: int = _f(1024, "Members of one batch of requests.", ge=1, le=65_536)
    max_deadline_s: float = _f(600.0, "Deadlines further away (or longer past) than this are refused.", gt=0, le=86_400)
    min_deadline_ms: float = _f(1.0, "Nearer deadlines are moved to this one.", ge=0, le=60_000)
    default_ttl_s: float = _f(30.0, "Life of a hint that names none.", gt=0, le=86_400)
    max_ttl_s: float = _f(600.0, "Longer lives are cut to this one.", gt=0, le=86_400)
    max_transfer_bytes: int = _f(1 << 40, "Size of one transfer.", ge=1, le=1 << 50)
    max_layers: int = _f(4096, "Layers of a model.", ge=1, le=1 << 20)
    max_id_bytes: int = _f(256, "Length of an identifier in UTF-8.", ge=1, le=4096)
    max_sessions: int = _f(256, "Client processes at a time.", ge=1, le=65_536)
    max_requests_per_session: int = _f(16_384, "Requests of one session at a time.", ge=1, le=1 << 20)
    max_batches_per_session: int = _f(4096, "Batches of one session at a time.", ge=1, le=1 << 20)
    max_transfers_per_session: int = _f(65_536, "Unfinished transfers of one session.", ge=1, le=1 << 22)
    max_marks_per_session: int = _f(1024, "Connection marks of one session.", ge=1, le=65_536)


class RescueConfig(_Section):
    """``[rescue]``: promotions that take effect although packets sit in a starved queue."""

    enabled: bool = _f(True, "Purge the old queue of a promoted TCP connection that does not move.")
    stall_ms: float = _f(2.0, "A promoted connection that has sent nothing for so long is rescued.", ge=0, le=1000)
    max_per_s: int = _f(
        200, "Rescues per device and second; further promotions wait for their queues.", ge=1, le=10_000
    )


class Config(_Section):
    """The whole file."""

    daemon: DaemonConfig = DaemonConfig()
    device: Annotated[tuple[DeviceConfig, ...], BeforeValidator(_tuple)] = ()
    peer: Annotated[tuple[PeerConfig, ...], BeforeValidator(_tuple)] = ()
    bands: BandsConfig = BandsConfig()
    policy: PolicyConfig = PolicyConfig()
    limits: LimitsConfig = LimitsConfig()
    rescue: RescueConfig = RescueConfig()

    @model_validator(mode="after")
    def _together(self) -> Config:
        problems = [*_daemon_problems(self.daemon), *_band_problems(self), *_limit_problems(self.limits)]
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
    total = b.control_floor + b.default_floor + b.scavenger_floor + sum(b.floors)
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
