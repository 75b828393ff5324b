# SPDX-License-Identifier: Apache-2.0
"""Scheduling policies; see base.py for what each of them sees and decides."""
