# SPDX-License-Identifier: Apache-2.0
"""What every number of ``mfsctl status`` means. The one place for these texts.

Keys are the fields of the messages in proto/mfsd/v1/control.proto, and the classifier's counters (enum mfsd_stat of
bpf/mfsd.h, in lower case); a test holds both complete.
"""

from __future__ import annotations

from typing import Final

STATUS: Final = {
    "version": "version of the daemon",
    "uptime_s": "seconds since the daemon started",
    "epoch": "changes with every start of the daemon; clients that see a new one announce again what is alive",
    "mode": "observe: packets are classified and counted, but left alone; enforce: they are steered",
    "paused": "true after `mfsctl pause`: everything goes to the default band",
    "policy": "name of the scheduling policy in force",
    "sessions": "client processes with hints that are not forgotten",
    "requests": "requests that are not over",
    "requests_no_deadline": "of these, those of which nobody has said when their first token is due",
    "batches": "batches of requests that compute together",
    "transfers": "announced transfers that are not finished",
    "connections": "connections that carry announced transfers, or are marked",
    "slots": "rows of the table that the kernel shares; one per connection, so the most connections there can be",
    "pending_selectors": "selectors that match no socket yet and wait for one",
    "rss_bytes": "resident memory of the daemon",
    "tick_p50_ms": "median duration of the engine's ticks in the last minute",
    "tick_p99_ms": "99th percentile of the same",
    "notices": "what an operator should know, in words",
}

COUNTERS: Final = {
    "hints_accepted": "hints that took effect",
    "hints_rejected": "hints that were refused; the client was told why",
    "transfers_completed": "transfers whose bytes were all sent, or that were reported complete",
    "transfers_expired": "transfers forgotten without completion",
    "promotions": "times a connection was lifted to a more urgent band",
    "rescues": "promotions whose packets sat in a starved queue and were let out, or purged and sent anew",
    "deadlines_met": "requests that were complete before their deadline",
    "deadlines_missed": "requests that were not",
    "ended_no_deadline": "requests that are over and had no deadline",
    "demotions": "times a user's urgent traffic was demoted because it went beyond its budget",
}

DEVICE: Final = {
    "name": "network device",
    "ifindex": "its number",
    "backend": "qdisc that enforces the bands; empty when the device is only observed",
    "attach": "hook of the classifier: tcx or clsact",
    "loader": "how it was loaded: libbpf or bcc",
    "rate_bytes_per_s": "configured rate, else link speed; 0: unknown",
    "measured_bytes_per_s": "what the link gave while it was busy; 0: never busy yet",
    "utilisation": "share of the last interval in which the link was busy, 0 to 1",
}

BAND: Final = {
    "index": "place in the strict order, 0 is served first",
    "name": "control: pure ACKs and other tiny packets; level n: hinted traffic, 0 most urgent; default: everything "
    "without a hint; background: what nobody waits for; scavenger: requests that are given up",
    "classid": "its class (of lane 0) in tc's notation",
    "lanes": "leaf queues; connections are spread over them so that a rescue purges nobody else's packets",
    "guaranteed_bytes_per_s": "rate that the policy has the band guaranteed now; 0: nothing, so it has its floor, "
    "or its standing rate",
    "standing_bytes_per_s": "rate that a band which the policy has guaranteed nothing has in place of its floor, so "
    "that a guarantee given later is in force at once; 0: none",
    "got_bytes_per_s": "rate that the band got lately, average over a tenth of a second",
    "floor_bytes_per_s": "rate that the band gets even when bands above it are busy; 0: none",
    "bytes": "bytes sent through it since the qdisc was installed",
    "packets": "packets, the same",
    "drops": "packets dropped at a full queue, purged ones included",
    "backlog_bytes": "bytes queued now",
    "urgency": "its class in the fabric by the policy (column fabric): urgent, middle or last",
    "dscp": "code point written into its packets; -1: left alone",
    "connections": "connections in it now",
}

PEER: Final = {
    "address": "host that connections lead to, of whose link something is known",
    "configured_bytes_per_s": "what the link into it carries, by a [[peer]] section; 0: there is none",
    "learnt_bytes_per_s": "the most that it took lately while nothing but the network held us back; 0: seen too seldom",
    "sightings": "how often that was seen in the last 30 s; 5 are needed, of a single peer 20 that agree",
    "used_bytes_per_s": "what the policy goes by: the configured rate, or a learnt one below that of our link (and, of "
    "several peers, above the fair share of it); 0: none",
    "given_up": "transfers given up while a learnt rate was in use, and over by now",
    "in_time": "of these: in time after all; more than 2 % raise the learnt rate by a quarter, and both begin anew",
    "raised": "by what factor the learnt rate has been raised so far",
}

TENANT: Final = {
    "uid": "user who owns the sockets; -1: nobody knows",
    "device": "where its connections move this",
    "connections": "how many it has, on all devices",
    "moved_bytes_per_s": "what they moved lately, average over half a second",
    "urgent_bytes_per_s": "of it above unhinted traffic",
    "allowed_bytes_per_s": "how much of that it may move at present ([tenants] of the configuration); 0: as it likes",
    "demoted": "it has moved more: its connections wait below unhinted traffic for now",
    "demotions": "how often that began",
}

YIELDING: Final = {
    "band": "whose connections yield at bottlenecks elsewhere (network.yield)",
    "hosts": "hosts to which it has, or lately had, such connections",
    "connections": "how many of them were heard from in the last fifth of a second of traffic",
    "queue_ms": "queue that they saw on their ways, on average",
    "target_ms": "queue that they aim at now, the most of all ways",
    "yielding_share": "share of their time in which they got out of somebody's way",
}

STATS: Final = {
    "cookie": "packets of hinted connections matched by socket cookie, and steered",
    "tuple": "packets of hinted connections matched by addresses and ports, and steered",
    "miss": "IP packets of no hinted connection: left alone",
    "expired": "packets of a connection whose hint has run out: left alone",
    "stale": "packets that passed while the daemon gave no sign of life: left alone, nothing looked up",
    "observed": "packets of hinted connections, counted but left alone (observe mode, or the connection is in no band)",
    "foreign": "packets of hinted connections left alone because their priority names another program's qdisc",
    "not_ip": "packets that are neither IPv4 nor IPv6, or cut short: left alone",
    "control": "of all these: tiny packets sent to the control band",
    "marked": "of all these: packets whose DSCP was rewritten",
    "fragment": "of the misses: later IP fragments, which carry no ports",
}

SECTIONS: Final = (
    ("status", "", STATUS),
    ("counters (since the daemon started)", "counters.", COUNTERS),
    ("device", "devices[].", DEVICE),
    ("band", "devices[].bands[].", BAND),
    ("peer", "peers[].", PEER),
    ("user (shown when there are several, or one was demoted)", "tenants[].", TENANT),
    ("yielding in the network", "yielding[].", YIELDING),
    ("classifier (packets on this device)", "devices[].stats.", STATS),
)
