# SPDX-License-Identifier: Apache-2.0
"""Throw-away certificate authorities, by the openssl command."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mfsd.lab.hosts.net import LabError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Papers:
    """Files of one host, all PEM."""

    cert: Path
    key: Path
    ca: Path

    @property
    def settings(self) -> dict[str, str]:
        """Keys of section [relay]."""
        return {"cert": str(self.cert), "key": str(self.key), "ca": str(self.ca)}

    @property
    def toml(self) -> str:
        """The same as text."""
        return "".join(f'{key} = "{value}"\n' for key, value in self.settings.items())


class Authority:
    """Signs certificates. Raises LabError."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.cert, self.key = folder / "ca.pem", folder / "ca.key"
        _openssl(
            "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
            "-subj", "/CN=mfsd lab authority", "-keyout", self.key, "-out", self.cert,
        )  # fmt: skip

    def papers(self, name: str, *addresses: str) -> Papers:
        """Of a host with this name and these addresses."""
        key, request, cert = (self.folder / f"{name}.{end}" for end in ("key", "csr", "pem"))
        names = ",".join([f"DNS:{name}", *(f"IP:{a}" for a in addresses)])
        _openssl(
            "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-subj", f"/CN={name}", "-keyout", key, "-out", request,
        )  # fmt: skip
        extensions = self.folder / f"{name}.ext"
        extensions.write_text(f"subjectAltName={names}\n")
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.cert, "-CAkey", self.key, "-CAcreateserial", "-days", "2",
            "-extfile", extensions, "-out", cert,
        )  # fmt: skip
        return Papers(cert, key, self.cert)


def _openssl(*words: str | Path) -> None:
    """Raises LabError with its complaint."""
    path = shutil.which("openssl")
    if path is None:
        raise LabError("openssl is not installed; on Debian: apt-get install openssl")
    done = subprocess.run([path, *map(str, words)], check=False, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"openssl {words[0]}: {done.stderr.strip()}")
