// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * classifier.bpf.c - puts every egress packet of a hinted connection into the band that user space chose for it.
 *
 * The kernel decides nothing but "is this packet one of ours". User space decides everything else: which connections
 * have a slot, the band of each, what the bands are on each device, whether anything may be touched at all, and for
 * how long all that holds. The two meet in memory (mfsd.h); neither ever waits for the other.
 *
 * For one packet:
 *
 *   1. No daemon, no effect. The heartbeat in mfsd_host must be younger than its timeout, else the packet goes on
 *	untouched. Nothing is looked up, so a dead daemon costs next to nothing and can't throttle anybody.
 *   2. Which slot? The socket's cookie, if the packet has a socket: one u64, no header is read, and it survives NAT.
 *	A packet without one (bridged containers, forwarding) is parsed and its 5-tuple looked up. A slot past its expiry
 *	is no slot.
 *   3. Note in the slot: where TCP says the stream stands, wire bytes, packets, time, device. This happens in observe
 *	mode, too: it is how the daemon learns the progress of a transfer.
 *   4. Which band? The slot's, except that a packet that carries no data but lets data flow (a pure ACK, a SYN) goes
 *	to the control band: behind deferred bulk it would stall the opposite direction. So does a tiny packet of another
 *	protocol whose connection is above the default band anyway. FIN and RST stay with the data:
 *	they take effect when they arrive, so overtaking the data before them would cost a recovery (FIN) or lose that
 *	data (RST).
 *   5. Obey: the full classid of the band's leaf goes to skb->priority, which prio, ets and HTB take without a filter,
 *	unless that field already names a qdisc of somebody else. Where the band has a DSCP, it is written too (ECN kept).
 *   6. Return "next": whatever else hangs on the hook runs as before.
 *
 * It runs at the egress hook of a device with an Ethernet header (attach.py refuses others), where skb->data is at
 * that header. A full-size packet that hits by cookie reads no header unless it is to be marked; others are read in
 * place if they lie where they usually do, else by bpf_skb_load_bytes(), which fails cleanly at the end of the packet.
 * A VLAN tag in skb->vlan_tci is outside the payload and needs nothing; up to two tags inside it are stepped over.
 * SYN-ACKs carry a request socket, whose cookie the accepted socket inherits; the last ACKs of a connection in
 * TIME_WAIT carry no socket of their own and may only match by tuple.
 *
 * Needs Linux 5.11 (bpf_ktime_get_coarse_ns) and to load it CAP_BPF and CAP_NET_ADMIN, no more (parse.h says what that
 * takes). Uses UAPI only, so one object serves all later kernels.
 */
#include "compat.h"
#include "mfsd.h"
#include "parse.h"

#define CLASSID_MAJOR	   0xffff0000
#define ECN_MASK	   0x3
#define UDP_LEN		   8

/* Shared by all devices. The slot table and the hashes are resized by the loader. The hashes are preallocated: 2 MB for
 * 16,384 slots buys insertions that can't fail for want of memory and lookups without an indirection. The price is
 * that a freed element is reused at once, so a lookup that races with it may yield the new owner's slot for one
 * packet. */
MFSD_MMAP_ARRAY(mfsd_host, struct mfsd_host, 1);
MFSD_MMAP_ARRAY(mfsd_slots, struct mfsd_slot, MFSD_DEFAULT_SLOTS);
MFSD_HASH(mfsd_cookies, __u64, __u32, MFSD_DEFAULT_SLOTS);
MFSD_HASH(mfsd_tuples, struct mfsd_tuple, __u32, MFSD_DEFAULT_SLOTS);

/* One set per device. */
MFSD_MMAP_ARRAY(mfsd_dev, struct mfsd_dev, 1);
MFSD_PERCPU_ARRAY(mfsd_stats, __u64, MFSD_STAT_MAX);
MFSD_PERCPU_ARRAY(mfsd_bands, struct mfsd_counter, MFSD_MAX_BANDS);
MFSD_PERCPU_ARRAY(mfsd_scratch, struct scratch, 1);

static __always_inline void count(struct scratch *s)
{
	__u64 *n = MFSD_LOOKUP(mfsd_stats, NOTE(s, stat));

	if (n)
		*n += 1; /* per-CPU, like the scratch */
}

static __always_inline void count_as(struct scratch *s, __u32 stat)
{
	s->stat = stat;
	count(s);
}

/*
 * CLOCK_MONOTONIC as of the last tick. The coarse clock moves only at ticks, so one reading per jiffy and CPU says all
 * that asking again would; reading jiffies is a single load (the verifier inlines the helper), while calling for the
 * time costs 20 ns where returns are mitigated - a third of what a cookie hit may cost. A reading that falls between
 * the update of jiffies and that of the time is one tick older than it could be.
 */
static __always_inline void read_clock(struct scratch *s)
{
	__u64 jiffies = bpf_jiffies64();

	if (s->jiffies != jiffies) {
		s->now = bpf_ktime_get_coarse_ns();
		s->jiffies = jiffies;
	}
}

static __always_inline __u64 wire_bytes(struct __sk_buff *skb)
{
	/* Set by __dev_queue_xmit() just before the hook, with the headers of all GSO segments. */
	return skb->wire_len ? skb->wire_len : skb->len;
}

/* Is this packet of a hinted connection to go to the control band? */
static __always_inline int is_control(struct __sk_buff *skb, struct scratch *s, const struct mfsd_dev *dev)
{
	if (s->h.proto == IPPROTO_TCP)
		return skb->len <= MAX_CONTROL_LEN && is_tcp_control(skb, s, 1);
	/* A fragment that overtakes the others helps nobody. Unlike ACKs these packets may be anything, so only those of
	 * connections that stand above unhinted traffic by themselves, and pay for it, ride here. */
	return !s->h.fragment && s->band < dev->default_band && skb->len <= dev->tiny_len;
}

/* Writes `dscp` if the packet has another one. 1 if it was written. */
static __always_inline int mark(struct __sk_buff *skb, struct scratch *s, __u8 dscp)
{
	const struct headers *h = &s->h;
	__u16 *new = (__u16 *)s->raw, old;

	/* version, header length / traffic class: the first 16 bits hold the field in both families */
	if (load(skb, h->ip, ETH_HLEN, NOTE(s, raw), sizeof(*new)))
		return 0;
	old = *new;
	if (h->version == 4) {
		*new = (old & MFSD_NET16(0xff00 | ECN_MASK)) | MFSD_NET16((__u16)dscp << 2);
		if (*new == old)
			return 0;
		/* The header still sums to the same, so a CHECKSUM_COMPLETE of the skb stays right without help. */
		if (bpf_l3_csum_replace(skb, h->ip + 10, old, *new, sizeof(*new)))
			return 0;
		return !bpf_skb_store_bytes(skb, h->ip, NOTE(s, raw), sizeof(*new), 0);
	}
	*new = (old & MFSD_NET16(0xf00f | ECN_MASK << 4)) | MFSD_NET16((__u16)dscp << 6);
	if (*new == old)
		return 0;
	/* No checksum in an IPv6 header, hence one of the whole skb changes. */
	return !bpf_skb_store_bytes(skb, h->ip, NOTE(s, raw), sizeof(*new), BPF_F_RECOMPUTE_CSUM);
}

/* May we write skb->priority? A major of somebody else's is a decision of somebody else's. */
static __always_inline int may_write(struct __sk_buff *skb, const struct mfsd_dev *dev)
{
	__u32 major = skb->priority & CLASSID_MAJOR;

	return !major || major == dev->major || dev->flags & MFSD_DEV_OVERWRITE_FOREIGN;
}

/* Sends the packet to s->lane of band s->band, which is below n_bands and MFSD_MAX_BANDS, and counts it there. */
static __always_inline void send_to(struct __sk_buff *skb, struct scratch *s, struct mfsd_band_map *map)
{
	struct mfsd_counter *sum;
	__u32 lane = s->lane;

	if (map->classid) {
		if (lane)
			lane = map->lanes ? lane % map->lanes : 0;
		skb->priority = map->classid + lane;
	}
	sum = MFSD_LOOKUP(mfsd_bands, NOTE(s, band));
	if (sum) {
		sum->packets += 1;
		sum->bytes += wire_bytes(skb);
	}
}

/*
 * Reads sequence number, acknowledgement and data offset of a TCP packet into s->raw. Returns the length of all headers
 * before TCP's, 0 if they are not where they lie in nearly all packets, and nobody has parsed this one, or if what is
 * there is not TCP: a connection's packets in a tunnel have the tunnel's headers.
 */
static __always_inline __u32 tcp_words(struct __sk_buff *skb, struct scratch *s)
{
	if (s->parsed)
		return s->h.fragment || s->h.proto != IPPROTO_TCP || load_l4(skb, &s->h, 4, NOTE(s, raw), 12) ? 0 : s->h.l4;
	if (skb->protocol == MFSD_NET16(ETH_P_IP)) {
		if (!read_linear(skb, ETH_HLEN, NOTE(s, raw), 12) || s->raw[0] != 0x45 || s->raw[9] != IPPROTO_TCP)
			return 0;
		return read_linear(skb, ETH_HLEN + IP4_LEN + 4, NOTE(s, raw), 12) ? ETH_HLEN + IP4_LEN : 0;
	}
	if (skb->protocol != MFSD_NET16(ETH_P_IPV6) || !read_linear(skb, ETH_HLEN + 4, NOTE(s, raw), 4) ||
	    s->raw[2] != IPPROTO_TCP)
		return 0;
	return read_linear(skb, ETH_HLEN + IP6_LEN + 4, NOTE(s, raw), 12) ? ETH_HLEN + IP6_LEN : 0;
}

/*
 * Length of all headers up to a UDP packet's payload, if they lie where they do in nearly all packets, and its ports are
 * its socket's (s->una), not a tunnel's; else 0. Nobody has parsed it.
 */
static __always_inline __u32 udp_headers(struct __sk_buff *skb, struct scratch *s)
{
	if (skb->protocol == MFSD_NET16(ETH_P_IP)) {
		if (!read_linear(skb, ETH_HLEN, NOTE(s, raw), 12) || s->raw[0] != 0x45 || s->raw[9] != IPPROTO_UDP)
			return 0;
		if (s->raw[6] & 0x1f || s->raw[7]) /* a fragment, but not the first */
			return ETH_HLEN + IP4_LEN;
		if (!read_linear(skb, ETH_HLEN + IP4_LEN, NOTE(s, raw), 2))
			return 0;
		return MFSD_NET16(*(__u16 *)s->raw) == s->una ? ETH_HLEN + IP4_LEN + UDP_LEN : 0;
	}
	if (skb->protocol != MFSD_NET16(ETH_P_IPV6) || !read_linear(skb, ETH_HLEN + 4, NOTE(s, raw), 4) ||
	    s->raw[2] != IPPROTO_UDP || !read_linear(skb, ETH_HLEN + IP6_LEN, NOTE(s, raw), 2))
		return 0;
	return MFSD_NET16(*(__u16 *)s->raw) == s->una ? ETH_HLEN + IP6_LEN + UDP_LEN : 0;
}

/*
 * Notes where the stream of a hinted connection stands with this packet. The socket's own counters are exact, and it is
 * locked while it sends, so plain stores do. It counts the packet as sent only afterwards, hence the look at the header.
 * Without a socket (forwarded packets) the header alone says it, and for UDP the lengths add up; several CPUs may be at
 * it then.
 */
static __always_inline void note_progress(struct __sk_buff *skb, struct scratch *s, struct mfsd_slot *slot)
{
	__u32 *seq = (__u32 *)s->raw, before, end, ahead, flight, syn;
	struct bpf_tcp_sock *tcp;
	struct bpf_sock *sk = skb->sk;

	if (sk)
		sk = bpf_sk_fullsock(sk);
	/* Kept as notes: older kernels lose what they know of the pointer when headers are read in between (R0 scalar). */
	s->own = 0;
	if (sk) {
		s->una = sk->src_port;
		tcp = bpf_tcp_sock(sk);
		if (tcp) {
			s->una = tcp->snd_una;
			s->flight = tcp->snd_nxt - s->una;
			s->position = tcp->bytes_acked;
			s->own = 1;
		}
	}
	MFSD_REREAD();
	if (!s->own && (!s->parsed || s->h.proto == IPPROTO_UDP)) {
		before = s->parsed ? s->h.l4 + UDP_LEN : udp_headers(skb, s);
		MFSD_REREAD();
		if (before)
			__sync_fetch_and_add(&slot->sent, skb->len - before);
		return;
	}
	if (!s->own && s->h.proto != IPPROTO_TCP)
		return;
	before = tcp_words(skb, s);
	MFSD_REREAD();
	/* Ethernet pads short frames, so these are measured by the IP length. */
	end = s->parsed && s->h.l4_len ? s->h.l4_len : skb->len - before;
	end = MFSD_NET32(*seq) + end - (s->raw[8] >> 4) * 4;
	if (s->own) {
		flight = s->flight;
		ahead = end - s->una;
		if (!slot->last_ns)
			slot->origin = (__u32)s->position + flight;
		slot->acked = s->position;
		if (flight || !before || (__s32)ahead > 0)
			slot->flags = 0; /* what is sent again is not acknowledged either */
		else if (ahead == (__u32)-1)
			slot->flags |= MFSD_SLOT_WAITS;
		slot->sent = s->position + (before && (__s32)(ahead - flight) > 0 ? ahead : flight);
	} else if (before && !s->hit) { /* what a socket in TIME_WAIT says, or one half made, is no payload */
		syn = s->raw[9] >> 1 & 1; /* a SYN has a number of its own, but is no payload */
		end += syn;
		if (!slot->last_ns)
			slot->origin = MFSD_NET32(*seq) + syn;
		ahead = end - slot->origin;
		if ((__s32)ahead > 0) {
			slot->origin = end;
			slot->flags = 0;
			__sync_fetch_and_add(&slot->sent, (__u64)ahead);
		} else if (ahead == (__u32)-1) {
			slot->flags |= MFSD_SLOT_WAITS; /* tcp_xmit_probe_skb(): the number before the first that is open */
		}
	}
}

/* Where a band lies. The mask changes nothing, as callers have checked; the verifier wants to see it. */
static __always_inline struct mfsd_band_map *band_map(struct mfsd_dev *dev, __u32 b)
{
	return &dev->bands[b & (MFSD_MAX_BANDS - 1)];
}

/* IP without a slot, counted by the caller. Its pure ACKs may have the control band where the operator wants that. */
static __always_inline void unhinted(struct __sk_buff *skb, struct scratch *s, struct mfsd_dev *dev)
{
	__u32 b;

	if (s->h.no_ports) {
		count_as(s, MFSD_STAT_FRAGMENT);
		return;
	}
	if (!(dev->flags & MFSD_DEV_CONTROL_UNHINTED) || !s->enforce)
		return;
	b = dev->control_band;
	if (b >= MFSD_MAX_BANDS || b >= dev->n_bands || s->h.proto != IPPROTO_TCP || skb->len > MAX_CONTROL_LEN)
		return;
	if (!may_write(skb, dev) || !is_tcp_control(skb, s, 0))
		return;
	s->band = b;
	s->lane = 0;
	send_to(skb, s, band_map(dev, b));
	count_as(s, MFSD_STAT_CONTROL);
}

MFSD_PROGRAM
int mfsd_classify(struct __sk_buff *skb)
{
	struct mfsd_host *host;
	struct mfsd_slot *slot;
	struct mfsd_dev *dev;
	struct scratch *s;
	__u32 *row;
	__u8 b, control, dscp;
	MFSD_CONST(__u32, zero, 0);

	host = MFSD_LOOKUP(mfsd_host, &zero);
	s = MFSD_LOOKUP(mfsd_scratch, &zero);
	if (!host || !s)
		return MFSD_NEXT; /* can't be: arrays of one */

	/* Our clock lags by a tick or two, so a fresh heartbeat may be ahead of it. */
	read_clock(s);
	s->stat = MFSD_STAT_STALE;
	if (host->abi_version != MFSD_ABI_VERSION ||
	    (s->now > host->heartbeat_ns && s->now - host->heartbeat_ns > host->timeout_ns))
		goto out;
	s->enforce = host->flags & MFSD_HOST_ENFORCE;
	dev = MFSD_LOOKUP(mfsd_dev, &zero);
	if (!dev)
		return MFSD_NEXT;

	s->cookie = bpf_get_socket_cookie(skb); /* 0 without a socket */
	s->hit = 0;
	if (s->cookie) {
		row = MFSD_LOOKUP(mfsd_cookies, NOTE(s, cookie));
		if (row) {
			s->row = *row;
			s->hit = 1;
		}
	}
	/* The only place that reads headers, so that there is one copy of the parser for the verifier to go through. */
	s->parsed = 0;
	MFSD_HIDE(s); /* else addresses of notes are kept on the stack for use in the parser */
	if (!s->hit || dev->flags & MFSD_DEV_MARK_DSCP || skb->len <= MAX_CONTROL_LEN || skb->len <= dev->tiny_len)
		parse(skb, s);
	MFSD_REREAD();

	s->matched = MFSD_STAT_COOKIE;
	if (!s->hit) {
		s->stat = MFSD_STAT_NOT_IP;
		if (!s->parsed)
			goto out;
		row = 0;
		if (!s->h.no_ports && (s->h.proto == IPPROTO_TCP || s->h.proto == IPPROTO_UDP)) {
			if (load_l4(skb, &s->h, 0, NOTE(s, key.sport), sizeof(s->key.sport) + sizeof(s->key.dport)))
				goto out;
			s->key.proto = s->h.proto;
			row = MFSD_LOOKUP(mfsd_tuples, NOTE(s, key));
		}
		if (!row) {
			unhinted(skb, s, dev);
			s->stat = MFSD_STAT_MISS;
			goto out;
		}
		s->row = *row;
		s->matched = MFSD_STAT_TUPLE;
	}

	slot = MFSD_LOOKUP(mfsd_slots, NOTE(s, row));
	s->stat = MFSD_STAT_EXPIRED;
	if (!slot || s->now > slot->expires_ns)
		goto out;

	note_progress(skb, s, slot);
	/* Atomic: UDP sockets send from several CPUs at once, and so does a tuple that names a forwarded connection. */
	__sync_fetch_and_add(&slot->bytes, wire_bytes(skb));
	__sync_fetch_and_add(&slot->packets, 1);
	slot->last_ns = s->now;
	slot->ifindex = skb->ifindex;

	b = slot->band;
	s->stat = MFSD_STAT_OBSERVED;
	if (!s->enforce || b >= MFSD_MAX_BANDS || b >= dev->n_bands) /* KEEP is one of these */
		goto out;
	s->stat = MFSD_STAT_FOREIGN;
	if (!may_write(skb, dev))
		goto out;

	s->band = b;
	s->lane = slot->lane;
	control = dev->control_band;
	if (s->parsed && control < MFSD_MAX_BANDS && control < dev->n_bands && is_control(skb, s, dev)) {
		s->band = control;
		s->lane = 0;
		count_as(s, MFSD_STAT_CONTROL);
	}
	send_to(skb, s, band_map(dev, s->band));
	if (s->parsed && dev->flags & MFSD_DEV_MARK_DSCP) {
		dscp = band_map(dev, s->band)->dscp;
		if (dscp != MFSD_DSCP_KEEP && mark(skb, s, dscp & 0x3f))
			count_as(s, MFSD_STAT_MARKED);
	}
	s->stat = s->matched;
out:
	count(s);
	return MFSD_NEXT;
}

MFSD_LICENSE("GPL");
