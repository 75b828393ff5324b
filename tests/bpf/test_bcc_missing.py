# SPDX-License-Identifier: Apache-2.0
"""What the BCC loader says where its compiler, its bindings or the headers are missing; tests/vm has the rest of it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from mfsd.daemon import devices
from mfsd.datapath.bpf import bcc
from mfsd.datapath.bpf.bcc import BccLoader, check_headers
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.bpf


def test_missing_headers_name_the_package(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match=r"apt-get install linux-headers-9\.9\.9"):
        check_headers("9.9.9", tmp_path)
    (tmp_path / "9.9.9/build/include").mkdir(parents=True)
    check_headers("9.9.9", tmp_path)


def test_missing_bindings_name_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 1, "", "ModuleNotFoundError")

    monkeypatch.setattr(bcc, "_run", without)
    bcc.interpreter.cache_clear()
    with pytest.raises(LoaderError, match="python3-bpfcc"):
        bcc.interpreter()
    bcc.interpreter.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def failing(argv: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, 1, "", "note\nx.c:1:1: error: no such thing\n1 error generated.\n")

    monkeypatch.setattr(bcc, "_run", failing)
    with pytest.raises(LoaderError, match="no such thing") as caught:
        bcc._compile(tmp_path / "x.c", sys.executable)
    assert caught.value.log_tail.startswith("note")


def test_without_headers_nothing_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="no headers of the running kernel"):
        BccLoader(modules=tmp_path).open_classifier(16)


def test_auto_takes_bcc_where_libbpf_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices._loader("auto")[0] == "libbpf"

    def missing() -> None:
        raise LoaderError("libbpf.so.1", "not found", "install it")

    monkeypatch.setattr(devices, "LibbpfLoader", missing)
    name, loader = devices._loader("auto")
    assert (name, type(loader)) == ("bcc", BccLoader)
    with pytest.raises(LoaderError, match="not found"):
        devices._loader("libbpf")
