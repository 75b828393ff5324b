# SPDX-License-Identifier: Apache-2.0
"""The hosts of a lab and what is below them: net.py builds, governor.py runs a daemon, health.py watches."""
