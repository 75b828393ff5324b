# SPDX-License-Identifier: Apache-2.0
"""The kernel side of the house: loading and attaching the classifier, its tables, the qdiscs that obey it."""
