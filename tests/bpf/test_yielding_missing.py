# SPDX-License-Identifier: Apache-2.0
"""Kernels on which connections can't yield in the network: what they lack is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from mfsd.datapath.bpf import yielding
from mfsd.datapath.bpf.libbpf import LibbpfLoader
from mfsd.datapath.bpf.yielding import Yielding
from mfsd.datapath.errors import LoaderError

if TYPE_CHECKING:
    from pathlib import Path

BTF: Final = b"\0BPF_STRUCT_OPS\0cubictcp_cong_avoid\0"


@pytest.mark.parametrize(
    ("btf", "said"), [(b"\0BPF_STRUCT_OPS\0", "cubic"), (b"\0cubictcp_cong_avoid\0", "6.4"), (BTF, "")]
)
def test_what_a_kernel_lacks_is_named(btf: bytes, said: str) -> None:
    assert bool(yielding.missing(btf)) == bool(said)
    assert said in yielding.missing(btf)


@pytest.mark.bpf
def test_a_kernel_that_lacks_something_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yielding, "BTF", tmp_path / "none")
    with LibbpfLoader().open_classifier(64) as classifier, pytest.raises(LoaderError, match="CONFIG_DEBUG_INFO_BTF"):
        Yielding(classifier)
    (tmp_path / "none").write_bytes(b"\0cubictcp_cong_avoid\0")
    with LibbpfLoader().open_classifier(64) as classifier, pytest.raises(LoaderError, match=r"Linux 6\.4"):
        Yielding(classifier)
