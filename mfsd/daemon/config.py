# SPDX-License-Identifier: Apache-2.0
"""The daemon's configuration: a TOML file, checked as a whole before anything is touched.

The defaults below are the only ones; systemd/mfsd.toml is generated from them (``python -m mfsd.daemon.config``).
A faulty file gives one ConfigError that lists every problem as ``section.key = value: what is allowed``; the wording is
in config_text.py, the types of values are in config_values.py.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence  # noqa: TC003 - pydantic reads annotations
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from mfsd.daemon import config_files
from mfsd.daemon.bands_section import BandsConfig
from mfsd.daemon.config_rules import RuleConfig, RulesConfig
from mfsd.daemon.config_rules import problems as rule_problems
from mfsd.daemon.config_text import example, explain, key, render, shown, toml
from mfsd.daemon.config_values import (
    DeviceName,
    FilePath,
    FolderPath,
    GroupName,
    ListenAddress,
    ModeValue,
    NetworkValue,
    RateValue,
    SocketPath,
    UserName,
    loopback,
)
from mfsd.daemon.metrics_section import MetricsConfig, metrics_problems
from mfsd.daemon.network_section import NetworkConfig
from mfsd.datapath import _abi
from mfsd.engine.settings import LimitsConfig, RescueConfig, Section, TenantsConfig, as_tuple, setting
from mfsd.ground.bands import HTB_PRIOS, MAX_HTB_LEVELS
from mfsd.ground.model import Mode
from mfsd.ground.units import host_port
from mfsd.policy import registry
from mfsd.relay.settings import RelayConfig

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
A_RATE: Final = 'a rate above zero as tc writes it, e.g. "10gbit" or "950mbit"'
LOCK: Final = "mfsd.lock"
"""File in daemon.state_dir that the running daemon holds."""
MAX_DEVICES: Final = 64
MAX_PEERS: Final = 65_536
MAX_TEXT: Final = 100
MAX_PARAMETER: Final = 1e9
"""Of a policy's numbers, which may have no bounds of their own: more means nothing in any unit they have."""


class ConfigError(ValueError):
    """A configuration that can't be used; the text has one line per problem."""

    def __init__(self, problems: list[str], paths: Sequence[Path] = ()) -> None:
        """``paths``: the file of each problem, where there are files."""
        self.problems = problems
        self.lines = [f"{path}: {p}" for path, p in zip(paths, problems, strict=True)] if paths else problems
        """Problems with their files."""
        super().__init__("\n".join(self.lines))


class DaemonConfig(Section):
    """``[daemon]``: process, endpoints, clock."""

    socket: SocketPath = setting(
        Path("/run/mfsd/mfsd.sock"), "Unix socket of the gRPC API.", allowed="an absolute path of at most 104 bytes"
    )
    socket_group: GroupName | None = setting(
        None,
        "Group that may use the socket (mode 0660), to send hints. Unset: the daemon's own.",
        allowed="the name of a group",
    )
    operator_group: GroupName | None = setting(
        None,
        "Group whose members, if they are in the socket's, too, may use mfsctl: see everything, pause, restore. "
        "Besides root and the daemon's own user.",
        allowed="the name of a group",
    )
    trusted_users: Annotated[tuple[UserName, ...], BeforeValidator(as_tuple)] = setting(
        (), "Users who may hint anybody's connections, as root may; others hint their own.", allowed="names of users"
    )
    anonymous: bool = setting(
        False, "Believe hints of callers who have not said who they are, as if they were root: any local process."
    )
    listen: ListenAddress | None = setting(
        None,
        "Second endpoint, TCP: with the three tls keys for operators who have a certificate, without them for health "
        "checks (and, with daemon.anonymous, for hints).",
        allowed='"host:port" with a loopback address; others need the tls keys',
    )
    tls_cert: FilePath | None = setting(None, "Certificate of that endpoint, PEM.", allowed="an absolute path")
    tls_key: FilePath | None = setting(None, "Its private key, PEM.", allowed="an absolute path")
    tls_client_ca: FilePath | None = setting(
        None, "Who has signed its clients' certificates, PEM. They all are operators.", allowed="an absolute path"
    )
    state_dir: FolderPath = setting(
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
    tick_ms: float = setting(
        10.0, "Period of the engine while transfers are under way, or 20 ms if all can wait.", ge=1.0, le=1000.0
    )
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


class DeviceConfig(Section):
    """``[[device]]``: one network device to shape."""

    name: DeviceName = setting(
        ..., "The device.", allowed="the name of a network device: 1 to 15 characters, no '/' and no space"
    )
    backend: Literal["auto", "htb", "prio"] = setting(
        "auto",
        "Qdisc that enforces the bands. auto: htb when a rate is given and bands.levels is at most "
        f"{MAX_HTB_LEVELS}, else prio, which is ets where the kernel has that.",
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
        128,
        "Hinted packets other than TCP of at most so many bytes count as control, while their connection is above "
        "unhinted traffic; 0: none.",
        ge=0,
        le=1500,
    )


class PeerConfig(Section):
    """``[[peer]]``: links that are slower than ours, at the far end."""

    network: NetworkValue = setting(
        ..., "Addresses of the hosts behind such links.", allowed='a network, e.g. "10.1.2.0/24", or one address'
    )
    rate: RateValue = setting(
        ...,
        "What the link into each of these hosts carries: bounds of what can be in time use it. Else it is learnt.",
        allowed=A_RATE,
    )


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
    device: Annotated[tuple[DeviceConfig, ...], BeforeValidator(as_tuple)] = ()
    peer: Annotated[tuple[PeerConfig, ...], BeforeValidator(as_tuple)] = ()
    bands: BandsConfig = BandsConfig()
    policy: PolicyConfig = PolicyConfig()
    limits: LimitsConfig = LimitsConfig()
    rescue: RescueConfig = RescueConfig()
    network: NetworkConfig = NetworkConfig()
    tenants: TenantsConfig = TenantsConfig()
    rules: RulesConfig = RulesConfig()
    relay: RelayConfig = RelayConfig()
    rule: Annotated[tuple[RuleConfig, ...], BeforeValidator(as_tuple)] = ()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _together(self) -> Config:
        problems = [
            *_daemon_problems(self.daemon),
            *self.bands.problems(),
            *_device_problems(self),
            *_peer_problems(self),
        ]
        problems += [*_limit_problems(self.limits), *metrics_problems(self.metrics, self.daemon.socket)]
        problems += [*rule_problems(self.rule, self.rules.library), *self.relay.problems()]
        problems += [
            f"{name} = ({len(found)} sections): at most {most}"
            for name, found, most in (("device", self.device, MAX_DEVICES), ("peer", self.peer, MAX_PEERS))
            if len(found) > most
        ]
        if problems:
            raise ConfigError(problems)
        return self


# --- checks across keys -----------------------------------------------------------------------------------------------


def _daemon_problems(d: DaemonConfig) -> list[str]:
    out = []
    if d.socket in (d.state_dir, d.state_dir / LOCK) or d.socket in d.state_dir.parents:
        out.append(
            f"daemon.socket = {toml(d.socket)}: must be another file than daemon.state_dir ({toml(d.state_dir)}), those"
            f" above it, and {LOCK} in it"
        )
    tls = {"tls_cert": d.tls_cert, "tls_key": d.tls_key, "tls_client_ca": d.tls_client_ca}
    unset = [name for name, path in tls.items() if path is None]
    if unset and len(unset) < len(tls):
        out += [f"daemon.{name} = unset: must be set, as the other tls keys are" for name in unset]
    if d.listen is None and not unset:
        out.append("daemon.listen = unset: must be set, because the tls keys are for it")
    if d.listen is not None and unset and not loopback(host_port(d.listen)[0]):
        out.append(
            f"daemon.listen = {toml(d.listen)}: must be a loopback address; set daemon.tls_cert, tls_key and "
            "tls_client_ca to let other hosts in"
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


def _device_problems(c: Config) -> list[str]:
    out = []
    first: dict[str, int] = {}
    for i, device in enumerate(c.device):
        if first.setdefault(device.name, i) != i:
            out.append(f"device[{i}].name = {toml(device.name)}: each device once; device[{first[device.name]}]"
                       " has this name")  # fmt: skip
        if device.backend == "htb" and c.bands.levels > MAX_HTB_LEVELS:
            out.append(f"bands.levels = {c.bands.levels}: at most {MAX_HTB_LEVELS} with backend htb (device[{i}]),"
                       f" which has {HTB_PRIOS} priorities")  # fmt: skip
    return out


def _peer_problems(c: Config) -> list[str]:
    first: dict[object, int] = {}
    return [
        f"peer[{i}].network = {toml(str(peer.network))}: each network once; peer[{first[peer.network]}] has this one"
        for i, peer in enumerate(c.peer)
        if first.setdefault(peer.network, i) != i
    ]


def _limit_problems(limits: LimitsConfig) -> list[str]:
    out = []
    if limits.default_ttl_s > limits.max_ttl_s:
        out.append(f"limits.default_ttl_s = {toml(limits.default_ttl_s)}: at most limits.max_ttl_s"
                   f" ({limits.max_ttl_s:g})")  # fmt: skip
    if limits.min_deadline_ms > limits.max_deadline_s * 1000:
        out.append(f"limits.min_deadline_ms = {toml(limits.min_deadline_ms)}: at most limits.max_deadline_s"
                   f" ({limits.max_deadline_s:g} s)")  # fmt: skip
    if limits.min_defer_ms > limits.max_defer_s * 1000:
        out.append(f"limits.min_defer_ms = {toml(limits.min_defer_ms)}: at most limits.max_defer_s"
                   f" ({limits.max_defer_s:g} s)")  # fmt: skip
    return out


def _policy_problems(c: Config) -> list[str]:
    where = {"policy": "policy.name", "levels": "bands.levels"}
    odd = {name: value for name, value in c.policy.params.items() if not _plain(value)}
    return [
        f"policy.{key(name)} = {shown(value)}: must be true, false, a text, or a number of at most {MAX_PARAMETER:g}"
        for name, value in odd.items()
    ] + [
        str(replace(p, field=f"policy.{key(p.field)}" if p.parameter else where[p.field], value=_short(p.value)))
        for p in registry.problems(
            c.policy.name, c.bands.levels, {n: v for n, v in c.policy.params.items() if n not in odd}
        )
    ]


def _short(value: Any) -> Any:
    return value[:MAX_TEXT] if isinstance(value, str) else value


def _plain(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    # Written so that a NaN fails, and an integer of any length does not.
    return isinstance(value, bool | int | float) and -MAX_PARAMETER <= value <= MAX_PARAMETER


# --- reading ----------------------------------------------------------------------------------------------------------


def load(path: Path, *, again: bool = False) -> Config:
    """Read and check a file and its drop-ins. Raises ConfigError with every problem that can be found in one go.

    ``again``: in a daemon that runs; then files that say nothing are refused, too.
    """
    try:
        merged = config_files.read(path, again=again)
    except config_files.UnreadableError as e:
        raise ConfigError([e.problem], [e.path]) from e
    if again and not merged.data:
        raise ConfigError(
            ["says nothing: is it being written? All defaults, which only observe, need a restart"], [path]
        )
    try:
        return parse(merged.data)
    except ConfigError as e:
        placed = [merged.place(p) for p in e.problems]
        raise ConfigError([p for _, p in placed], [file or path for file, _ in placed]) from None


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
