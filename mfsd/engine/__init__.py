# SPDX-License-Identifier: Apache-2.0
"""The engine: what hints said, what became of it, and the levels that follow."""
