#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Panels of the Grafana dashboard drawn by matplotlib, from what a real Prometheus answers: where there is no Grafana.

dashboard.py ANSWERS PICTURE

ANSWERS is JSON: {title of a panel: {"unit": ..., "series": {legend: [[seconds, value], ...]}}}; the test of the metrics
writes it (MFSD_DASHBOARD names the file).
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "mfsd"
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of how

ACROSS: Final = 3
SCALES: Final = {"Bps": (8e-6, "Mbit/s"), "bytes": (1e-3, "kB"), "s": (1e3, "ms"), "percentunit": (100, "%")}
"""From a unit of Grafana's to what is drawn."""


def main(answers: str, picture: str) -> None:
    """Draw a panel for each title that has an answer."""
    panels: dict[str, dict[str, Any]] = json.loads(Path(answers).read_text())
    rows = math.ceil(len(panels) / ACROSS)
    figure, axes = plt.subplots(rows, ACROSS, figsize=(5 * ACROSS, 2.8 * rows), squeeze=False)
    flat = list(axes.flat)
    for axis, (title, panel) in zip(flat, panels.items(), strict=False):
        factor, unit = SCALES.get(panel["unit"], (1.0, ""))
        for legend, points in sorted(panel["series"].items()):
            values = [value * factor for _, value in points]
            axis.plot([at for at, _ in points], values, label=legend, linewidth=1.3)
        axis.set_title(f"{title}{f' ({unit})' if unit else ''}", fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=6, loc="upper left", ncols=2, frameon=False)
    for axis in flat[len(panels) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
