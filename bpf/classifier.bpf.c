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
 *   3. Count in the slot: wire bytes, segments, packets, time. This happens in observe mode, too: it is how the
 *	daemon learns the progress of a transfer.
 *   4. Which band? The slot's, except that a packet that carries no data but lets data flow (a pure ACK, a SYN) goes
 *	to the control band: behind deferred bulk it would stall the opposite direction. FIN and RST stay with the data:
 *	they take effect when they arrive, so overtaking the data before them would cost a recovery (FIN) or lose that
 *	data (RST).
 *   5. Obey: the full classid of the band's leaf goes to skb->priority, which prio, ets and HTB take without a filter,
 *	unless that field already names a qdisc of somebody else. Where the band has a DSCP, it is written too (ECN kept).
 *   6. Return "next": whatever else hangs on the hook runs as before.
 *
 * It runs at the egress hook of a device with an Ethernet header (attach.py refuses others), where skb->data is at
 * that header. A full-size packet that hits by cookie reads no header unless it is to be marked; others are read in
 * place or, where the skb isn't linear, by bpf_skb_load_bytes(), which fails cleanly at the end of the packet. A VLAN
 * tag in skb->vlan_tci is outside the payload and needs nothing; up to two tags inside it are stepped over. SYN-ACKs
 * carry a request socket, whose cookie the accepted socket inherits; the last ACKs of a connection in TIME_WAIT carry
 * no socket of their own and may only match by tuple.
 *
 * Needs Linux 5.11 (bpf_ktime_get_coarse_ns). Uses UAPI only, so one object serves all later kernels.
 */
#include "compat.h"
#include "mfsd.h"

#define IP_OFFSET_MASK	   0x1fff /* of frag_off: offset in units of 8 bytes */
#define IP_MORE_FRAGMENTS  0x2000
#define IP6_OFFSET_MASK	   0xfff8
#define IP6_MORE_FRAGMENTS 0x0001
#define TCP_FIN		   0x01
#define TCP_SYN		   0x02
#define TCP_RST		   0x04
#define TCP_PSH		   0x08
#define TCP_ACK		   0x10
#define TCP_ECE		   0x40
#define TCP_CWR		   0x80
#define CLASSID_MAJOR	   0xffff0000
#define ECN_MASK	   0x3

/* Extension headers that the walk steps over, at most. Hop-by-hop + destination + fragment + destination is the
 * longest sensible stack (RFC 8200, 4.1) that we know how to step over. */
#define MAX_EXTENSIONS 4
/* No pure ACK or SYN is longer, except with absurd extension headers: Ethernet, two tags, IPv6, 64 bytes of
 * extensions, TCP with all options. Longer packets are taken for data unread. */
#define MAX_CONTROL_LEN (14 + 8 + 40 + 64 + 60)

/* Offsets up to here are tried in the linear part first; the verifier wants a bound. */
#define MAX_DIRECT 255

enum parse_result { PARSED, CUT_SHORT };

struct headers {
	__u32 ip;	/* offset of the IP header */
	__u32 l4;	/* offset of the transport header */
	__u32 l4_len;	/* its length with the payload, as the IP header says (0 for jumbograms) */
	__u8 version;	/* 4 or 6 */
	__u8 proto;	/* IPPROTO_* of the transport header */
	__u8 fragment;	/* any fragment */
	__u8 no_ports;	/* a later fragment */
};

/* Reading of the coarse clock, per CPU; private to this program. */
struct clock {
	__u64 jiffies;	/* when it was read; never 0, as jiffies start 5 minutes below 2^32 */
	__u64 now;	/* CLOCK_MONOTONIC, ns */
};

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
MFSD_PERCPU_ARRAY(mfsd_clock, struct clock, 1);

/*
 * bpf_skb_load_bytes() with a shortcut for what lies in the linear part, as headers nearly always do. `size` is a
 * constant, 2 or a multiple of 4. Words are read where they lie; CPUs on which that is slow make the verifier refuse
 * it, and nobody builds such servers.
 */
static __always_inline int load(struct __sk_buff *skb, __u32 offset, void *to, const __u32 size)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	__u32 i;

	if (offset <= MAX_DIRECT) {
		data += offset;
		if (data + size <= end) {
			if (size == 2)
				*(__u16 *)to = *(__u16 *)data;
#pragma unroll
			for (i = 0; i < size / 4; i++)
				((__u32 *)to)[i] = ((__u32 *)data)[i];
			return 0;
		}
	}
	return bpf_skb_load_bytes(skb, offset, to, size);
}

static __always_inline void count(__u32 stat)
{
	__u64 *n = MFSD_LOOKUP(mfsd_stats, &stat);

	if (n)
		*n += 1; /* per-CPU, and egress runs with softirqs off: nobody else is here */
}

/*
 * CLOCK_MONOTONIC as of the last tick. The coarse clock moves only at ticks, so one reading per jiffy and CPU says all
 * that asking again would; reading jiffies is a single load (the verifier inlines the helper), while calling for the
 * time costs 20 ns where returns are mitigated - a third of what a cookie hit may cost. A reading that falls between
 * the update of jiffies and that of the time is one tick older than it could be.
 */
static __always_inline __u64 coarse_now(void)
{
	__u64 jiffies = bpf_jiffies64();
	struct clock *clock;
	__u32 zero = 0;

	clock = MFSD_LOOKUP(mfsd_clock, &zero);
	if (!clock)
		return bpf_ktime_get_coarse_ns(); /* can't be: an array of one */
	if (clock->jiffies != jiffies) {
		clock->now = bpf_ktime_get_coarse_ns();
		clock->jiffies = jiffies;
	}
	return clock->now;
}

static __always_inline __u64 wire_bytes(struct __sk_buff *skb)
{
	/* Set by __dev_queue_xmit() just before the hook, with the headers of all GSO segments. */
	return skb->wire_len ? skb->wire_len : skb->len;
}

/* Steps over the extension headers between h->l4 and the transport header. They are rare, so reading them in place
 * would gain little, and it would double what the verifier has to go through. */
static __always_inline int parse_extensions(struct __sk_buff *skb, struct headers *h)
{
	__u8 ext[8] __attribute__((aligned(4)));
	__u32 size, i;
	__u16 frag;

	for (i = 0; i < MAX_EXTENSIONS; i++) {
		if (h->proto != IPPROTO_HOPOPTS && h->proto != IPPROTO_DSTOPTS && h->proto != IPPROTO_FRAGMENT)
			return PARSED;
		if (bpf_skb_load_bytes(skb, h->l4, ext, sizeof(ext)))
			return CUT_SHORT;
		size = sizeof(ext);
		if (h->proto == IPPROTO_FRAGMENT) {
			frag = (__u16)ext[2] << 8 | ext[3];
			/* RFC 8200, 4.5: offset 0 and no more to come is an "atomic fragment", a whole packet */
			if (frag & (IP6_OFFSET_MASK | IP6_MORE_FRAGMENTS))
				h->fragment = 1;
			if (frag & IP6_OFFSET_MASK)
				h->no_ports = 1;
		} else {
			size += (__u32)ext[1] * 8;
		}
		h->proto = ext[0];
		h->l4 += size;
		h->l4_len -= size; /* may wrap where the headers lie; then it matches no real length */
		if (h->no_ports)
			return PARSED; /* what follows is data */
	}
	return PARSED;
}

/* Finds the headers; fills addresses and protocol of `key`. CUT_SHORT also means "not IP". */
static __always_inline int parse(struct __sk_buff *skb, struct headers *h, struct mfsd_tuple *key)
{
	__u8 ip4[20] __attribute__((aligned(4)));
	__u8 ip6[8] __attribute__((aligned(4)));
	__u16 type, frag;
	__u32 ihl, i;

	h->ip = ETH_HLEN;
	if (load(skb, ETH_HLEN - sizeof(type), &type, sizeof(type)))
		return CUT_SHORT;
	for (i = 0; i < 2; i++) {
		if (type != MFSD_NET16(ETH_P_8021Q) && type != MFSD_NET16(ETH_P_8021AD))
			break;
		if (load(skb, h->ip + 2, &type, sizeof(type)))
			return CUT_SHORT;
		h->ip += 4;
	}

	h->fragment = 0;
	h->no_ports = 0;
	if (type == MFSD_NET16(ETH_P_IP)) {
		if (load(skb, h->ip, ip4, sizeof(ip4)))
			return CUT_SHORT;
		ihl = (ip4[0] & 0xf) * 4;
		if (ip4[0] >> 4 != 4 || ihl < sizeof(ip4) || h->ip + ihl > skb->len)
			return CUT_SHORT;
		h->version = 4;
		h->proto = ip4[9];
		h->l4 = h->ip + ihl;
		h->l4_len = ((__u32)ip4[2] << 8 | ip4[3]) - ihl;
		frag = (__u16)ip4[6] << 8 | ip4[7];
		h->fragment = (frag & (IP_OFFSET_MASK | IP_MORE_FRAGMENTS)) != 0;
		h->no_ports = (frag & IP_OFFSET_MASK) != 0;
		key->saddr[10] = key->saddr[11] = 0xff;
		key->daddr[10] = key->daddr[11] = 0xff;
		__builtin_memcpy(key->saddr + 12, ip4 + 12, 4);
		__builtin_memcpy(key->daddr + 12, ip4 + 16, 4);
		return PARSED;
	}
	if (type == MFSD_NET16(ETH_P_IPV6)) {
		if (load(skb, h->ip, ip6, sizeof(ip6)) || ip6[0] >> 4 != 6)
			return CUT_SHORT;
		/* saddr and daddr are neighbours in the packet and in the key */
		if (load(skb, h->ip + 8, key->saddr, sizeof(key->saddr) + sizeof(key->daddr)))
			return CUT_SHORT;
		h->version = 6;
		h->proto = ip6[6];
		h->l4 = h->ip + 40;
		h->l4_len = (__u32)ip6[4] << 8 | ip6[5];
		return parse_extensions(skb, h);
	}
	return CUT_SHORT;
}

/* TCP without data that moves the connection on: a pure ACK (window updates, probes and keepalives are such), or, if
 * `syn` is set, a SYN. Measured by the IP length, as Ethernet may pad. */
static __always_inline int is_tcp_control(struct __sk_buff *skb, const struct headers *h, int syn)
{
	__u8 b[2] __attribute__((aligned(2))); /* data offset, flags */

	if (h->fragment || load(skb, h->l4 + 12, b, sizeof(b)))
		return 0;
	if (b[1] & (TCP_FIN | TCP_RST))
		return 0;
	if (b[1] & TCP_SYN)
		return syn;
	return (b[1] & ~(TCP_PSH | TCP_ECE | TCP_CWR)) == TCP_ACK && (__u32)(b[0] >> 4) * 4 == h->l4_len;
}

/* Is this packet of a hinted connection to go to the control band? */
static __always_inline int is_control(struct __sk_buff *skb, const struct headers *h, const struct mfsd_dev *dev)
{
	if (h->proto == IPPROTO_TCP)
		return skb->len <= MAX_CONTROL_LEN && is_tcp_control(skb, h, 1);
	return !h->fragment && skb->len <= dev->tiny_len; /* a fragment that overtakes the others helps nobody */
}

/* Writes `dscp` if the packet has another one. 1 if it was written. */
static __always_inline int mark(struct __sk_buff *skb, const struct headers *h, __u8 dscp)
{
	__u16 old, new;

	/* version, header length / traffic class: the first 16 bits hold the field in both families */
	if (load(skb, h->ip, &old, sizeof(old)))
		return 0;
	if (h->version == 4) {
		new = (old & MFSD_NET16(0xff00 | ECN_MASK)) | MFSD_NET16((__u16)dscp << 2);
		if (new == old)
			return 0;
		/* The header still sums to the same, so a CHECKSUM_COMPLETE of the skb stays right without help. */
		if (bpf_l3_csum_replace(skb, h->ip + 10, old, new, sizeof(new)))
			return 0;
		return !bpf_skb_store_bytes(skb, h->ip, &new, sizeof(new), 0);
	}
	new = (old & MFSD_NET16(0xf00f | ECN_MASK << 4)) | MFSD_NET16((__u16)dscp << 6);
	if (new == old)
		return 0;
	/* No checksum in an IPv6 header, hence one of the whole skb changes. */
	return !bpf_skb_store_bytes(skb, h->ip, &new, sizeof(new), BPF_F_RECOMPUTE_CSUM);
}

/* May we write skb->priority? A major of somebody else's is a decision of somebody else's. */
static __always_inline int may_write(struct __sk_buff *skb, const struct mfsd_dev *dev)
{
	__u32 major = skb->priority & CLASSID_MAJOR;

	return !major || major == dev->major || dev->flags & MFSD_DEV_OVERWRITE_FOREIGN;
}

/* Sends the packet to a lane of a band, and counts it there. `b` is below n_bands and MFSD_MAX_BANDS. */
static __always_inline void send_to(struct __sk_buff *skb, struct mfsd_band_map *map, __u32 b, __u32 lane, __u64 bytes)
{
	struct mfsd_counter *sum = MFSD_LOOKUP(mfsd_bands, &b);

	if (map->classid) {
		if (lane)
			lane = map->lanes ? lane % map->lanes : 0;
		skb->priority = map->classid + lane;
	}
	if (sum) {
		sum->packets += 1;
		sum->bytes += bytes;
	}
}

/* IP without a slot, counted by the caller. Its pure ACKs may have the control band where the operator wants that. */
static __always_inline void unhinted(struct __sk_buff *skb, struct mfsd_host *host, struct mfsd_dev *dev,
				     const struct headers *h)
{
	__u32 b;

	if (h->no_ports) {
		count(MFSD_STAT_FRAGMENT);
		return;
	}
	if (!(dev->flags & MFSD_DEV_CONTROL_UNHINTED) || !(host->flags & MFSD_HOST_ENFORCE))
		return;
	b = dev->control_band;
	if (b >= MFSD_MAX_BANDS || b >= dev->n_bands || h->proto != IPPROTO_TCP || skb->len > MAX_CONTROL_LEN)
		return;
	if (!may_write(skb, dev) || !is_tcp_control(skb, h, 0))
		return;
	send_to(skb, &dev->bands[b], b, 0, wire_bytes(skb));
	count(MFSD_STAT_CONTROL);
}

MFSD_PROGRAM
int mfsd_classify(struct __sk_buff *skb)
{
	struct mfsd_tuple key __attribute__((aligned(8))) = {};
	struct headers h = {};
	struct mfsd_band_map *map;
	struct mfsd_host *host;
	struct mfsd_slot *slot;
	struct mfsd_dev *dev;
	__u32 zero = 0, hit = MFSD_STAT_COOKIE, stat, b, control, lane;
	__u32 *index = 0;
	__u64 now, cookie, bytes;
	int parsed = 0, marks;

	host = MFSD_LOOKUP(mfsd_host, &zero);
	dev = MFSD_LOOKUP(mfsd_dev, &zero);
	if (!host || !dev)
		return MFSD_NEXT; /* can't be: arrays of one */

	/* Our clock lags by a tick or two, so a fresh heartbeat may be ahead of it. */
	now = coarse_now();
	stat = MFSD_STAT_STALE;
	if (host->abi_version != MFSD_ABI_VERSION ||
	    (now > host->heartbeat_ns && now - host->heartbeat_ns > host->timeout_ns))
		goto out;

	cookie = bpf_get_socket_cookie(skb); /* 0 without a socket */
	if (cookie)
		index = MFSD_LOOKUP(mfsd_cookies, &cookie);
	/* The only place that reads headers, so that there is one copy of the parser for the verifier to go through. */
	marks = dev->flags & MFSD_DEV_MARK_DSCP;
	if (!index || marks || skb->len <= MAX_CONTROL_LEN || skb->len <= dev->tiny_len)
		parsed = parse(skb, &h, &key) == PARSED;

	if (!index) {
		stat = MFSD_STAT_NOT_IP;
		if (!parsed)
			goto out;
		if (!h.no_ports && (h.proto == IPPROTO_TCP || h.proto == IPPROTO_UDP)) {
			if (load(skb, h.l4, &key.sport, sizeof(key.sport) + sizeof(key.dport)))
				goto out;
			key.proto = h.proto;
			index = MFSD_LOOKUP(mfsd_tuples, &key);
		}
		stat = MFSD_STAT_MISS;
		if (!index) {
			unhinted(skb, host, dev, &h);
			goto out;
		}
		hit = MFSD_STAT_TUPLE;
	}

	slot = MFSD_LOOKUP(mfsd_slots, index);
	stat = MFSD_STAT_EXPIRED;
	if (!slot || now > slot->expires_ns)
		goto out;

	/* Atomic: UDP sockets send from several CPUs at once, and so does a tuple that names a forwarded connection. */
	bytes = wire_bytes(skb);
	__sync_fetch_and_add(&slot->bytes, bytes);
	__sync_fetch_and_add(&slot->segments, skb->gso_segs ? skb->gso_segs : 1);
	__sync_fetch_and_add(&slot->packets, 1);
	slot->last_ns = now;

	b = slot->band;
	stat = MFSD_STAT_OBSERVED;
	if (!(host->flags & MFSD_HOST_ENFORCE) || b >= MFSD_MAX_BANDS || b >= dev->n_bands) /* KEEP is one of these */
		goto out;
	stat = MFSD_STAT_FOREIGN;
	if (!may_write(skb, dev))
		goto out;

	stat = hit;
	lane = slot->lane;
	control = dev->control_band;
	if (parsed && control < MFSD_MAX_BANDS && control < dev->n_bands && is_control(skb, &h, dev)) {
		b = control;
		lane = 0;
		__sync_fetch_and_add(&slot->control, 1);
		count(MFSD_STAT_CONTROL);
	}
	map = &dev->bands[b & (MFSD_MAX_BANDS - 1)]; /* the mask changes nothing; older verifiers want to see it */
	send_to(skb, map, b, lane, bytes);
	if (marks && parsed && map->dscp != MFSD_DSCP_KEEP && mark(skb, &h, map->dscp & 0x3f))
		count(MFSD_STAT_MARKED);
out:
	count(stat);
	return MFSD_NEXT;
}

MFSD_LICENSE("GPL");
