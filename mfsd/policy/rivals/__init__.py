# SPDX-License-Identifier: Apache-2.0
"""What MFS is compared with."""
