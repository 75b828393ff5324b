# SPDX-License-Identifier: Apache-2.0
"""All checks, one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mfsd.doctor import device, host, kernel, leftovers, loaders, paths, tcp
from mfsd.doctor.finding import Context, Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from mfsd.daemon.config import Config
    from mfsd.doctor.finding import Check, DeviceCheck

CHECKS: Final[tuple[Check, ...]] = (
    *kernel.CHECKS, *loaders.CHECKS, *host.CHECKS, *paths.CHECKS, *tcp.CHECKS, *leftovers.CHECKS,
)  # fmt: skip
DEVICE_CHECKS: Final[tuple[DeviceCheck, ...]] = device.CHECKS


def run(devices: Sequence[str], config: Config) -> list[Finding]:
    """All findings, in the order of the checks; devices last.

    ``devices`` empty: those of the configuration, else those that carry a default route. The checks of devices apply
    to the network namespace of the calling thread.
    """
    names = tuple(devices) or tuple(d.name for d in config.device) or tuple(device.default_route_devices())
    return examine(Context(names, config))


def examine(context: Context) -> list[Finding]:
    """As `run`, in a given context."""
    out: list[Finding] = []
    for check in CHECKS:
        out += _safely(check.__name__, lambda check=check: check(context))  # type: ignore[misc]  # binds the loop variable
    for name in context.devices:
        found = device.exists(context, name)
        out += found
        if any(f.severity is Severity.FAIL for f in found):
            continue
        for device_check in DEVICE_CHECKS:
            out += _safely(
                f"{device_check.__name__}:{name}",
                lambda check=device_check, name=name: check(context, name),  # type: ignore[misc]  # likewise
            )
    if not context.devices:
        out.append(
            Finding(
                "device.none",
                Severity.INFO,
                "No device to check",
                "none was named, the configuration has none, and there is no default route",
                "mfsd shapes only devices of [[device]] sections",
                "name one: mfsctl doctor --device eth0",
            )
        )
    return out


def _safely(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Findings of a check; one that trips over something unforeseen must not hide what the others find."""
    try:
        return list(check())
    except PermissionError as e:
        return [
            Finding(
                f"doctor.{name}",
                Severity.INFO,
                f"Check {name} needs more privileges",
                str(e),
                "the answer is unknown",
                "run mfsctl doctor as root",
            )
        ]
    except Exception as e:  # noqa: BLE001 - see the docstring
        return [
            Finding(
                f"doctor.{name}",
                Severity.WARN,
                f"Check {name} could not be made",
                f"{type(e).__name__}: {e}",
                "the answer is unknown",
            )
        ]
