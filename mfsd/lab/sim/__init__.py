# SPDX-License-Identifier: Apache-2.0
"""Fluid simulators: the same policies as in the daemon, on links that exist on paper only."""
