# SPDX-License-Identifier: Apache-2.0
"""What of the configuration the engine itself obeys: limits of clients, and rescue. The only defaults are these.

The sections are part of the configuration file (mfsd/daemon/config.py), which checks and words them all alike.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def setting(default: Any, doc: str, *, allowed: str | None = None, **constraints: Any) -> Any:
    """A key with what it means (``doc``) and, where the type does not say it, what is allowed."""
    extra: dict[str, Any] | None = {"allowed": allowed} if allowed else None
    return Field(default, description=doc, json_schema_extra=extra, **constraints)


def as_tuple(value: Any) -> Any:
    """TOML has lists only."""
    return tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    """A section of the configuration file."""

    # strict: in TOML a number in quotes or a bool for a number is a mistake, not something to convert silently.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class LimitsConfig(Section):
    """``[limits]``: how far hints are believed, and how much one client may ask."""

    max_hints_per_batch: int = setting(1024, "Hints in one message.", ge=1, le=65_536)
    max_requests_per_batch: int = setting(1024, "Members of one batch of requests.", ge=1, le=65_536)
    max_deadline_s: float = setting(
        600.0, "Deadlines further away (or longer past) than this are refused.", ge=0.001, le=86_400
    )
    min_deadline_ms: float = setting(
        1.0, "Nearer deadlines, but for those that are over, are moved to this one.", ge=0, le=60_000
    )
    max_defer_s: float = setting(300.0, "Transfers that may be held back for longer are refused.", ge=0.001, le=86_400)
    min_defer_ms: float = setting(100.0, "Shorter times to be held back for are raised to this one.", ge=0, le=60_000)
    default_ttl_s: float = setting(30.0, "Life of a hint that names none.", ge=0.001, le=86_400)
    max_ttl_s: float = setting(600.0, "Longer lives are cut to this one.", ge=0.001, le=86_400)
    max_transfer_bytes: int = setting(1 << 40, "Size of one transfer.", ge=1, le=1 << 50)
    max_layers: int = setting(4096, "Layers of a model.", ge=1, le=1 << 20)
    max_id_bytes: int = setting(256, "Length of an identifier in UTF-8.", ge=64, le=4096)
    max_sessions: int = setting(1024, "Client processes at a time, of all users.", ge=1, le=65_536)
    max_sessions_per_user: int = setting(256, "Client processes of one user at a time.", ge=1, le=65_536)
    max_connections_per_user: int = setting(
        8192, "Connections that one user's hints name at a time; of daemon.slots.", ge=1, le=1 << 20
    )
    max_selectors: int = setting(8192, "Selectors by port or process, of all users.", ge=1, le=1 << 20)
    max_selectors_per_user: int = setting(2048, "The same of one user.", ge=1, le=1 << 20)
    max_transfers: int = setting(131_072, "Unfinished transfers of all users.", ge=1, le=1 << 22)
    max_transfers_per_user: int = setting(65_536, "Unfinished transfers of one user.", ge=1, le=1 << 22)
    max_mb_per_user: float = setting(
        48.0, "Memory for what one user has said: requests, batches, transfers, their names.", ge=0.001, le=65_536
    )
    max_requests_per_session: int = setting(16_384, "Requests of one session at a time.", ge=1, le=1 << 20)
    max_batches_per_session: int = setting(4096, "Batches of one session at a time.", ge=1, le=1 << 20)
    max_transfers_per_session: int = setting(65_536, "Unfinished transfers of one session.", ge=1, le=1 << 22)
    max_marks_per_session: int = setting(1024, "Connection marks of one session.", ge=1, le=65_536)


class TenantsConfig(Section):
    """``[tenants]``: how urgent one tenant's traffic may be. A tenant is a user: whoever owns the socket."""

    urgent_share: float = setting(
        1.0,
        "Share of a device's rate that one user's connections may move on bands above unhinted traffic; what is beyond "
        "it waits below that.",
        ge=0.01,
        le=1,
    )
    even: bool = setting(
        True,
        "While a device is saturated and several users have hinted traffic there, none may move more in that way than "
        "its even part.",
    )
    burst_ms: float = setting(100.0, "How much of that a user may save up, as time.", ge=20, le=10_000)


class RescueConfig(Section):
    """``[rescue]``: promotions that take effect although packets sit in a starved queue."""

    enabled: bool = setting(True, "Purge the old queue of a promoted TCP connection that does not move.")
    stall_ms: float = setting(2.0, "A promoted connection that has sent nothing for so long is rescued.", ge=0, le=1000)
    max_per_s: int = setting(
        200,
        "Rescues per device and second, in even parts for users who need any; others wait for their queues.",
        ge=1,
        le=10_000,
    )
