# SPDX-License-Identifier: Apache-2.0
"""mfsd: per-host traffic shaping that makes LLM serving meet its time-to-first-token deadlines."""

__version__ = "0.2.0"
