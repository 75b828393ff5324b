# SPDX-License-Identifier: Apache-2.0
"""What can go wrong below the engine. Everything in mfsd/datapath raises these, or OSError with the kernel's errno."""

from __future__ import annotations

from typing import Final

_LOG_LINES: Final = 25


class DatapathError(RuntimeError):
    """Something of the kernel side failed. ``what`` was tried, ``cause`` is why, ``fix`` is what to do about it."""

    def __init__(self, what: str, cause: str, fix: str = "") -> None:
        super().__init__(f"{what}: {cause}" + (f"; {fix}" if fix else ""))
        self.what = what
        self.cause = cause
        self.fix = fix


class LoaderError(DatapathError):
    """A BPF program can't be loaded. ``log``: of the verifier or compiler, if it spoke, of which the end is kept."""

    def __init__(self, what: str, cause: str, fix: str = "", log: str = "") -> None:
        super().__init__(what, cause, fix)
        self.log_tail = "\n".join(log.splitlines()[-_LOG_LINES:])


class AttachError(DatapathError):
    """The classifier can't be hung on this device, or taken off."""


class EnforceError(DatapathError):
    """A device's qdiscs can't be set up, checked or put back."""


class NoDeviceError(EnforceError):
    """There is no such device in this network namespace: the kernel's own word, not a guess from some failure."""
