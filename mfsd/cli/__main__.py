# SPDX-License-Identifier: Apache-2.0
"""``python -m mfsd.cli`` is mfsctl."""

from mfsd.cli import main

main()
