# SPDX-License-Identifier: Apache-2.0
"""What policies share: bounds, buckets, parameters, words."""
