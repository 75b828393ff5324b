# SPDX-License-Identifier: Apache-2.0
"""Names of users and groups in the configuration, as numbers."""

from __future__ import annotations

import grp
import pwd
from typing import TYPE_CHECKING

from mfsd.api.identity import Rights

if TYPE_CHECKING:
    from mfsd.daemon.config import DaemonConfig


def rights_of(config: DaemonConfig) -> Rights:
    """Who may do more than a worker. Raises LookupError, whose text names the key."""
    groups: set[int] = set()
    if config.operator_group is not None:
        try:
            groups.add(grp.getgrnam(config.operator_group).gr_gid)
        except KeyError:
            raise LookupError(
                f'daemon.operator_group = "{config.operator_group}": there is no such group on this host'
            ) from None
    users: set[int] = set()
    for name in config.trusted_users:
        try:
            users.add(pwd.getpwnam(name).pw_uid)
        except KeyError:
            raise LookupError(f'daemon.trusted_users: there is no user "{name}" on this host') from None
    return Rights(frozenset(groups), frozenset(users))
