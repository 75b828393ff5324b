# SPDX-License-Identifier: Apache-2.0
"""What the BCC loader says where its compiler, its bindings or the headers are missing; tests/vm has the rest of it."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from mfsd.daemon import devices
from mfsd.datapath.bpf import bcc, libbpf
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
    """Neither this interpreter nor the distribution's can import them."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(shutil, "which", lambda name, path: "/bin/false" if name == "python3" and path else None)
    bcc.interpreter.cache_clear()
    try:
        with pytest.raises(LoaderError, match="python3-bpfcc"):
            bcc.interpreter()
    finally:
        bcc.interpreter.cache_clear()


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\necho note; printf 'note\\nx.c:1:1: error: no such thing\\n1 error generated.\\n' >&2; exit 1\n"
    )
    python.chmod(0o755)
    with pytest.raises(LoaderError, match="no such thing") as caught:
        bcc._compile(tmp_path / "x.c", str(python))
    assert caught.value.log_tail.startswith("note\nx.c")


def test_without_headers_nothing_is_compiled(tmp_path: Path) -> None:
    with pytest.raises(LoaderError, match="no headers of the running kernel"):
        BccLoader(modules=tmp_path).open_classifier(16)


def test_auto_takes_bcc_where_libbpf_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices._loader("auto")[0] == "libbpf"
    monkeypatch.setattr(libbpf, "LIBRARY", "libbpf-that-is-not-there.so.1")
    libbpf.library.cache_clear()
    try:
        name, loader = devices._loader("auto")
        assert (name, type(loader)) == ("bcc", BccLoader)
        with pytest.raises(LoaderError, match="cannot open shared object file"):
            devices._loader("libbpf")
    finally:
        libbpf.library.cache_clear()
