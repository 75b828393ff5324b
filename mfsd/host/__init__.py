# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of this host: sockets, processes, routes."""
