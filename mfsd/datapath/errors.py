# SPDX-License-Identifier: Apache-2.0
"""What can go wrong below the engine. Everything in mfsd/datapath raises these, or OSError with the kernel's errno."""

from __future__ import annotations


class DatapathError(RuntimeError):
    """Something of the kernel side failed. ``what`` was tried, ``cause`` is why, ``fix`` is what to do about it."""

    def __init__(self, what: str, cause: str, fix: str = "") -> None:
        super().__init__(f"{what}: {cause}" + (f"; {fix}" if fix else ""))
        self.what = what
        self.cause = cause
        self.fix = fix


class LoaderError(DatapathError):
    """A BPF program can't be loaded. ``log_tail`` holds the last lines of the verifier's log, if it spoke."""

    def __init__(self, what: str, cause: str, fix: str = "", log_tail: str = "") -> None:
        super().__init__(what, cause, fix)
        self.log_tail = log_tail


class AttachError(DatapathError):
    """The classifier can't be hung on this device, or taken off."""


class EnforceError(DatapathError):
    """A device's qdiscs can't be set up, checked or put back."""


class NoDeviceError(EnforceError):
    """There is no such device in this network namespace: the kernel's own word, not a guess from some failure."""
