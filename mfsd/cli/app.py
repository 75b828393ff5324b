# SPDX-License-Identifier: Apache-2.0
"""The command tree of mfsctl, with nothing imported that the command at hand doesn't need."""

from __future__ import annotations

import difflib
import functools
import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self, cast

import click
from click.shell_completion import CompletionItem

from mfsd import __version__

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_SOCKET: Final = "/run/mfsd/mfsd.sock"
"""As ``daemon.socket`` of the configuration (mfsd.daemon.config, which is too heavy to import here)."""
DEFAULT_CONFIG: Final = "/etc/mfsd/mfsd.toml"

COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "status": ("show", "Devices, bands, link and counts on one screen."),
    "connections": ("show", "Connections that mfsd knows, most urgent first."),
    "transfers": ("show", "Transfers that are not finished, most urgent first."),
    "watch": ("show", "Status again and again."),
    "top": ("top", "Bands, the busiest connections and deadlines at risk, live."),
    "rules": ("rules", "Rules of the configuration, and what they say of a connection."),
    "explain": ("show", "Why a connection or transfer is at its level."),
    "trace": ("stats", "Where the time of a request went."),
    "record": ("record", "Write hints and decisions to a file, for `mfsd-lab replay`."),
    "stats": ("stats", "Print the metrics, and (--help) what each means."),
    "log-level": ("stats", "Show or change how much the daemon logs."),
    "plan": ("act", "What mfsd would change on the devices, or has changed."),
    "observe": ("act", "Classify, count and predict, but leave packets alone."),
    "enforce": ("act", "Steer packets."),
    "pause": ("act", "Stop steering at once; hints and qdiscs stay."),
    "resume": ("act", "Steer again after a pause."),
    "restore": ("act", "Put the devices' qdiscs back as they were found."),
    "doctor": ("doctor", "Check this machine and say what each finding means."),
    "transports": ("transports", "Who moves bulk bytes over TCP, beside RDMA links and their classes."),
    "support-bundle": ("bundle", "What whoever helps needs to know, in one file without secrets."),
    "hint": ("hint", "Send one hint by hand."),
    "version": ("meta", "Versions of mfsctl and of the daemon."),
    "completion": ("meta", "Print a shell's completion script."),
}
"""Module of mfsd.cli and help line per command, in the order of --help."""


TLS: Final = {"ca": "Who has signed its certificate", "cert": "Our certificate", "key": "Our private key"}
"""Of a daemon over TCP, by option --tls-NAME and variable MFSD_TLS_NAME: files, PEM."""


class Target(str):
    """Where the daemon listens, and over TCP the files of certificates that it takes, by name in TLS."""

    __slots__ = ("tls",)
    tls: dict[str, str]

    @classmethod
    def of(cls, socket: str, tls: dict[str, str]) -> Self:
        """Raises UsageError when the files can't be for this target, or some are missing."""
        made = cls(socket)
        made.tls = tls
        missing = [name for name in TLS if name not in tls]
        if tls and missing:
            raise click.UsageError(f"--tls-{missing[0]} (or $MFSD_TLS_{missing[0].upper()}) is missing: give all three")
        return made


@dataclass(slots=True)
class Globals:
    """What every command is told."""

    socket: str
    """As the command line says it, a Target."""
    json: bool


class LazyGroup(click.Group):
    """Imports a command's module when the command runs or shows its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of COMMANDS."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import what is asked for."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mfsd.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)  # noqa: S101 - COMMANDS names commands only
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say which command was meant, where one is near."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as e:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if not near:
                raise
            raise click.UsageError(f"{e.message} Did you mean {near[0]!r}?", ctx) from e

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names without importing them."""
        items = [CompletionItem(n, help=text) for n, (_, text) in COMMANDS.items() if n.startswith(incomplete)]
        return items + click.Command.shell_complete(self, ctx, incomplete)


def _json_option() -> Callable[[Any], Any]:
    return click.option("--json", "json_", is_flag=True, help="Print JSON instead of tables.")


def _socket_option() -> Callable[[Any], Any]:
    return click.option(
        "--socket",
        "socket_",
        metavar="PATH|HOST:PORT",
        help=f"Where the daemon listens. Default: $MFSD_SOCKET, else {DEFAULT_SOCKET}.",
    )


def _tls_options() -> Callable[[Any], Any]:
    def wrap(f: Any) -> Any:
        for name, what in reversed(TLS.items()):
            f = click.option(
                f"--tls-{name}",
                metavar="FILE",
                help=f"{what}, PEM, for a daemon at HOST:PORT with TLS. Default: $MFSD_TLS_{name.upper()}.",
            )(f)
        return f

    return wrap


def command(name: str, cls: type[click.Command] = click.Command) -> Callable[[Callable[..., None]], click.Command]:
    """Declare a command of mfsctl: it gets ``g: Globals`` and takes --socket and --json, too.

    Its help is the docstring.
    """

    def wrap(f: Callable[..., None]) -> click.Command:
        made: click.Command = click.command(name, cls)(with_globals(f))
        return made

    return wrap


def with_globals(f: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that all commands have; those given last win."""

    @functools.wraps(f)
    def run(ctx: click.Context, /, socket_: str | None, *, json_: bool, **kwargs: Any) -> None:
        outer = ctx.find_root().params
        socket = socket_ or outer.get("socket_") or os.environ.get("MFSD_SOCKET") or DEFAULT_SOCKET
        tls = {}
        for name in TLS:
            given = kwargs.pop(f"tls_{name}") or outer.get(f"tls_{name}") or os.environ.get(f"MFSD_TLS_{name.upper()}")
            if given:
                tls[name] = given
        f(Globals(Target.of(socket, tls), json_ or bool(outer.get("json_"))), **kwargs)

    own = len(getattr(f, "__click_params__", ()))
    options: Any = _json_option()(_socket_option()(_tls_options()(click.pass_context(run))))
    # click lists them from the last to the first: a command's own come before those of all commands.
    options.__click_params__ = options.__click_params__[own:] + options.__click_params__[:own]
    return cast("Callable[..., None]", options)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
    epilog="Exit codes: 0 fine; 1 bad news (not found, refused, rejected, a failure found); 2 wrong usage; "
    "3 the daemon can't be reached; 4 not permitted.",
)
@_json_option()
@_socket_option()
@_tls_options()
@click.version_option(__version__, message="mfsctl %(version)s", help="Print the version of mfsctl, and end.")
def mfsctl(socket_: str | None, *, json_: bool, **tls: str | None) -> None:
    """Operate mfsd: see what it does, plan, steer, undo."""
    del socket_, json_, tls  # read by with_globals
