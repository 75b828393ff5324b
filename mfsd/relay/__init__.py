# SPDX-License-Identifier: Apache-2.0
"""Hints that cross hosts: who waits for bytes tells the daemon of the host that sends them.

A worker always talks to the daemon of its own host. Where the selector of a hint names another host as the source, and
that host's daemon is known (table.py), the hint is handed on to it (outgoing.py) over gRPC with certificates on both
sides, and what that daemon has to say comes back as the worker's events. The other side (incoming.py) takes hints from
those on its list only, and only about bytes that go to who says it.
"""
