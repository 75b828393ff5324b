# SPDX-License-Identifier: Apache-2.0
"""Answers of a daemon with extreme values in them, for what mfsctl makes of them."""

from __future__ import annotations

from mfsd.v1 import control_pb2 as pb
from mfsd.v1 import hints_pb2

TO = ("--to", "10.0.0.2:6000")
"""Options of mfsctl hint."""
COOKIE = 2**63 + 5
"""Too big for a double and for a signed integer."""
LONG_V6 = "[fd12:3456:789a:bcde:f012:3456:789a:bcde]:65535 -> [fd12:3456:789a:bcde:f012:3456:789a:bcdf]:65534"


def status() -> pb.Status:
    out = pb.Status(
        version="9.8.7",
        uptime_s=7980.0,
        epoch=77,
        mode=pb.MODE_ENFORCE,
        policy="mfs",
        sessions=2,
        requests=3,
        transfers=4,
        connections=5,
        slots=16384,
        rss_bytes=88_000_000,
        tick_p50_ms=0.31,
        tick_p99_ms=0.92,
        notices=["eth1: observed only: [link] is foreign"],
        counters=pb.Counters(deadlines_met=1_234_567, deadlines_missed=1, promotions=9, rescues=4),
    )
    device = out.devices.add(
        name="eth0", ifindex=2, backend="htb", attach="tcx", loader="libbpf", rate_bytes_per_s=125e6, utilisation=0.73
    )
    device.bands.add(name="control", classid="6d66:1001", lanes=1, floor_bytes_per_s=2.5e6, dscp=-1, urgency="urgent")
    device.bands.add(
        index=1, name="level 0", classid="6d66:2001", lanes=32, bytes=10**15, packets=10**12, drops=5, dscp=46,
        backlog_bytes=262144, connections=5, guaranteed_bytes_per_s=62.5e6, got_bytes_per_s=125e6, urgency="middle",
    )  # fmt: skip
    device.bands.add(
        index=5, name="background", classid="6d66:9001", lanes=32, dscp=8, urgency="urgent", floor_bytes_per_s=123.4e6,
        standing_bytes_per_s=12.5e6, got_bytes_per_s=123.4e6, backlog_bytes=999_000_000, bytes=999_000_000_000,
        packets=999_000_000, drops=999_000_000, connections=16384,
    )  # fmt: skip
    device.stats["cookie"] = 10**9
    device.stats["miss"] = 0
    return out


def connection() -> pb.Connection:
    return pb.Connection(
        slot=16383, cookie=COOKIE, endpoints=LONG_V6, level=0, band="level 0", lane=31, stage=hints_pb2.STAGE_P2D,
        transfers=12, bytes_left=10**12, bytes_sent=999_999_999_999, promotions=100, rescues=99, expires_us=29_900_000,
        session="host:1:2",
    )  # fmt: skip


def transfers() -> list[pb.TransferState]:
    return [
        pb.TransferState(
            id="t" * 60, request_id="request-" * 8, stage=hints_pb2.STAGE_P2D, target_layer=79, bytes=10**12,
            bytes_left=999_999_999_999, deadline_us=-686_000, mlu=1.25, level=-2, slot=7,
        ),
        pb.TransferState(id="t2", batch_id="b", stage=hints_pb2.STAGE_COLLECTIVE, bytes=5, rli=0, level=-1, slot=-1),
    ]  # fmt: skip
