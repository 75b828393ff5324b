# SPDX-License-Identifier: Apache-2.0
"""The daemon: command line, life cycle, devices, configuration."""
