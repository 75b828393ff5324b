# SPDX-License-Identifier: Apache-2.0
"""The bands in the kernel: qdisc trees, planned, made, verified and purged."""
