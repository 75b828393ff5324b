# SPDX-License-Identifier: Apache-2.0
"""The configured ways into the kernel, or what takes their place where it lacks something."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from mfsd.datapath.bpf.bcc import BccLoader
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.teller import Teller
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from mfsd.datapath.bpf.loader import Classifier, Loader

log = structlog.get_logger(__name__)


def loader_of(wanted: str) -> tuple[str, Loader]:
    """The configured way into the kernel; "auto" is libbpf, or BCC where libbpf 1.x is missing. Raises LoaderError."""
    if wanted != "bcc":
        try:
            return "libbpf", LibbpfLoader()
        except LoaderError as e:
            if wanted == "libbpf":
                raise
            log.warning("loader", chosen="bcc", reason=str(e))
    return "bcc", BccLoader()


def teller_of(classifier: Classifier, wanted: str) -> tuple[Teller | None, str]:
    """Have the kernel tell of connections, if it can and shall; why it doesn't though it should. Raises LoaderError."""
    if wanted == "listing":
        return None, ""
    try:
        return Teller(classifier), ""
    except LoaderError as e:
        if wanted == "kernel":
            raise
        problem = f"the kernel does not tell of connections, so they are listed again and again: {e}"
        log.warning("sockets", problem=str(e))
        return None, problem
