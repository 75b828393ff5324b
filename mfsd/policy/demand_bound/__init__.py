# SPDX-License-Identifier: Apache-2.0
"""The default policy: every transfer that can be in time is guaranteed what it needs for that, and no more."""
