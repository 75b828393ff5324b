# SPDX-License-Identifier: Apache-2.0
"""The three stages over transports that serving systems use, unmodified: gloo and Mooncake's transfer engine on TCP.

memory.py   where requests' KV lies at the decode host, and how its arrival is seen
engine.py   Mooncake's transfer engine
worker.py   the process of a prefill rank, of the decode host, of the store
run.py      hosts, daemons, arms, figures; ``mfsd lab real``

mfsd does not see these sockets before they send: hints name them by addresses and ports, as an adapter of a serving
system would. Needs the extra ``transports``.
"""
