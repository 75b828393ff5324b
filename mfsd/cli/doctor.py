# SPDX-License-Identifier: Apache-2.0
"""doctor: the checks of mfsd.doctor, and what a running daemon has noticed, as text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Final

import click
from rich.text import Text

from mfsd import doctor as checks
from mfsd.cli import output
from mfsd.cli.app import Globals, command
from mfsd.cli.connect import TIMEOUT_S, control
from mfsd.cli.errors import CliError, Exit, UnreachableError
from mfsd.cli.offline import read_config
from mfsd.ground import tables
from mfsd.v1 import control_pb2 as pb

STYLES: Final = {
    checks.Severity.OK: "green",
    checks.Severity.INFO: "cyan",
    checks.Severity.WARN: "yellow",
    checks.Severity.FAIL: "red",
}


@command("doctor")
@click.option("--device", "devices", multiple=True, help="Check this device; may be given several times.")
@click.option("--config", metavar="FILE", help="The configuration whose devices and folders to check.")
@click.option("--all", "everything", is_flag=True, help="Explain what is fine, too.")
def doctor(g: Globals, devices: tuple[str, ...], config: str | None, *, everything: bool) -> None:
    """Check this machine and say what each finding means.

    Changes nothing and needs no daemon. Ends with exit code 1 if there is a failure.
    """
    settings = read_config(config, needed=False)
    findings = checks.run(devices, settings) + told(str(settings.daemon.socket))
    if g.json:
        output.print_json({"findings": [dataclasses.asdict(f) for f in findings]})
    else:
        _print(findings, everything=everything)
    if any(f.severity is checks.Severity.FAIL for f in findings):
        raise click.exceptions.Exit(Exit.BAD_NEWS)


def told(target: str) -> list[checks.Finding]:
    """What a running daemon itself has noticed; nothing where none answers, which `state.socket` says."""
    try:
        with control(target) as daemon:
            notices = daemon.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).notices
    except UnreachableError:
        return []
    except CliError as e:
        words = "Can't ask mfsd what it has noticed", e.format_message(), "whether all is well with it is unknown"
        return [checks.Finding("state.notices", checks.Severity.INFO, *words)]
    meaning, fix = "mfsd can't mend this by itself, or has not yet", "see mfsctl status, and docs/troubleshooting.md"
    return [
        checks.Finding(f"state.notices:{n}", checks.Severity.WARN, "mfsd has noticed something", text, meaning, fix)
        for n, text in enumerate(notices, 1)
    ] or [checks.Finding("state.notices", checks.Severity.OK, "mfsd has noticed nothing odd", target)]


def _print(findings: list[checks.Finding], *, everything: bool) -> None:
    console = tables.console()
    for f in findings:
        title, name = tables.printable(f.title), tables.printable(f.id)  # with a device's, as it was typed
        head = Text.assemble((f"{f.severity:<5}", STYLES[f.severity]), f"{title}  ", (name, "dim"))
        console.print(head)
        if f.severity is checks.Severity.OK and not everything:
            continue
        explain(f)
    counts = Counter(f.severity for f in findings)
    console.print(Text(", ".join(f"{counts[s]} {s}" for s in checks.Severity)))


def explain(f: checks.Finding) -> None:
    """What was seen, what it means, and what to do, below the title of a finding."""
    for label, text in (("seen", f.detail), ("means", f.meaning), ("do", f.fix)):
        if text:
            output.echo(output.paragraph(f"{label}: {text}", " " * 5))
