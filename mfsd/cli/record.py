# SPDX-License-Identifier: Apache-2.0
"""``mfsctl record``: hints and decisions into a file, to be run again under another policy (`mfsd-lab replay`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import click

from mfsd.cli import output
from mfsd.cli.app import Globals, command
from mfsd.cli.connect import control
from mfsd.cli.errors import CliError
from mfsd.cli.heard import answers, told_to_end
from mfsd.cli.values import SIZE, SPAN
from mfsd.ground import recording, units
from mfsd.v1 import control_pb2 as pb

LIMIT: Final = "64MB"
EVERY_S: Final = 0.1
"""The daemon sends what has happened so often."""


@command("record")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--for", "seconds", type=SPAN, default="0s", help="Stop after so long, e.g. 10min; 0s: at Ctrl-C.")
@click.option("--max-size", type=SIZE, default=LIMIT, show_default=True, help="Stop when the file has come to so much.")
def record(g: Globals, file: Path, seconds: float, max_size: int) -> None:
    """Write hints and decisions to FILE until Ctrl-C, or until it is told to end (SIGTERM, a closed terminal).

    `mfsd-lab replay FILE --policy NAME` says what another policy would have made of them. The file has the names that
    workers gave to requests and transfers, their sizes and times, and nothing of what was sent.
    """
    end = time.monotonic() + seconds if seconds else float("inf")
    try:
        writer = recording.Writer(file, max_size)
    except FileExistsError:
        raise CliError(f"{file} is there already; choose another name") from None
    except OSError as e:
        raise CliError(f"can't write {file}: {e.strerror}") from None
    why, begin = "the daemon ended the stream", time.monotonic()
    with writer:
        try:
            with control(g.socket) as daemon, told_to_end():
                call = daemon.Record(pb.RecordRequest())
                for reply in answers(call, g.socket, every=EVERY_S, shown=False):
                    if not writer.write(reply.lines):
                        why = f"the file has come to {units.size(max_size)}"
                        break
                    if time.monotonic() >= end:
                        why = f"{units.duration(seconds)} are over"
                        break
        except KeyboardInterrupt as e:
            why = str(e) or "Ctrl-C"
        except CliError:
            if not writer.lines:  # nothing is in it
                file.unlink()
            raise
    took, size, events = time.monotonic() - begin, file.stat().st_size, max(writer.lines - 1, 0)
    if g.json:
        told = {"file": str(file), "events": events, "bytes": size, "seconds": round(took, 3), "why": why}
        output.print_json(told)
    else:
        click.echo(f"{events} events in {units.duration(took)}, {units.size(size)}: {file} ({why})")
