# SPDX-License-Identifier: Apache-2.0
"""The ground that every room stands on: words, units, bands, logs, tables. Imports nothing of the house."""
