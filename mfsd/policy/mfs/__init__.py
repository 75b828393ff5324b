# SPDX-License-Identifier: Apache-2.0
"""MFS as published (arXiv 2603.17456): MLU, RLI, RED, pruning."""
