# SPDX-License-Identifier: Apache-2.0
"""Serving programs that send hints: what each needs is imported when its module is, and nothing of it is needed here.

Nothing in here raises into the program, or makes it wait, for want of a daemon.
"""
