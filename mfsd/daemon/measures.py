# SPDX-License-Identifier: Apache-2.0
"""The values of all metrics (mfsd/ground/metrics.py), for prometheus_client.

A scrape costs the event loop a copy of what the engine knows (``snapshot``, some tens of microseconds); counters of
devices are read by their threads, and text is made in that of whoever asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.samples import Exemplar

import mfsd
from mfsd.api import network
from mfsd.engine.tally import USERS_KEPT
from mfsd.ground.metrics import BY_NAME, METRICS, PREFIX, STAGE
from mfsd.ground.model import INF, Stage
from mfsd.v1 import control_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from prometheus_client import Metric as Family

    from mfsd.api.operations import Device, Figures, Operations, Way
    from mfsd.engine.engine import Engine
    from mfsd.engine.tally import Histogram

REQUEST_LABEL: Final = "request_id"
REQUEST_MAX: Final = 128 - len(REQUEST_LABEL)
"""OpenMetrics allows 128 characters for the labels of an exemplar."""
OTHER: Final = "other"
"""In place of the number of a user who is not among the first hundred."""
_STAGES: Final = tuple(s for s in Stage if s is not Stage.NONE)
_MAKE: Final = {"counter": CounterMetricFamily, "gauge": GaugeMetricFamily, "histogram": HistogramMetricFamily,
                "info": InfoMetricFamily}  # fmt: skip

Values = dict[str, list[tuple[tuple[str, ...], float]]]
"""By name, (values of the labels, value) of each sample."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One device as the event loop sees it."""

    device: Device
    figures: Figures
    connections: npt.NDArray[np.int64]
    """By band."""
    values: Mapping[str, float]
    rates: Mapping[str, Mapping[int, float]]
    """By metric, by band."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the engine knows at one moment; nothing in it changes any more."""

    build: Mapping[str, str]
    values: Values
    histograms: Mapping[str, Mapping[str, Histogram]]
    devices: Sequence[Seen]
    bands: Sequence[tuple[str, float]]
    """(name, floor as share of the link) by index."""


def line(engine: Engine, devices: Sequence[Device]) -> str:
    """What goes on, in one line."""
    state = "paused" if engine.paused else engine.mode.value
    each = ", ".join(f"{d.name} ({d.backend or 'observed'})" for d in devices) or "no devices"
    return f"{state}: {each}; {len(engine.connections)} connections, {engine.books.transfers.n} transfers"


def snapshot(
    daemon: Operations, figures: Sequence[Figures], ways: Sequence[Way], ticks: tuple[int, float, str], now: float
) -> Snapshot:
    """Take it, on the event loop.

    ``figures``: of all devices. ``ways``: of connections that yield. ``ticks``: how many there have been, seconds that
    they took, why the last failed.
    """
    engine, books = daemon.engine, daemon.engine.books
    count, busy, failure = ticks
    p50, p99 = daemon.tick_durations()
    c, bands = books.counters, engine.steering.bands
    values: Values = {
        "uptime_seconds": [((), now - daemon.started)],
        "enforcing": [((), float(engine.steers))],
        "sessions": [((), len(books.sessions))],
        "requests": [((), books.requests.n)],
        "requests_no_deadline": [((), books.without_deadline)],
        "requests_pruned": [((), int(books.requests.live("pruned").sum()))],
        "batches": [((), books.batches.n)],
        "connections": [((), len(engine.connections))],
        "slots": [((), len(engine.connections.table))],
        "selectors_unmatched": [((), len(engine.watches.unseen(now)))],
        "hints": [(("accepted",), c.hints_accepted), (("rejected",), c.hints_rejected)],
        "transfers_ended": [(("completed",), c.transfers_completed), (("expired",), c.transfers_expired)],
        "requests_ended": [
            (("met",), c.deadlines_met),
            (("missed",), c.deadlines_missed),
            (("no_deadline",), c.ended_no_deadline),
        ],
        "promotions": [((), c.promotions)],
        "rescues": [((), c.rescues)],
        "ticks": [((), count)],
        "tick_busy_seconds": [((), busy)],
        "tick_recent_seconds": [(("0.5",), p50), (("0.99",), p99)],
        "tick_failing": [((), float(bool(failure)))],
        "notices": [((), len(daemon.notices()))],
        "sockets_told": [((), float(engine.connections.sockets.tells))],
        "rescue_retransmitted_segments": [((), engine.rescuer.retransmitted)],
        **_transfers(engine, now),
        **_yielding(ways, [b.name for b in bands.bands if b.index > bands.default.index]),
        **_uses(engine),
    }
    devices = daemon.all_devices
    return Snapshot(
        build={
            "version": mfsd.__version__,
            "policy": engine.steering.policy.name,
            "loader": devices[0].loader if devices else "",
        },
        values=values,
        histograms=_histograms(engine),
        devices=[
            _seen(engine, i, device, figures[i], users)
            for i, (device, users) in enumerate(
                zip(devices[: len(figures)], engine.connections.by_band(), strict=False)
            )
        ],
        bands=[(b.name, b.floor) for b in bands.bands],
    )


def _yielding(ways: Sequence[Way], bands: Sequence[str]) -> Values:
    """Of the bands that may yield; 0 where none of their connections do."""
    rows = {row.band: row for row in network.rows(ways, bands)}
    found = [((band,), rows.get(band) or pb.Yielding()) for band in bands]
    return {
        "yielding_connections": [(band, row.connections) for band, row in found],
        "yielding_queue_seconds": [(band, row.queue_ms / 1000) for band, row in found],
        "yielding_ratio": [(band, row.yielding_share) for band, row in found],
    }


def _transfers(engine: Engine, now: float) -> Values:
    """Unfinished transfers by stage."""
    views = engine.steering.views(now)
    t, rates = views.transfers, views.link.rate
    rate = rates.take(t.device, mode="clip") if len(rates) else np.zeros(len(t))
    with np.errstate(divide="ignore", invalid="ignore"):
        alone = np.where(rate > 0, t.left / rate, 0.0)
    laxity = t.deadline - now - alone
    out: Values = {m.name: [] for m in METRICS if m.labels == STAGE and m.kind == "gauge"}
    for stage in _STAGES:
        label, of = (stage.name.lower(),), t.stage == stage
        timed = laxity[of & (t.deadline < INF)]
        out["transfers"].append((label, int(of.sum())))
        out["transfers_at_risk"].append((label, int((timed < 0).sum())))
        out["transfers_infeasible"].append((label, int((t.infeasible & of).sum())))
        out["transfers_left_bytes"].append((label, float(t.left[of].sum())))
        if len(timed):
            out["least_laxity_seconds"].append((label, float(timed.min())))
    return out | _users(engine, laxity, t.stage)


def _users(engine: Engine, laxity: npt.NDArray[np.float64], stages: npt.NDArray[np.uint8]) -> Values:
    """By user of the session: transfers and their laxity by stage, and what ended."""
    tally = engine.books.tally
    uids = np.array([transfer.session.uid for transfer in engine.books.transfers.objects], dtype=np.int64)
    names = ("user_transfers", "user_least_laxity_seconds", "user_requests_ended", "user_transfers_ended")
    out: Values = {name: [] for name in names}
    unique, count = np.unique(uids, return_counts=True)
    listed = unique[np.argsort(-count, kind="stable")][:USERS_KEPT].tolist()
    groups = [(str(uid), uids == uid) for uid in listed]
    if len(unique) > len(listed):
        groups.append((OTHER, ~np.isin(uids, listed)))
    for user, of in groups:
        for stage in _STAGES:
            these = of & (stages == stage)
            if these.any():
                where, timed = (user, stage.name.lower()), laxity[these & np.isfinite(laxity)]
                out["user_transfers"].append((where, int(these.sum())))
                if len(timed):
                    out["user_least_laxity_seconds"].append((where, float(timed.min())))
    for uid, (late, met) in tally.users.items():
        user = OTHER if uid is None else str(uid)
        out["user_requests_ended"] += [((user, "met"), met), ((user, "missed"), late)]
    for (uid, of_stage), (late, met) in tally.due().items():
        where = (OTHER if uid is None else str(uid), of_stage.name.lower())
        out["user_transfers_ended"] += [((*where, "met"), met), ((*where, "missed"), late)]
    return out


def _uses(engine: Engine) -> Values:
    """What users' connections move, by device; those that move most, the others added up."""
    names = ("user_moved_bytes_per_second", "user_urgent_bytes_per_second", "user_allowed_bytes_per_second",
             "user_demotions")  # fmt: skip
    out: Values = {name: [] for name in names}
    rest: dict[str, list[float]] = {}
    for n, use in enumerate(engine.steering.urgency.uses()):
        figures = (use.moved, use.urgent, use.allowed, use.demotions)
        if n < USERS_KEPT:
            for name, value in zip(names, figures, strict=True):
                out[name].append(((str(use.uid), use.device), value))
        else:
            rest[use.device] = [a + b for a, b in zip(rest.get(use.device, [0.0] * 4), figures, strict=True)]
    for device, sums in rest.items():
        for name, value in zip(names, sums, strict=True):
            out[name].append(((OTHER, device), value))
    return out


def _histograms(engine: Engine) -> dict[str, Mapping[str, Histogram]]:
    found = engine.books.tally.histograms()
    return {
        "rescue_latency_seconds": found["rescue"],
        "request_slack_seconds": found["request_slack"],
        "transfer_slack_seconds": found["slack"],
        "transfer_queue_seconds": found["queue"],
        "transfer_wire_seconds": found["wire"],
    }


def _seen(engine: Engine, index: int, device: Device, figures: Figures, users: npt.NDArray[np.int64]) -> Seen:
    guarantees, estimator = engine.steering.guarantees, device.estimator
    shares = guarantees.shares(index) if device.floors else {}
    standing = {band: shares[band] * estimator.rate for band in guarantees.standing(index) if band in shares}
    return Seen(
        device,
        figures,
        users,
        {
            "device_attached": float(bool(device.hook)),
            "device_needs_care": float(bool(device.notice or device.failure)),
            "device_rate_bytes_per_second": device.estimator.configured,
            "device_measured_bytes_per_second": device.estimator.measured,
            "device_busy_ratio": device.estimator.utilisation,
        },
        {
            "band_guaranteed_bytes_per_second": guarantees.given(index),
            "band_standing_bytes_per_second": standing,
            "band_got_bytes_per_second": dict(enumerate((estimator.band_load * estimator.rate).tolist())),
        },
    )


# --- in the thread of whoever asks ------------------------------------------------------------------------------------


class Collector:
    """prometheus_client's way to ask; ``take`` returns a snapshot and may wait for the event loop."""

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take

    def collect(self) -> Iterator[Family]:
        """All families, in the order in which they are described."""
        taken = self._take()
        values = taken.values | _device_values(taken)
        for metric in METRICS:
            family = _family(metric.name)
            if metric.kind == "info":
                family.add_metric((), taken.build)
            elif metric.kind == "histogram":
                for stage, histogram in taken.histograms[metric.name].items():
                    family.add_metric((stage,) if metric.labels else (), _buckets(histogram), histogram.sum)
            else:
                for labels, value in values[metric.name]:
                    family.add_metric(labels, value)
            yield family


def _family(name: str) -> Any:
    metric = BY_NAME[name]
    # The label names of an info are those of its value.
    labels = () if metric.kind == "info" else metric.labels
    unit = {} if metric.kind == "info" else {"unit": metric.unit}
    return _MAKE[metric.kind](f"{PREFIX}{name}", metric.what, labels=labels, **unit)


def _device_values(taken: Snapshot) -> Values:
    """What is counted by device."""
    out: Values = {m.name: [] for m in METRICS if "device" in m.labels and "user" not in m.labels}
    for seen in taken.devices:
        device = seen.device
        name, backend = device.name, device.backend
        for metric, value in seen.values.items():
            out[metric].append(((name,), value))
        out["device_shaped"].append(((name, backend), float(bool(backend))))
        out["classified_packets"] += [((name, counter), n) for counter, n in seen.figures.stats.items()]
        rate = device.estimator.configured if device.floors else 0.0
        for row in seen.figures.bands:
            band, floor = taken.bands[row.index]
            for metric, value in (
                ("band_sent_bytes", row.bytes),
                ("band_sent_packets", row.packets),
                ("band_dropped_packets", row.drops),
                ("band_queued_bytes", row.backlog),
                ("band_floor_bytes_per_second", floor * rate),
                ("band_connections", int(seen.connections[row.index])),
            ):
                out[metric].append(((name, band), value))
            for metric, rates in seen.rates.items():
                out[metric].append(((name, band), rates.get(row.index, 0.0)))
    return out


def _buckets(histogram: Histogram) -> list[Any]:
    """(upper bound, how many are not above it, exemplar or None) of each bucket."""
    out: list[Any] = []
    total = 0
    for bound, n, one in zip((*histogram.bounds, INF), histogram.counts, histogram.exemplars, strict=True):
        total += n
        example = None if one is None else Exemplar({REQUEST_LABEL: one.request[:REQUEST_MAX]}, one.value)
        out.append(("+Inf" if bound == INF else repr(bound), total, example))
    return out


def registry_of(take: Callable[[], Snapshot]) -> CollectorRegistry:
    """Ours and the process's own (process_cpu_seconds_total, process_resident_memory_bytes, ...)."""
    registry = CollectorRegistry()
    registry.register(Collector(take))
    ProcessCollector(registry=registry)
    return registry


def text_of(registry: CollectorRegistry) -> str:
    """OpenMetrics' text format."""
    exposed: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]
    return exposed.decode()
