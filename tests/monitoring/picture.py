#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Panels of the Grafana dashboard from a real run, drawn by matplotlib, because Grafana is not in Debian.

.venv/bin/python tests/monitoring/picture.py docs/pictures/dashboard.svg    (as root; half a minute)

A daemon with the default policy shapes one end of a veth pair to 1 Gbit/s. Two connections of stage 3 have requests to
meet, one after the other, beside two saturating connections: a marked collective and an unhinted one. A real Prometheus
scrapes; what it answers to the dashboard's own queries is drawn.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib as mpl  # noqa: E402 - after the path

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "mfsd"
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of how
from support.namespaces import joined_namespaces  # noqa: E402
from support.prometheus import DASHBOARD, FOLDER, Prometheus, watching  # noqa: E402
from support.rig import Daemon, flows, running  # noqa: E402

from mfsd.client import Stage  # noqa: E402

if TYPE_CHECKING:
    from support.rig import Flow

TARGET: Final = "127.0.0.1:9464"
SECONDS: Final = 24.0
WINDOW: Final = "2s"
SIZE: Final = 60_000_000
LEFT_S: Final = 2.0
"""Deadline of each request, 60 MB: twice in turns that is half of the link."""
SHOWN: Final = (
    "Sent by band", "Got by band", "Guaranteed by band", "Queued by band", "Promotions and rescues",
    "Slack at the end", "Least laxity now", "Moved by user", "Rescue latency",
)  # fmt: skip
ACROSS: Final = 3
SCALES: Final = {"Bps": (8e-6, "Mbit/s"), "bytes": (1e-3, "kB"), "s": (1e3, "ms"), "percentunit": (100, "%")}
"""From a unit of Grafana's to what is drawn."""


def serve(daemon: Daemon, opened: list[Flow]) -> None:
    """Requests on the first two connections, for so long."""
    with daemon.client() as client:
        client.mark(opened[2].sender, Stage.COLLECTIVE)
        client.flush(5)
        opened[2].saturate()
        opened[3].saturate()
        end, n = time.monotonic() + SECONDS, 0
        while time.monotonic() < end:
            flow, name = opened[n % 2], f"r{n}"
            client.request(name, ttft_left_s=LEFT_S)
            client.transfer(f"{name}/kv", flow.sender, size=SIZE, stage=Stage.P2D, request=name)
            client.flush(5)
            flow.sender.settimeout(20)
            flow.sender.sendall(bytes(SIZE))
            client.done(request=name)
            n += 1


def answers(prometheus: Prometheus, now: float) -> dict[str, tuple[str, dict[str, list[tuple[float, float]]]]]:
    """By title of a panel its unit and its lines; seconds before now."""
    out = {}
    panels: dict[str, Any] = {panel["title"]: panel for panel in DASHBOARD["panels"]}
    for title in SHOWN:
        lines = {}
        for target in panels[title]["targets"]:
            expression = target["expr"]
            for name, value in (("$__rate_interval", WINDOW), ("$instance", ".*"), ("$device", ".*")):
                expression = expression.replace(name, value)
            found = prometheus.get("query_range", query=expression, start=str(now - SECONDS), end=str(now), step="0.5")
            for one in found["result"]:
                legend = str(target["legendFormat"])
                for label, text in one["metric"].items():
                    legend = legend.replace(f"{{{{{label}}}}}", text)
                points = [(float(at) - now, float(value)) for at, value in one["values"]]
                points = [(at, value) for at, value in points if math.isfinite(value)]
                if any(value for _, value in points):
                    lines[legend] = points
        out[title] = str(panels[title]["fieldConfig"]["defaults"].get("unit", "")), lines
    return out


def draw(panels: dict[str, tuple[str, dict[str, list[tuple[float, float]]]]], picture: Path) -> None:
    """A panel each."""
    rows = math.ceil(len(panels) / ACROSS)
    figure, axes = plt.subplots(rows, ACROSS, figsize=(5 * ACROSS, 2.8 * rows), squeeze=False)
    for axis, (title, (kind, lines)) in zip(axes.flat, panels.items(), strict=False):
        factor, unit = SCALES.get(kind, (1.0, ""))
        for legend, points in sorted(lines.items()):
            axis.plot([at for at, _ in points], [v * factor for _, v in points], label=legend, linewidth=1.3)
        axis.set_title(f"{title}{f' ({unit})' if unit else ''}", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(visible=True, alpha=0.3)
        if lines:
            axis.legend(fontsize=6, loc="upper left", ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


def main(picture: str) -> None:
    """Run, ask, draw."""
    with joined_namespaces() as pair, tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(pair, Path(folder))
        daemon.write_config(f'[metrics]\nlisten = "{TARGET}"\n', policy='name = "demand-bound"')
        daemon.config.write_text(daemon.config.read_text().replace("200mbit", "1gbit"))
        with (
            running(daemon),
            watching(pair, Path(folder), TARGET, FOLDER / "rules.yml") as prometheus,
            flows(pair, 4) as opened,
        ):
            serve(daemon, opened)
            found = answers(prometheus, time.time())
    draw(found, Path(picture))


if __name__ == "__main__":
    main(*sys.argv[1:])
