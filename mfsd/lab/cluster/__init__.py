# SPDX-License-Identifier: Apache-2.0
"""The cluster lab: prefill instances, stores and decode hosts as namespaces with an mfsd each, on real TCP.

regimes.py  what a cluster looks like       jobs.py     what is asked of it, and when
network.py  hosts, links, switch, daemons   arms.py     how it is governed
lanes.py    bytes over TCP                  hinter.py   what the daemons are told
teller.py   the process that tells them     serving.py  instances, stores, decode
cell.py     one run: arm, regime, load, seed
matrix.py   which cells, in which order     evaluate.py figures with confidence intervals
report.py   tables, plots, page             app.py      ``mfsd lab``
"""
