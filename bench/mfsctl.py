# SPDX-License-Identifier: Apache-2.0
"""How long `mfsctl status` takes from its start to its end, beside an interpreter that imports gRPC and does nothing.

A daemon without devices answers; what else is asked of it costs it next to nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from bench.common import Figure, parser, write
from bench.parts.host import daemon

if TYPE_CHECKING:
    from collections.abc import Sequence

RUNS = 21


def median_ms(argv: Sequence[str]) -> float:
    """Of so many runs; the first, which fills caches, does not count."""
    took = []
    for _ in range(RUNS + 1):
        begin = time.perf_counter()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
        took.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(took[1:])


def main() -> None:
    """Run and write build/bench/mfsctl.json."""
    parser(__doc__).parse_args()
    with daemon() as mfsd:
        socket = mfsd.target.removeprefix("unix:")
        status = median_ms([sys.executable, "-m", "mfsd.cli", "--socket", socket, "status"])
        grpc = median_ms([sys.executable, "-c", "import grpc"])
    figure = Figure.against("status_ms_p50", status, "ms", target=150, want="at most")
    write("mfsctl", [figure, Figure("import_grpc_ms_p50", grpc, "ms")])


if __name__ == "__main__":
    main()
