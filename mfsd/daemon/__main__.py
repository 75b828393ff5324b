# SPDX-License-Identifier: Apache-2.0
"""``python -m mfsd.daemon`` is mfsd."""

from mfsd.daemon.main import main

if __name__ == "__main__":
    main()
