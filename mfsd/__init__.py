# SPDX-License-Identifier: Apache-2.0
"""mfsd: per-host traffic shaping that makes LLM serving meet its time-to-first-token deadlines."""

__version__ = "0.2.0"
WHEEL = f"mfsd-{__version__}-py3-none-any.whl"
"""Of `make wheel`; installed by its file, because mfsd is in no package index, where others may take the name."""
