# SPDX-License-Identifier: Apache-2.0
"""The classifier in the kernel: loaders, maps, keys, hooks."""
