# SPDX-License-Identifier: Apache-2.0
"""Every metric of mfsd, described once: what the daemon exposes, `mfsctl stats --help` prints, and docs/ lists.

Names and units follow OpenMetrics: base units, counters end in _total (which is not written here). Labels have few
values: devices and bands of the configuration, stages, and words that are listed in the description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

PREFIX: Final = "mfsd_"
UNITS: Final = ("bytes_per_second", "seconds", "bytes", "ratio")


@dataclass(frozen=True, slots=True)
class Metric:
    """One family of samples."""

    name: str
    """Without PREFIX, and without the suffixes of samples."""
    kind: Literal["counter", "gauge", "histogram", "info"]
    what: str
    labels: tuple[str, ...] = ()

    @property
    def unit(self) -> str:
        """The unit that its name ends with, as OpenMetrics wants it; empty: a count."""
        return next((unit for unit in UNITS if self.name.endswith(f"_{unit}")), "")

    @property
    def full_name(self) -> str:
        """As Prometheus shows it; of a histogram without the suffixes _bucket, _sum and _count."""
        suffix = {"counter": "_total", "info": "_info"}.get(self.kind, "")
        return f"{PREFIX}{self.name}{suffix}"


DEVICE: Final = ("device",)
BAND: Final = ("device", "band")
STAGE: Final = ("stage",)
USER_STAGE: Final = ("user", "stage")
USER_DEVICE: Final = ("user", "device")

METRICS: Final = (
    Metric("build", "info", "Always 1; what runs, in its labels.", ("version", "policy", "loader")),
    Metric("uptime_seconds", "gauge", "Since the daemon started."),
    Metric("enforcing", "gauge", "1: packets follow the levels. 0: observe mode, or paused."),
    # What is known.
    Metric("sessions", "gauge", "Client processes with hints that are not forgotten."),
    Metric("requests", "gauge", "Requests that are not over."),
    Metric("requests_pruned", "gauge", "Of these: demoted so that others meet their deadlines."),
    Metric("requests_no_deadline", "gauge", "Of the requests: nobody has said when they are due."),
    Metric("batches", "gauge", "Batches of requests that compute together."),
    Metric("transfers", "gauge", "Announced transfers that are not finished.", STAGE),
    Metric("transfers_at_risk", "gauge", "Of these: even alone on the link they would be late.", STAGE),
    Metric("transfers_infeasible", "gauge", "Of these: given up, or told to be late, by the policy.", STAGE),
    Metric("transfers_left_bytes", "gauge", "Of these: bytes that have not left yet.", STAGE),
    Metric(
        "least_laxity_seconds", "gauge", "Least time that any of them could still wait and be in time alone on the "
        "link; below zero: late. Absent where none has a deadline.", STAGE,
    ),
    Metric("connections", "gauge", "Connections in the table that the kernel shares."),
    Metric("sockets_told", "gauge", "1: the kernel tells of new connections. 0: they are searched for, a moment late."),
    Metric("slots", "gauge", "Rows of that table: the most connections that there can be."),
    Metric("selectors_unmatched", "gauge", "Selectors that have matched no connection for a second or more."),
    # What has happened.
    Metric("hints", "counter", "Hints; result: accepted or rejected.", ("result",)),
    Metric("transfers_ended", "counter", "Transfers; result: completed or expired.", ("result",)),
    Metric(
        "requests_ended", "counter", "Requests; result: met or missed (the deadline that was hinted), or no_deadline.",
        ("result",),
    ),
    Metric("promotions", "counter", "Times that a connection was lifted to a more urgent band."),
    Metric("rescues", "counter", "Promotions whose packets sat in a starved queue and were let out, or sent anew."),
    Metric(
        "rescue_retransmitted_segments", "counter", "What TCP has sent again within a second of a rescue, on the "
        "connection that was rescued; where bands have floors.",
    ),
    Metric("rescue_latency_seconds", "histogram", "From a promotion to what made it take effect."),
    Metric("request_slack_seconds", "histogram", "Deadline less delivery of the last byte; below zero: late. Of those "
           "that had a deadline."),
    Metric("transfer_slack_seconds", "histogram", "The same of transfers that have a deadline.", STAGE),
    Metric("transfer_queue_seconds", "histogram", "From the hint to the first byte, to within a tick.", STAGE),
    Metric("transfer_wire_seconds", "histogram", "From the first byte to the delivery of the last one.", STAGE),
    # In the network (network.yield).
    Metric("yielding_connections", "gauge", "Connections that yield, heard from within the last 0.2 s.", ("band",)),
    Metric("yielding_queue_seconds", "gauge", "Mean queue that they see at bottlenecks of the network.", ("band",)),
    Metric("yielding_ratio", "gauge", "Share of their time in which they get out of somebody's way.", ("band",)),
    # Users (tenants), by number; "other": those beyond the first hundred. -1: nobody knows.
    Metric(
        "user_requests_ended", "counter", "Requests of a user's sessions that had a deadline; result: met or missed.",
        ("user", "result"),
    ),
    Metric(
        "user_transfers_ended", "counter", "Transfers of a user's sessions that had a deadline and were not cancelled "
        "before it; result: met or missed.", ("user", "stage", "result"),
    ),
    Metric("user_least_laxity_seconds", "gauge", "Least laxity of a user's transfers.", USER_STAGE),
    Metric("user_transfers", "gauge", "Announced transfers of a user that are not finished.", USER_STAGE),
    Metric("user_moved_bytes_per_second", "gauge", "What a user's hinted connections move.", USER_DEVICE),
    Metric("user_urgent_bytes_per_second", "gauge", "Of it above unhinted traffic.", USER_DEVICE),
    Metric("user_allowed_bytes_per_second", "gauge", "How much of that is allowed now; 0: any.", USER_DEVICE),
    Metric("user_demotions", "counter", "Times that a user was demoted for moving more.", USER_DEVICE),
    # The daemon itself.
    Metric("ticks", "counter", "Ticks of the engine that succeeded."),
    Metric("tick_busy_seconds", "counter", "Time that ticks took."),
    Metric("tick_recent_seconds", "gauge", "How long a tick took in the last minute.", ("quantile",)),
    Metric("tick_failing", "gauge", "1: the last tick failed; the log says why."),
    Metric("notices", "gauge", "Things that an operator should know; mfsctl status lists them."),
    # Devices.
    Metric("device_shaped", "gauge", "1: its qdiscs are in force. 0: it is only observed.", ("device", "backend")),
    Metric("device_attached", "gauge", "1: the classifier hangs on it.", DEVICE),
    Metric("device_needs_care", "gauge", "1: it is not as configured, or can't be accessed; mfsctl status.", DEVICE),
    Metric("device_rate_bytes_per_second", "gauge", "Configured rate, else link speed; 0: unknown.", DEVICE),
    Metric("device_measured_bytes_per_second", "gauge", "What it gave while busy; 0: never busy.", DEVICE),
    Metric("device_busy_ratio", "gauge", "Share of the last interval's capacity that was used.", DEVICE),
    Metric(
        "classified_packets", "counter", "Packets by what the classifier did; `mfsctl status --help-stats` explains "
        "each counter. control and marked count packets that another counter has, too.", ("device", "counter"),
    ),
    Metric("band_sent_bytes", "counter", "Sent through a band since its qdisc was installed.", BAND),
    Metric("band_sent_packets", "counter", "The same in packets.", BAND),
    Metric("band_dropped_packets", "counter", "Dropped at a full queue, purged ones included.", BAND),
    Metric("band_queued_bytes", "gauge", "Queued now.", BAND),
    Metric("band_floor_bytes_per_second", "gauge", "What a band gets even when those above it are busy.", BAND),
    Metric(
        "band_guaranteed_bytes_per_second", "gauge", "What the policy guarantees a band now, its floor included; "
        "0: no more than the floor.", BAND,
    ),
    Metric("band_standing_bytes_per_second", "gauge", "Rate of a band that the policy gives nothing; 0: none.", BAND),
    Metric("band_got_bytes_per_second", "gauge", "What a band got lately.", BAND),
    Metric("band_connections", "gauge", "Connections in it.", BAND),
)  # fmt: skip

BY_NAME: Final = {m.name: m for m in METRICS}
