# SPDX-License-Identifier: Apache-2.0
"""The lab: a serving cluster in network namespaces on one machine, with real TCP and real daemons.

net.py builds hosts and links, governor.py runs an mfsd daemon in a host, trace.py and workload.py say what is asked,
traffic.py moves bytes, host.py and rank.py play the serving processes, arm.py runs one experiment, and results.py,
story.py, report.py, pictures.py and demo.py tell what came out. promotion.py and bulk.py are a second experiment.
"""
