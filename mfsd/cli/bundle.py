# SPDX-License-Identifier: Apache-2.0
"""``mfsctl support-bundle``: what whoever helps needs to know, in one file without secrets.

What goes in is listed here; nothing is copied that is not. Names of requests, transfers and sessions are replaced, and
addresses, too, each by the same word everywhere, so that it can still be told what belongs together.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import tarfile
import time
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from mfsd import __version__, doctor
from mfsd.cli import output
from mfsd.cli.app import Globals, command
from mfsd.cli.connect import TIMEOUT_S, control
from mfsd.cli.errors import CliError
from mfsd.cli.offline import read_config, shown_config
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable

    from mfsd.v1 import control_pb2_grpc

ROWS: Final = 200
"""Connections and transfers."""
LOG_LINES: Final = 2000
LOG_S: Final = 20.0
"""For journalctl."""
NAMES: Final = ("id", "session", "request_id", "batch_id", "transfer_id")
"""Fields whose values workers have chosen."""
V4: Final = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)")
V6: Final = re.compile(r"(?<![\w:.])(?=[0-9a-fA-F:]*:[0-9a-fA-F:]*:)[0-9a-fA-F:]{2,39}(?:\.\d+)*(?![\w:])")
MAC: Final = re.compile(r"\b(?:[0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}\b")
SECRET: Final = re.compile(
    r"(?i)\b([\w-]*(?:password|passwd|secret|token|api[_-]?key|credential|authorization|bearer)[\w-]*)(\s*[=:]\s*|\s+)"
    r"(\"[^\"]*\"|'[^']*'|\S+)"
)
PEM: Final = re.compile(r"-----BEGIN [^-]+-----.*?-----END [^-]+-----", re.DOTALL)


@dataclass(slots=True)
class Redaction:
    """Replaces what must not be told; the same thing by the same word."""

    host: str = ""
    _known: dict[tuple[str, str], str] = field(default_factory=dict)

    def word(self, kind: str, value: str) -> str:
        """A word for it."""
        key = kind, value
        if key not in self._known:
            number = sum(1 for k, _ in self._known if k == kind) + 1
            self._known[key] = f"{kind}-{number}"
        return self._known[key]

    def text(self, text: str) -> str:
        """Text without keys, passwords, addresses, and names that have been replaced before."""
        text = PEM.sub("[key or certificate]", text)
        text = SECRET.sub(lambda m: f"{m[1]}{m[2]}[secret]", text)
        text = MAC.sub(lambda m: self.word("mac", m[0].lower()), text)
        text = V4.sub(self._address, V6.sub(self._address, text))
        names = [(value, word) for (kind, value), word in self._known.items() if kind == "name" and len(value) > 2]
        for value, word in sorted(names, key=lambda pair: -len(pair[0])):
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", word, text)
        return re.sub(rf"(?<!\w){re.escape(self.host)}(?!\w)", "this-host", text) if self.host else text

    def _address(self, found: re.Match[str]) -> str:
        try:
            address = ip_address(found[0])
        except ValueError:  # a time of day, a version
            return found[0]
        plain = address.is_loopback or address.is_unspecified or address.is_multicast
        return found[0] if plain else self.word("address", str(address))

    def value(self, value: Any, key: str = "") -> Any:
        """The same of what json has read; fields of NAMES are replaced as a whole."""
        if isinstance(value, dict):
            return {k: self.value(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [self.value(v, key) for v in value]
        if not isinstance(value, str):
            return value
        return self.word("name", value) if value and key in NAMES else self.text(value)


@command("support-bundle")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@click.option("--config", metavar="FILE", help="The configuration to put in.")
@click.option("--no-log", is_flag=True, help="Leave out the log of the last hours (journalctl -u mfsd).")
def support_bundle(g: Globals, file: Path | None, config: str | None, *, no_log: bool) -> None:
    """Put what whoever helps needs to know into one file (.tar.gz), without secrets.

    Status, plan, metrics, the configuration in force, connections and transfers, the doctor's findings, transports, and
    the log. Keys, passwords and variables of processes are left out; addresses, names of this host and of requests,
    transfers and sessions are replaced. Look into it before you send it. Works without a daemon, with less in it.
    """
    path = file or Path(f"mfsd-support-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    redaction = Redaction(os.uname().nodename)
    parts, missing = _collect(g, config, log=not no_log)
    # Names first: what is text afterwards may have them, too.
    done = {name: redaction.value(part) for name, part in parts.items() if not isinstance(part, str)}
    done |= {name: redaction.text(part) for name, part in parts.items() if isinstance(part, str)}
    done["missing.json"] = redaction.value(missing)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise CliError(f"{path} is there already; choose another name") from None
    except OSError as e:
        raise CliError(f"can't write {path}: {e.strerror}") from None
    with os.fdopen(fd, "wb") as raw, tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name in sorted(done):
            part = done[name]
            data = (part if isinstance(part, str) else json.dumps(part, indent=1, ensure_ascii=False) + "\n").encode(
                errors="replace"
            )
            info = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
            info.size, info.mtime = len(data), int(time.time())
            tar.addfile(info, io.BytesIO(data))
    if g.json:
        output.print_json({"file": str(path), "parts": sorted(done), "missing": missing})
        return
    click.echo(f"{path}: {', '.join(sorted(done))}")
    for name, why in missing.items():
        click.echo(f"! without {name}: {why}")


def _collect(g: Globals, config: str | None, *, log: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Contents by name, and why others are missing."""
    parts: dict[str, Any] = {}
    missing: dict[str, str] = {}

    def put(name: str, make: Callable[[], Any]) -> None:
        try:
            parts[name] = make()
        except (CliError, OSError, subprocess.SubprocessError) as e:
            missing[name] = e.format_message() if isinstance(e, CliError) else str(e)

    for name, ask in _QUESTIONS.items():
        put(name, lambda ask=ask: _asked(g.socket, ask))  # type: ignore[misc] # binds the loop variable
    put("config.toml", lambda: shown_config(config))
    put("doctor.json", lambda: _findings(config))
    put("transports.json", lambda: _transports(config))
    put("machine.json", _machine)
    if log:
        put("log.txt", _log)
    return parts, missing


_QUESTIONS: Final[dict[str, Callable[[control_pb2_grpc.ControlStub], Any]]] = {
    "status.json": lambda d: output.as_dict(d.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S)),
    "plan.json": lambda d: output.as_dict(d.GetPlan(pb.GetPlanRequest(), timeout=TIMEOUT_S)),
    "metrics.txt": lambda d: _without_exemplars(d.GetMetrics(pb.GetMetricsRequest(), timeout=TIMEOUT_S).text),
    "connections.json": lambda d: output.as_dict(
        d.ListConnections(pb.ListConnectionsRequest(page_size=ROWS), timeout=TIMEOUT_S)
    ),
    "transfers.json": lambda d: output.as_dict(
        d.ListTransfers(pb.ListTransfersRequest(page_size=ROWS), timeout=TIMEOUT_S)
    ),
    "rules.json": lambda d: output.as_dict(d.ListRules(pb.ListRulesRequest(), timeout=TIMEOUT_S)),
}


def _asked(socket: str, ask: Callable[[control_pb2_grpc.ControlStub], Any]) -> Any:
    with control(socket) as daemon:
        return ask(daemon)


def _without_exemplars(text: str) -> str:
    """They have names of requests."""
    return re.sub(r" # \{.*", "", text)


def _findings(config: str | None) -> list[dict[str, Any]]:
    found = (asdict(f) for f in doctor.run((), read_config(config, needed=False)))
    return [{"check": f.pop("id"), **f} for f in found]  # an id of a worker's is replaced


def _transports(config: str | None) -> dict[str, Any]:
    """Links and rates; of processes their names only, not their variables."""
    report = doctor.measure(doctor.Context((), read_config(config, needed=False)))
    return {
        "tcp": [asdict(f) for f in report.flows[:ROWS]],
        "rdma": [asdict(p) for p, _, _ in report.ports],
        "nics": report.netdevs,
        "mapped": report.mapped,
    }


def _machine() -> dict[str, str]:
    out = {"mfsctl": __version__, "kernel": os.uname().release, "machine": os.uname().machine}
    release = Path("/etc/os-release")
    if release.exists():
        found = re.search(r'^PRETTY_NAME="?([^"\n]*)', release.read_text(), re.MULTILINE)
        out["system"] = found[1] if found else "?"
    return out


def _log() -> str:
    argv = ["/usr/bin/journalctl", "-u", "mfsd", "-n", str(LOG_LINES), "--no-pager", "-o", "short-iso", "--no-hostname"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LOG_S, check=True)  # noqa: S603 - fixed words
    return done.stdout
