# SPDX-License-Identifier: Apache-2.0
"""``[relay]``: who the daemons of other hosts are."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, InstanceOf

from mfsd.engine.settings import Section, as_tuple, setting
from mfsd.ground.units import Unfit, host_port

NAME_MAX: Final = 255
"""Of a name in a certificate; a host's has no more (RFC 1035 2.3.4)."""
SHOWN: Final = 60
"""Characters of a wrong value."""


def _path(value: Any) -> Any:
    path = Path(value) if isinstance(value, str) else value
    if isinstance(path, Path) and not path.is_absolute():
        raise ValueError("relative")
    if isinstance(path, Path) and (not path.name or str(value).endswith("/") or not str(path).isprintable()):
        raise Unfit("the path of a file, printable")
    return path


FilePath = Annotated[InstanceOf[Path], BeforeValidator(_path)]


class RelayConfig(Section):
    """``[relay]``: hints that cross hosts."""

    listen: str | None = setting(
        None, "Where the daemons of other hosts bring hints.", allowed='"host:port"; 0.0.0.0 or [::] for all addresses'
    )
    peers: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = setting(
        (),
        "Their daemons. A name is looked up again and again, and stands for all its addresses. What else stands there "
        "are the networks that the host sends from, if not from that address.",
        allowed='a list of "host:port" or "host:port network ...", e.g. "mfsd.serving.svc:5731"',
    )
    allow: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = setting(
        (),
        "Who may bring hints: names in their certificates.",
        allowed='a list of names, e.g. "decode-1.example"; "*" at the beginning stands for one label',
    )
    cert: FilePath | None = setting(None, "Our certificate, PEM.", allowed="an absolute path")
    key: FilePath | None = setting(None, "Its private key, PEM.", allowed="an absolute path")
    ca: FilePath | None = setting(None, "Who signs the peers' certificates, PEM.", allowed="an absolute path")

    @property
    def on(self) -> bool:
        """It is in use."""
        return self.listen is not None or bool(self.peers)

    def problems(self) -> list[str]:
        """What is wrong with the section as a whole."""
        out = [
            f"relay.{name} = (unset): required with relay.listen and relay.peers; must be an absolute path"
            for name in ("cert", "key", "ca")
            if self.on and getattr(self, name) is None
        ]
        if self.listen is not None:
            if not _is_place(self.listen):
                out.append(f'relay.listen = {_shown(self.listen)}: must be "host:port"')
            if not self.allow:
                out.append("relay.allow = []: nobody could bring hints; name those who may, or leave out relay.listen")
        for i, peer in enumerate(self.peers):
            place, *networks = peer.split() or [""]
            if not _is_place(place) or not all(map(_is_network, networks)):
                out.append(f'relay.peers[{i}] = {_shown(peer)}: must be "host:port" or "host:port network ..."')
        for i, name in enumerate(self.allow):
            if not name or not name.isprintable() or len(name) > NAME_MAX:
                out.append(f"relay.allow[{i}] = {_shown(name)}: must be a name as certificates have it")
        return out


def _shown(text: str) -> str:
    """Whatever it is: on one line, up to where nobody reads on."""
    cut = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return f'"{cut}"' if cut.isprintable() else ascii(cut)


def _is_place(text: str) -> bool:
    try:
        host_port(text)
    except ValueError:
        return False
    return True


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True
