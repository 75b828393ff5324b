# SPDX-License-Identifier: Apache-2.0
"""Real vLLM under mfsd: two engines in two network namespaces, KV over NIXL's UCX backend on TCP.

engine.py    one engine, a program of vLLM's own environment   engines.py  the same, seen from the experiment
hosts.py     two hosts, their link and their daemons           play.py     one cell: requests and competitors
suite.py     arms and cells in their order                     report.py   table, pictures, page
"""
