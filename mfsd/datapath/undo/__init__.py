# SPDX-License-Identifier: Apache-2.0
"""The way back: what was on a device before, written down and put back."""
