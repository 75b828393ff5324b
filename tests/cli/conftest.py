# SPDX-License-Identifier: Apache-2.0
"""A server with canned answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
from support.canned import Canned
from support.ctl import Rig

from mfsd.v1 import control_pb2_grpc, hints_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    canned = Canned()
    server = grpc.server(ThreadPoolExecutor(4))
    control_pb2_grpc.add_ControlServicer_to_server(canned, server)
    hints_pb2_grpc.add_HintsServicer_to_server(canned, server)
    path = tmp_path / "s"
    server.add_insecure_port(f"unix:{path}")
    server.start()
    yield Rig(canned, path)
    server.stop(None).wait()
