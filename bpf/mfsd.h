/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * mfsd.h - everything that the kernel half and the user half of mfsd share.
 *
 * This header is the only truth of the layouts and constants below. The Python side (mfsd/datapath/_abi.py) is generated
 * from the BTF of the compiled object by scripts/build.py, so nobody mirrors a struct by hand.
 *
 * Who writes what: fields marked [user] are written by the daemon and only read by the classifier; fields marked
 * [kernel] are written by the classifier and only read by the daemon. Neither side ever waits for the other.
 *
 * All times are CLOCK_MONOTONIC nanoseconds, the clock of bpf_ktime_get_coarse_ns().
 */
#ifndef MFSD_H
#define MFSD_H

#ifndef __VMLINUX_H__
#include <linux/types.h>
#endif

enum mfsd_consts {
	MFSD_ABI_VERSION = 4,
	MFSD_MAX_BANDS = 16,	  /* what a prio qdisc can have (TCQ_PRIO_BANDS) */
	MFSD_DSCP_KEEP = 0xff,	  /* band_map.dscp: leave the packet's DSCP alone */
	MFSD_BAND_KEEP = 0xff,	  /* slot.band: count, but leave skb->priority alone */
	MFSD_DEFAULT_SLOTS = 16384, /* rows of the slot table unless the loader resizes it */
	MFSD_SOCKETS = 65536,	  /* sockets that the directory remembers; the least recently used go first */
	MFSD_ENDS = 8192,	  /* connections that are over whose end is remembered; the least recently used go first */
	MFSD_RULES = 4096,	  /* rules that the kernel can match */
	MFSD_RULES_PER_PEER = 30, /* of them that name one peer, or that name none */
	MFSD_ASKED = 4096,	  /* threads of which it is known when the daemon was to look at them */
	MFSD_ASK_NS = 1000000000, /* how often it is, each of them */
	MFSD_PATHS = 4096,	  /* ways to peers, by band, that are steered; the least recently used go first */
	MFSD_FARS = 1024,	  /* peers of which it is known that their links are slower than ours; others count as not */
	MFSD_EVENT_BYTES = 1 << 18, /* size of the ring buffer of events */
	MFSD_NO_SLOT = 0xffffffff, /* event.slot: there was no free slot, or none is wanted */
	MFSD_NO_RULE = 0xffffffff, /* event.rule: matched by its 5-tuple, or unmatched */
	MFSD_ANY_ID = 0xffffffff, /* rule.uid, rule.pid, rule.tid: anybody's */
};

/* mfsd_host.flags [user] */
enum mfsd_host_flags {
	MFSD_HOST_ENFORCE = 1,	/* write skb->priority; without it: observe (look up and count only) */
};

/* mfsd_dev.flags [user] */
enum mfsd_dev_flags {
	MFSD_DEV_OVERWRITE_FOREIGN = 1, /* also replace a priority whose major number is somebody else's */
	MFSD_DEV_MARK_DSCP = 2,		/* at least one band has a DSCP to write */
	MFSD_DEV_CONTROL_UNHINTED = 4,	/* pure ACKs of unhinted TCP go to the control band, too */
};

/* mfsd_slot.flags [kernel]: what is known of TCP where the daemon can't ask it, in other network namespaces. */
enum mfsd_slot_flags {
	MFSD_SLOT_QUIET = 1, /* all that has left is acknowledged */
	MFSD_SLOT_WAITS = 2, /* and there is more, for which the peer has no room; or it was asked whether it still lives */
};

/*
 * One row per hinted connection. A slot is free when expires_ns is 0. The daemon takes a slot by writing the user
 * half first and inserting the key (cookie or tuple) last; it frees one by deleting the keys first. Free slots that it
 * has put into mfsd_free may be taken by the kernel itself (sockets.bpf.c), which then tells it.
 *
 * Where the stream stands is TCP's own word as of the last packet, never a sum over packets: retransmissions, segment
 * headers and devices that a packet passes twice don't matter. 64 bytes, one cache line.
 */
struct mfsd_slot {
	__u64 expires_ns;  /* [user] past it the packet goes on as if there were no slot */
	__u32 generation;  /* [user] counts the reuses of this row */
	__u16 lane;	   /* [user] leaf within the band, modulo the lanes that the device has there */
	__u8 band;	   /* [user] index into mfsd_dev.bands, or MFSD_BAND_KEEP */
	__u8 flags;	   /* [kernel] enum mfsd_slot_flags */
	__u64 bytes;	   /* [kernel] wire bytes: every segment's headers counted, retransmissions included */
	__u64 packets;	   /* [kernel] packets as the qdisc sees them (a GSO packet counts once) */
	__u64 last_ns;	   /* [kernel] when the last of them passed (coarse clock, a few ms of grain) */
	__u64 acked;	   /* [kernel] tcpi_bytes_acked, if the packet's socket is at hand; else 0 */
	__u64 sent;	   /* [kernel] payload that has passed, on the scale of acked, retransmissions not counted; of UDP
			    * and of TCP without a socket at hand it begins at 0 with the first packet */
	__u32 origin;	   /* [kernel] low half of sent before the first packet; without a socket: the next TCP sequence */
	__u32 ifindex;	   /* [kernel] device that the last packet left by */
};

/* Key of the tuple map. Addresses are 16 bytes for both families: IPv4 is ::ffff:a.b.c.d (RFC 4291 2.5.5.2). */
struct mfsd_tuple {
	__u8 saddr[16];
	__u8 daddr[16];
	__u16 sport; /* network order */
	__u16 dport; /* network order */
	__u8 proto;  /* IPPROTO_TCP or IPPROTO_UDP */
	__u8 pad[3]; /* 0 */
};

/* Who made a socket, or the socket that it was accepted from. All 0 where nobody knows (older than the daemon). */
struct mfsd_owner {
	__u64 cgroup; /* id of the cgroup (v2) */
	__u32 pid;    /* thread group, as the initial pid namespace counts */
	__u32 tid;    /* thread */
	__u32 uid;    /* in the initial user namespace */
	__u32 pad;
};

/* A TCP connection of this host, in any network namespace; value of the directory mfsd_socks. */
struct mfsd_sock {
	struct mfsd_tuple key;	 /* as its packets leave: saddr and sport are ours */
	__u64 netns;		 /* cookie of the network namespace (SO_NETNS_COOKIE) */
	struct mfsd_owner owner;
	__u32 bound;		 /* interface that it is bound to (SO_BINDTODEVICE), a part of its name there; 0: none */
	__u32 flags;		 /* MFSD_EVENT_ACTIVE or 0 */
};

enum mfsd_event_kind {
	MFSD_EVENT_MATCHED = 1, /* a connection was made that a rule names */
	MFSD_EVENT_BOUND,	/* a connection was made that has a slot already, by its cookie or its 5-tuple */
	MFSD_EVENT_CLOSED,	/* a connection with a slot is over */
};

enum mfsd_event_flags {
	MFSD_EVENT_ACTIVE = 1, /* opened from here, so that TCP counts its SYN as a byte */
	MFSD_EVENT_CLEAN = 2,  /* CLOSED: all that was written has been acknowledged, the FIN included */
};

/* What sockets.bpf.c tells the daemon, in the order in which it happened; and an end that it remembers. [kernel] */
struct mfsd_event {
	__u64 cookie;
	__u64 acked; /* CLOSED: tcpi_bytes_acked at the end */
	__u32 kind;  /* enum mfsd_event_kind */
	__u32 slot;  /* or MFSD_NO_SLOT */
	__u32 rule;  /* MATCHED: index of the rule; CLOSED, and an end that is remembered: when, ms */
	__u32 flags; /* enum mfsd_event_flags */
	struct mfsd_sock sock;
};

/* Connections to be hinted from their first packet on. All conditions must hold. [user] */
struct mfsd_rule {
	__u8 saddr[16], smask[16];
	__u8 daddr[16], dmask[16];
	__u64 cgroup;	  /* 0: any */
	__u64 expires_ns; /* of the slots that it makes */
	__u32 pid, tid, uid; /* MFSD_ANY_ID: any */
	__u16 sport_first, sport_last; /* host order, inclusive */
	__u16 dport_first, dport_last;
	__u16 lanes;	  /* that connections are spread over: 1 .. lanes - 1; lane 0 alone if it is 1 */
	__u8 band;	  /* where its connections begin; MFSD_BAND_KEEP: nowhere, but the daemon is to look who made them */
	__u8 used;
};

/* Indices of the rules that name one peer (key: its address), or (key: all 0) none in particular. [user] */
struct mfsd_rules_of {
	__u16 n; /* above MFSD_RULES_PER_PEER: too many for the kernel, which reports every connection */
	__u16 rule[MFSD_RULES_PER_PEER];
	__u16 pad;
};

/* The daemon as a whole; one element, shared by the classifiers of all devices. */
struct mfsd_host {
	__u64 heartbeat_ns; /* [user] last sign of life */
	__u64 timeout_ns;   /* [user] older than this: the classifier lets everything through untouched */
	__u32 abi_version;  /* [user] MFSD_ABI_VERSION */
	__u32 flags;	    /* [user] enum mfsd_host_flags */
};

/* Where a band lives on one device's qdisc tree. */
struct mfsd_band_map {
	__u32 classid; /* [user] full classid of lane 0; lane i is classid + i; 0: leave skb->priority alone */
	__u16 lanes;   /* [user] leaves in this band, at least 1 */
	__u8 dscp;     /* [user] DSCP 0..63 to write, or MFSD_DSCP_KEEP */
	__u8 pad;
};

/* One device; one element per attached classifier. */
struct mfsd_dev {
	__u32 major;	   /* [user] handle of our root qdisc, shifted: 0xMMMM0000 */
	__u32 flags;	   /* [user] enum mfsd_dev_flags */
	__u32 tiny_len;	   /* [user] UDP/other hinted packets of at most this many bytes count as control, if their own
			    * band is above the default one; 0: none */
	__u8 n_bands;	   /* [user] */
	__u8 control_band; /* [user] index of the control band */
	__u8 default_band; /* [user] index of the band of unhinted packets */
	__u8 pad;
	struct mfsd_band_map bands[MFSD_MAX_BANDS]; /* [user] */
};

/* Per-CPU counters, one element per enum value. Every packet is in exactly one of the *first eight*. */
enum mfsd_stat {
	MFSD_STAT_COOKIE,    /* matched by socket cookie and obeyed */
	MFSD_STAT_TUPLE,     /* matched by 5-tuple and obeyed */
	MFSD_STAT_MISS,	     /* IP, no slot */
	MFSD_STAT_EXPIRED,   /* a slot, but past its expiry */
	MFSD_STAT_STALE,     /* heartbeat lost: untouched, nothing looked up */
	MFSD_STAT_OBSERVED,  /* a slot, counted, left alone because the mode is observe (or band is KEEP) */
	MFSD_STAT_FOREIGN,   /* a slot, counted, left alone because the priority names somebody else's qdisc */
	MFSD_STAT_NOT_IP,    /* not IPv4/IPv6, or headers cut short: untouched */
	MFSD_STAT_CONTROL,   /* of the above: sent to the control band */
	MFSD_STAT_MARKED,    /* of the above: DSCP rewritten */
	MFSD_STAT_FRAGMENT,  /* of the misses: a later IP fragment, which carries no ports */
	MFSD_STAT_MAX,
};

/* Per-CPU, one element per band: what the classifier sent there. */
struct mfsd_counter {
	__u64 packets;
	__u64 bytes; /* wire bytes */
};

/* What a band is to yield.bpf.c. */
enum mfsd_yield_class {
	MFSD_YIELD_NOT,	   /* urgent: its connections take what they can get */
	MFSD_YIELD_FIRST,  /* yields to whoever does not yield */
	MFSD_YIELD_SECOND, /* yields to the first, too */
};

/* mfsd_yield.flags [user] */
enum mfsd_yield_flags {
	MFSD_YIELD_REPLACE = 1, /* also the algorithm of sockets that have chosen theirs (TCP_CONGESTION) */
};

/* How the deferred bands yield; one element. [user] */
struct mfsd_yield {
	__u64 rate;		       /* of this host's link, bytes/s */
	__u32 target_us;	       /* queue that the first class keeps at a bottleneck, at most; the second: half of it */
	__u32 flags;		       /* enum mfsd_yield_flags */
	__u64 floor[MFSD_MAX_BANDS];   /* bytes/s that every connection of a band may always send */
	__u8 class_of[MFSD_MAX_BANDS]; /* enum mfsd_yield_class */
};

/* The link into a peer, where it is slower than this host's own. By its address, as in mfsd_path_key. [user] */
struct mfsd_far {
	__u64 rate;	 /* bytes/s */
	__u32 target_us; /* as mfsd_yield's */
	__u32 pad;
};

/* What the last search for older connections came to. */
struct mfsd_adopted {
	__u32 switched; /* [kernel] put under the algorithm */
	__u32 deaf;	/* [kernel] of which we will not hear by ourselves: they must be searched for again */
};

/* Connections that are steered together. */
struct mfsd_path_key {
	__u8 peer[16]; /* its address; IPv4 as in mfsd_tuple */
	__u64 netns;   /* cookie of the network namespace */
	__u8 band;
	__u8 pad[7]; /* 0 */
};

/* What a peer's clock (TSval) shows: see yield_clock.h. Microseconds that wrap. [kernel] */
struct mfsd_peer_clock {
	__u32 behind_us; /* own clock minus its, at least */
	__u32 next_us;	 /* the same, in this period */
	__u32 since;	 /* beginning of the period; 0: nothing is known */
	__u32 raised_at;
};

/* What is known of a path, and what its connections may send: see yield.h. Microseconds of CLOCK_MONOTONIC. [kernel] */
struct mfsd_path {
	__u64 slice_at;	  /* beginning of the slice that is being sampled */
	__u64 base_since; /* beginning of the period of base_next_us */
	__u64 empty_at;	  /* when the queue was last seen gone */
	__u64 room_since; /* making room; 0: not */
	__u64 calm_until; /* when the share may change again */
	__u64 lost_at;
	__u64 epoch_at; /* beginning of the count flows_now */
	__u64 samples;	  /* since the path is known, and so are the next three */
	__u64 delay_sum;  /* their queue */
	__u64 steered_us; /* time that steps were taken for */
	__u64 yielded_us; /* of it, yielding to somebody */
	__u64 far_rate;	  /* mfsd_far's, as of the last epoch; 0: nothing is known, and so with far_target_us */
	__u32 base_us;	  /* round trip without queue */
	__u32 base_next_us;
	__u32 delay_us; /* queue, as of the last step */
	__u32 target_us;
	__u32 least_us; /* queue, of the samples of this slice */
	__u32 in_group;	/* so many */
	__u32 share;  /* window of one connection, 1/1024 packets */
	__u32 part;   /* of the share in use, 1/1024 */
	__u32 yielding;
	__u32 flows; /* connections heard from in the last epoch */
	__u32 flows_now;
	__u32 epoch;
	__u32 back_us;	 /* that the last two ACKs have waited on their way back, at least */
	__u32 last_back_us; /* the same of the last */
	__u32 regretted; /* the share was cut for a loss that may have been none */
	struct mfsd_peer_clock clock;
	__u32 held;	 /* samples of this slice of connections that had more to send than they might, and not for our bands */
	__u32 paired_at; /* last ACK for more than one packet */
	__u32 far_target_us;
};

#endif /* MFSD_H */
