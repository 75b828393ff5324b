# SPDX-License-Identifier: Apache-2.0
"""The lab: a serving cluster in network namespaces on one machine, with real TCP and real daemons.

net.py builds hosts and links, governor.py runs an mfsd daemon in a host, trace.py and workload.py say what is asked,
traffic.py moves bytes, rank.py and decode.py play the serving processes, arm.py runs one experiment, and results.py,
page.py and demo.py tell what came out.
"""
