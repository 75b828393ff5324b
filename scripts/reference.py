#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Reference pages from the one truth each: commands from click, configuration from its models.

reference.py man FOLDER           mfsctl.1, mfsd.8, mfsd.toml.5 (needs go-md2man)
reference.py completions FOLDER   mfsctl and mfsd for bash, zsh, fish
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click
from click.shell_completion import get_completion_class

import mfsd
from mfsd.cli.app import mfsctl
from mfsd.daemon import config_text
from mfsd.daemon.config import Config
from mfsd.daemon.main import main as daemon
from mfsd.daemon.reload import RELOADABLE, RELOADABLE_SECTIONS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator


ROOT: Final = Path(__file__).resolve().parent.parent
SHELLS: Final = {"bash": "{0}", "zsh": "_{0}", "fish": "{0}.fish"}
"""Shell -> name of a program's completion file."""


@dataclass(frozen=True, slots=True)
class Page:
    """One page, as Markdown without its title."""

    name: str
    section: int
    """Of the manual; 0: not in it."""
    what: str
    body: str
    see_also: str = ""


# --- commands ---------------------------------------------------------------------------------------------------------


def _text(help_: str | None) -> str:
    r"""Help of click as Markdown: what follows a line of its own with \b is set as it is."""
    out = []
    for block in inspect.cleandoc(help_ or "").split("\n\n"):
        fenced = block.startswith("\b")
        lines = block.removeprefix("\b").strip("\n")
        out.append("```\n" + lines + "\n```" if fenced else lines)
    return "\n\n".join(out)


def _parameters(command: click.Command, leave_out: Collection[str | None] = ()) -> str:
    context = click.Context(command, info_name=command.name)
    records = [p.get_help_record(context) for p in command.params if p.name not in leave_out]  # but for --help
    return "\n".join(f"`{r[0]}`\n: {r[1]}\n" for r in records if r is not None)


def _walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield from _walk(inner, f"{path} {name}")


def _usage(command: click.Command, path: str) -> str:
    pieces = command.collect_usage_pieces(click.Context(command))
    return f"`{' '.join([path, *pieces])}`"


def commands() -> Page:
    """Mfsctl with all that it can do."""
    top = [_text(mfsctl.help), _usage(mfsctl, "mfsctl"), "Every command takes:\n\n" + _parameters(mfsctl)]
    of_all = {p.name for p in mfsctl.params}
    for path, command in _walk(mfsctl, "mfsctl"):
        if command is mfsctl:
            continue
        parts = [f"## {path}", _text(command.help), _usage(command, path), _parameters(command, of_all)]
        top.append("\n\n".join(p for p in parts if p))
    top.append("## Exit codes\n\n" + (mfsctl.epilog or "").removeprefix("Exit codes: ").capitalize())
    return Page("mfsctl", 1, "operate mfsd", "\n\n".join(top), "**mfsd**(8), **mfsd.toml**(5), **tc**(8)")


def daemon_page() -> Page:
    """The daemon's own command line."""
    body = [_text(daemon.help), _usage(daemon, "mfsd"), _parameters(daemon)]
    signals = (
        "## Signals\n\n`SIGHUP`\n: Read the configuration again; what needs a restart is named in the log.\n\n"
        "`SIGTERM`, `SIGINT`\n: Put the qdiscs back and end.\n\n"
        "`SIGUSR1`\n: End, and leave qdiscs (and, with a service manager, classifiers) at work for the next mfsd.\n\n"
        "`SIGUSR2`\n: Log everything until it comes again, or until a reload.\n"
    )
    files = (
        "## Files\n\n`/etc/mfsd/mfsd.toml`, `/etc/mfsd/conf.d/*.toml`\n: The configuration, see mfsd.toml(5).\n\n"
        "`/run/mfsd/mfsd.sock`\n: The API. Who may write to it may send hints: the group mfsd.\n\n"
        "`/run/mfsd/*.json`\n: What was on each device before; `mfsctl restore` puts it back after a `kill -9`.\n"
    )
    codes = "## Exit codes\n\n0 ended as asked; 1 can't start; 78 the configuration is faulty.\n"
    return Page(
        "mfsd", 8, "shape traffic so that LLM requests meet their deadlines",
        "\n\n".join([*body, signals, files, codes]), "**mfsctl**(1), **mfsd.toml**(5), **tc**(8)",
    )  # fmt: skip


# --- configuration ----------------------------------------------------------------------------------------------------


def configuration() -> Page:
    """Every key with its meaning, default, what is allowed, and whether a reload changes it."""
    out = [
        inspect.cleandoc("""
            TOML. `mfsd --check-config` prints what is in force, or every problem at once. A file that is faulty changes
            nothing.

            `/etc/mfsd/conf.d/*.toml` are read after `/etc/mfsd/mfsd.toml`, in the order of their names. Tables are
            merged key by key; the later file wins. `[[device]]`, `[[peer]]` and `[[rule]]` entries are added; one for a
            device, network or name that an earlier file has changes that one's keys.
        """),
        "Keys marked *reload* change in a running daemon (`systemctl reload mfsd`), the others at its next start.",
    ]
    for section in config_text.sections(Config):
        name = f"[[{section.name}]]" if section.repeated else f"[{section.name}]"
        out.append(f"## {name}\n\n{section.what}")
        for k in section.keys:
            reload = section.name in RELOADABLE_SECTIONS or f"{section.name}.{k.name}" in RELOADABLE
            default = "unset" if k.default is None else f"`{k.default}`"
            default = "required" if k.required else f"default {default}"
            marks = f"{default}; {_code(k.allowed)}{'; *reload*' if reload else ''}"
            out.append(f"`{section.name}.{k.name}`\n: {k.what} ({marks})")
    return Page("mfsd.toml", 5, "configuration of mfsd", "\n\n".join(out), "**mfsd**(8), **mfsctl**(1)")


def _code(allowed: str) -> str:
    return re.sub(r'"[^"]*"', lambda m: f"`{m[0]}`", allowed)


# --- output -----------------------------------------------------------------------------------------------------------

PAGES: Final = {"mfsctl": commands, "mfsd": daemon_page, "mfsd.toml": configuration}


def manual(folder: Path) -> None:
    """Write the pages that are in the manual, for man(1)."""
    folder.mkdir(parents=True, exist_ok=True)
    epoch = time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", "0")) or time.time())
    date = time.strftime("%Y-%m-%d", epoch)
    for page in (make() for make in PAGES.values()):
        body = page.body.replace("\n## ", "\n# ")
        if page.section == 8:  # sections of a manual are in capitals, but for names
            body = re.sub(r"^# .*$", lambda m: m[0].upper(), body, flags=re.MULTILINE)
        source = f"""% "{page.name.upper()}" "{page.section}" "{date}" "mfsd {mfsd.__version__}"

# NAME

{page.name} - {page.what}

# DESCRIPTION

{body}

# SEE ALSO

{page.see_also}
"""
        done = subprocess.run(["/usr/bin/go-md2man"], input=source.encode(), capture_output=True, check=True)
        # groff 1.23 warns of the font C on terminals, which have none; bold is what it is beside it.
        text = done.stdout.replace(rb"\fB\fC", rb"\fB").replace(rb"\fC", rb"\fB")
        (folder / f"{page.name}.{page.section}").write_bytes(text)


def completions(folder: Path) -> None:
    """Write the completion scripts."""
    for shell, pattern in SHELLS.items():
        (folder / shell).mkdir(parents=True, exist_ok=True)
        make = get_completion_class(shell)
        if make is None:
            raise LookupError(shell)
        for program, command in (("mfsctl", mfsctl), ("mfsd", daemon)):
            source = make(command, {}, program, f"_{program.upper()}_COMPLETE").source()
            (folder / shell / pattern.format(program)).write_text(source)


def main(what: str, folder: str) -> None:
    """See the module."""
    {"man": manual, "completions": completions}[what](Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
