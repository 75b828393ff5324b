# SPDX-License-Identifier: Apache-2.0
"""``mfsd-lab``, also ``python -m mfsd.lab``."""

from __future__ import annotations

import sys

from mfsd import WHEEL


def main() -> None:
    """Run a command of app.py, or say what it lacks."""
    try:
        from mfsd.lab.app import main as lab  # noqa: PLC0415 - matplotlib and jinja2 are an extra
    except ImportError as e:
        sys.exit(f"mfsd-lab: {e}; install the extra: pip install '{WHEEL}[lab]'")
    lab(prog_name="mfsd-lab")


if __name__ == "__main__":
    main()
