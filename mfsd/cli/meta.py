# SPDX-License-Identifier: Apache-2.0
"""version and completion."""

from __future__ import annotations

from typing import Final

import click
from click.shell_completion import get_completion_class

from mfsd import __version__
from mfsd.cli.app import Globals, command, mfsctl


@command("version")
@click.option("--client", is_flag=True, help="Don't ask the daemon.")
def version(g: Globals, *, client: bool) -> None:
    """Versions of mfsctl and of the daemon.

    Says so if the daemon does not run; that is no error here.
    """
    daemon: str | None = None
    why = ""
    if not client:
        daemon, why = _daemon_version(g.socket)
    if g.json:
        import json  # noqa: PLC0415 - output.py would bring protobuf and rich, and this command must be quick

        click.echo(json.dumps({"mfsctl": __version__, "mfsd": daemon}))
        return
    click.echo(f"mfsctl {__version__}")
    if not client:
        click.echo(why if daemon is None else f"mfsd {daemon}")


def _daemon_version(socket: str) -> tuple[str | None, str]:
    import os  # noqa: PLC0415 - see below

    if "/" in socket and not os.path.exists(socket.removeprefix("unix:")):  # noqa: PTH110 - pathlib costs 10 ms here
        return None, f"mfsd is not running (no socket {socket})"
    # gRPC takes 0.2 s to import, so only where somebody may answer.
    from mfsd.cli.connect import TIMEOUT_S, control  # noqa: PLC0415 - see above
    from mfsd.cli.errors import CliError  # noqa: PLC0415 - see above
    from mfsd.v1 import control_pb2 as pb  # noqa: PLC0415 - see above

    try:
        with control(socket) as stub:
            return stub.GetStatus(pb.GetStatusRequest(), timeout=TIMEOUT_S).version, ""
    except CliError as e:
        return None, e.format_message()


COMPLETION_HELP: Final = """Print a shell's completion script.

\b
bash: mfsctl completion bash > /etc/bash_completion.d/mfsctl
zsh:  mfsctl completion zsh > "${fpath[1]}/_mfsctl"
fish: mfsctl completion fish > ~/.config/fish/completions/mfsctl.fish
"""


@click.command("completion", help=COMPLETION_HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script."""
    kind = get_completion_class(shell)
    if kind is None:  # click knows all three; the Choice above has refused others
        raise click.UsageError(f"no completion for {shell}")
    click.echo(kind(mfsctl, {}, "mfsctl", "_MFSCTL_COMPLETE").source())
