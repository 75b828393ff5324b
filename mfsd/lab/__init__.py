# SPDX-License-Identifier: Apache-2.0
"""The lab: LLM serving emulated in network namespaces on one machine, on real TCP, with real daemons. ``mfsd-lab``.

settings.py is the page of everything that can be chosen; arms.py says how a cluster may be governed, requests.py (from
traces.py, in sizes of models.py) what it is asked. run.py runs cells one after the other, matrix.py lists those of the
evaluation, app.py is the command line.

hosts/    hosts, links, switch, daemons, the machine's health
serving/  the forward pass, its transports, and who plays it
results/  figures, comparisons, pictures, pages

demo.py is what the demo adds to two cells; promotion.py and bulk.py are an experiment of their own about single
promotions.

The lab knows mfsd from outside: its client, configuration, API, and its policies, to tell the switch what they rank
first.
"""
