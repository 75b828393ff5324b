# SPDX-License-Identifier: Apache-2.0
"""Types of values in the configuration: what each accepts, and what must be there instead.

A value that is refused here for a reason of its own raises Unfit, whose text follows "must be" in the error; for other
ValueErrors the error says what its key allows.
"""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, InstanceOf, PlainValidator

from mfsd.ground.model import Mode
from mfsd.ground.units import Rate, Unfit, host_port
from mfsd.ground.wire import BESIDE

IFNAMSIZ: Final = 16
"""Length of a device name, the final 0 included (include/uapi/linux/if.h)."""
SUN_PATH: Final = 108
"""Length of a unix socket's path, the final 0 included (unix(7))."""
PATH_MAX: Final = 4096
NAME_MAX: Final = 255
"""Bytes of a path with its final 0, and of each of its parts (include/uapi/linux/limits.h)."""
LOWEST: Final = Rate.parse("64kbit")
HIGHEST: Final = Rate.parse("10tbit")
"""What is beyond these is a slip of the pen: a band's floor would be a few bytes/s, or no link that there is."""
_SPACES: Final = frozenset(b"\t\n\v\f\r \xa0")
"""isspace() of the kernel, which goes by Latin-1 (lib/ctype.c)."""


def printable(text: str) -> str:
    """Refuse what no terminal and no log shows as it is: NUL, line ends, other control characters."""
    if not text.isprintable():
        raise Unfit("printable: no NUL, no line ends, no other control characters")
    return text


def _rate(value: Any) -> Any:
    rate = Rate.parse(value) if isinstance(value, str) else value
    if isinstance(rate, Rate) and not LOWEST <= rate <= HIGHEST:
        raise Unfit(f'a rate from {LOWEST} to {HIGHEST}, e.g. "10gbit"')
    return rate


def _path(value: Any) -> Any:
    path = Path(printable(value)) if isinstance(value, str) else value
    if not isinstance(path, Path):
        return value
    if not path.is_absolute():
        raise ValueError("relative")
    if len(os.fsencode(path)) >= PATH_MAX or any(len(os.fsencode(part)) > NAME_MAX for part in path.parts):
        raise Unfit(f"a path of less than {PATH_MAX} bytes, each part of at most {NAME_MAX}")
    return path


def _file(value: Any) -> Any:
    path = _path(value)
    if isinstance(path, Path) and (path.name in ("", "..") or (isinstance(value, str) and value.endswith(("/", "/.")))):
        raise Unfit("the path of a file, not of a directory")
    return path


def _socket(path: Path) -> Path:
    if len(os.fsencode(path)) + len(BESIDE) >= SUN_PATH:  # the path of the one beside it must fit, too
        raise ValueError("too long")
    if set(str(path)) & set("%?#"):
        raise Unfit("without %, ? and #, which mean something else in an address of gRPC")
    return path


def _folder(path: Path) -> Path:
    if not path.name:
        raise Unfit("a directory of mfsd's own, not the root of the file system")
    return path


def _mode(value: Any) -> Any:
    return Mode(value) if isinstance(value, str) and value in set(Mode) else value


def _network(value: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    if not isinstance(value, str):  # ip_network takes numbers, too
        raise ValueError("not a text")  # noqa: TRY004 - pydantic wants this one
    if "%" in value:
        raise Unfit('without a zone ("%eth0"): packets carry none')
    return ipaddress.ip_network(value)


def _device(name: str) -> str:
    """As dev_valid_name() of the kernel (net/core/dev.c), and printable."""
    raw = os.fsencode(name)
    if not 0 < len(raw) < IFNAMSIZ or "/" in name or any(c.isspace() for c in name):
        raise ValueError("bad name")
    if name in (".", "..") or ":" in name or set(raw) & _SPACES:
        raise Unfit("a name that the kernel takes: not . or .., no ':', no space")
    return printable(name)


def _account(wanted: str) -> AfterValidator:
    def check(name: str) -> str:
        if not name or name != name.strip() or set(name) & set(":/"):
            raise Unfit(wanted)
        return printable(name)

    return AfterValidator(check)


def loopback(host: str) -> bool:
    """Nobody else reaches this host's name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(text: str) -> str:
    host_port(text)
    return text


RateValue = Annotated[InstanceOf[Rate], BeforeValidator(_rate)]
NetworkValue = Annotated[ipaddress.IPv4Network | ipaddress.IPv6Network, PlainValidator(_network)]
SocketPath = Annotated[InstanceOf[Path], BeforeValidator(_file), AfterValidator(_socket)]
FilePath = Annotated[InstanceOf[Path], BeforeValidator(_file)]
FolderPath = Annotated[InstanceOf[Path], BeforeValidator(_path), AfterValidator(_folder)]
ModeValue = Annotated[InstanceOf[Mode], BeforeValidator(_mode)]
DeviceName = Annotated[str, AfterValidator(_device)]
GroupName = Annotated[str, _account("the name of a group; leave the key out for the daemon's own group")]
UserName = Annotated[str, _account("the name of a user")]
ListenAddress = Annotated[str, AfterValidator(_listen)]
