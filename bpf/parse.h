/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * parse.h - finds the headers of a packet, and where its findings are noted. Part of classifier.bpf.c, its only user.
 *
 * The daemon has CAP_BPF and CAP_NET_ADMIN, but not CAP_PERFMON. For such a process the verifier guards a program
 * against speculation: it refuses some pointer arithmetic (Spectre v1, see read_linear()), adds barriers after writes
 * to the stack (Spectre v4, see struct scratch), and also goes down the branches that can't be taken. What looks
 * roundabout below is due to one of these.
 */
#ifndef MFSD_PARSE_H
#define MFSD_PARSE_H

#include "compat.h"
#include "mfsd.h"

#define IP4_LEN		   20 /* without options */
#define IP6_LEN		   40
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

/* Extension headers that the walk steps over, at most. Hop-by-hop + destination + fragment + destination is the
 * longest sensible stack (RFC 8200, 4.1) that we know how to step over. */
#define MAX_EXTENSIONS 4
/* No pure ACK or SYN is longer, except with absurd extension headers: Ethernet, two tags, IPv6, 64 bytes of
 * extensions, TCP with all options. Longer packets are taken for data unread. */
#define MAX_CONTROL_LEN (14 + 8 + 40 + 64 + 60)

struct headers {
	__u32 ip;	/* offset of the IP header */
	__u32 l4;	/* offset of the transport header */
	__u32 l4_len;	/* its length with the payload, as the IP header says (0 for jumbograms) */
	__u8 version;	/* 4 or 6 */
	__u8 proto;	/* IPPROTO_* of the transport header */
	__u8 fragment;	/* any fragment */
	__u8 no_ports;	/* a later fragment */
};

/*
 * Notes on the packet at hand, one element per CPU; private to the program. A stack would do, if it weren't that
 * without CAP_PERFMON an lfence follows every first write to a stack slot and every later one of a pointer, 5 ns each.
 * So the path of a cookie hit writes nothing to the stack: its few pointers stay in the four registers that survive
 * calls. Besides, the verifier tracks what is on the stack, but not what is here, so behind all paths through the
 * parser it meets the same state and goes on from there once.
 *
 * Nobody else on this CPU gets in between: egress runs with softirqs off, and no helper called here sends a packet.
 */
struct scratch {
	__u64 jiffies;		/* of the last reading of the clock; never 0, as jiffies start 5 minutes below 2^32 */
	__u64 now;		/* that reading: CLOCK_MONOTONIC, ns */
	__u64 cookie;
	__u64 position;		/* of the stream, before this packet: what the peer has acknowledged, */
	__u32 una;		/* the sequence number of that (of a UDP socket its port), */
	__u32 flight;		/* and what is under way */
	__u32 own;		/* the packet has a TCP socket, which told these */
	__u8 raw[24];		/* what was read last */
	struct mfsd_tuple key;	/* its pad is never written */
	struct headers h;
	__u32 stat;		/* enum mfsd_stat */
	__u32 matched;		/* MFSD_STAT_COOKIE or MFSD_STAT_TUPLE */
	__u32 row;		/* of the slot table */
	__u32 band;
	__u16 lane;
	__u8 hit;		/* by cookie */
	__u8 parsed;		/* h holds what it says */
	__u8 enforce;
};

/* Address of a note, to be given to a helper. The compiler would keep an address that it needs again on the stack. */
#define NOTE(s, note)                                                                                                  \
	({                                                                                                             \
		void *__note = (s);                                                                                    \
		MFSD_ADD(__note, __builtin_offsetof(struct scratch, note));                                            \
		__note;                                                                                                \
	})

/*
 * Reads what lies in the linear part at a constant offset. 1 if it was there. `size` is a constant, 2 or a multiple of
 * 4. Words are read where they lie; CPUs on which that is slow make the verifier refuse it, and nobody builds such
 * servers.
 *
 * The offset has to end up as an immediate: to a packet pointer, a program without CAP_PERFMON may add nothing else
 * (retrieve_ptr_limit() in kernel/bpf/verifier.c knows no limit for these). Left to itself, the compiler takes a
 * register of which it knows that it holds the same number.
 */
static __always_inline int read_linear(struct __sk_buff *skb, const __u32 offset, void *to, const __u32 size)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	MFSD_ADD(data, offset);
	if (data + size > end)
		return 0;
	if (size == 2)
		*(__u16 *)to = *(__u16 *)data;
	else /* by words; a loop would do, but BCC's compiler doesn't unroll it */
		__builtin_memcpy(__builtin_assume_aligned(to, 4), __builtin_assume_aligned(data, 4), size);
	return 1;
}

/* bpf_skb_load_bytes() with a shortcut for the offset where it nearly always is, a constant. */
static __always_inline int load(struct __sk_buff *skb, __u32 offset, const __u32 usual, void *to, const __u32 size)
{
	if (offset == usual && read_linear(skb, usual, to, size))
		return 0;
	return bpf_skb_load_bytes(skb, offset, to, size);
}

/* The same for what is `skip` bytes into the transport header; usual are IPv4 and IPv6 without options. */
static __always_inline int load_l4(struct __sk_buff *skb, const struct headers *h, const __u32 skip, void *to,
				   const __u32 size)
{
	if (h->l4 == ETH_HLEN + IP4_LEN && read_linear(skb, ETH_HLEN + IP4_LEN + skip, to, size))
		return 0;
	if (h->l4 == ETH_HLEN + IP6_LEN && read_linear(skb, ETH_HLEN + IP6_LEN + skip, to, size))
		return 0;
	return bpf_skb_load_bytes(skb, h->l4 + skip, to, size);
}

/* Steps over the extension headers between h->l4 and the transport header. They are rare, so reading them in place
 * would gain little. */
static __always_inline void parse_extensions(struct __sk_buff *skb, struct scratch *s)
{
	struct headers *h = &s->h;
	__u8 *ext = s->raw;
	__u32 size, i;
	__u16 frag;

#pragma unroll /* for the verifier, which speculates that a loop goes on, it has no end */
	for (i = 0; i < MAX_EXTENSIONS; i++) {
		if (h->proto != IPPROTO_HOPOPTS && h->proto != IPPROTO_DSTOPTS && h->proto != IPPROTO_FRAGMENT)
			break;
		if (bpf_skb_load_bytes(skb, h->l4, NOTE(s, raw), 8))
			return;
		size = 8;
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
			break; /* what follows is data */
	}
	s->parsed = 1;
}

/* Finds the headers; fills s->h and the addresses of s->key. Sets s->parsed unless the packet is cut short or no IP. */
static __always_inline void parse(struct __sk_buff *skb, struct scratch *s)
{
	struct mfsd_tuple *key = &s->key;
	struct headers *h = &s->h;
	__u16 *type = (__u16 *)s->raw;
	__u8 *ip = s->raw;
	__u32 ihl, i;
	__u16 frag;

	h->ip = ETH_HLEN;
	if (load(skb, ETH_HLEN - sizeof(*type), ETH_HLEN - sizeof(*type), NOTE(s, raw), sizeof(*type)))
		return;
#pragma unroll
	for (i = 0; i < 2; i++) {
		if (*type != MFSD_NET16(ETH_P_8021Q) && *type != MFSD_NET16(ETH_P_8021AD))
			break;
		if (bpf_skb_load_bytes(skb, h->ip + 2, NOTE(s, raw), sizeof(*type)))
			return;
		h->ip += 4;
	}
	MFSD_REREAD();

	h->fragment = 0;
	h->no_ports = 0;
	if (*type == MFSD_NET16(ETH_P_IP)) {
		if (load(skb, h->ip, ETH_HLEN, NOTE(s, raw), IP4_LEN))
			return;
		ihl = (ip[0] & 0xf) * 4;
		if (ip[0] >> 4 != 4 || ihl < IP4_LEN || h->ip + ihl > skb->len)
			return;
		h->version = 4;
		h->proto = ip[9];
		h->l4 = h->ip + ihl;
		h->l4_len = ((__u32)ip[2] << 8 | ip[3]) - ihl;
		frag = (__u16)ip[6] << 8 | ip[7];
		h->fragment = (frag & (IP_OFFSET_MASK | IP_MORE_FRAGMENTS)) != 0;
		h->no_ports = (frag & IP_OFFSET_MASK) != 0;
		__builtin_memset(key->saddr, 0, 10);
		__builtin_memset(key->daddr, 0, 10);
		key->saddr[10] = key->saddr[11] = 0xff;
		key->daddr[10] = key->daddr[11] = 0xff;
		__builtin_memcpy(key->saddr + 12, ip + 12, 4);
		__builtin_memcpy(key->daddr + 12, ip + 16, 4);
		s->parsed = 1;
	} else if (*type == MFSD_NET16(ETH_P_IPV6)) {
		if (load(skb, h->ip, ETH_HLEN, NOTE(s, raw), 8) || ip[0] >> 4 != 6)
			return;
		/* saddr and daddr are neighbours in the packet and in the key */
		if (load(skb, h->ip + 8, ETH_HLEN + 8, NOTE(s, key.saddr), sizeof(key->saddr) + sizeof(key->daddr)))
			return;
		h->version = 6;
		h->proto = ip[6];
		h->l4 = h->ip + IP6_LEN;
		h->l4_len = (__u32)ip[4] << 8 | ip[5];
		parse_extensions(skb, s);
	}
}

/* TCP without data that moves the connection on: a pure ACK (window updates, probes and keepalives are such), or, if
 * `syn` is set, a SYN. Measured by the IP length, as Ethernet may pad. */
static __always_inline int is_tcp_control(struct __sk_buff *skb, struct scratch *s, int syn)
{
	const struct headers *h = &s->h;
	__u8 *b = s->raw; /* data offset, flags */

	if (h->fragment || load_l4(skb, h, 12, NOTE(s, raw), 2))
		return 0;
	if (b[1] & (TCP_FIN | TCP_RST))
		return 0;
	if (b[1] & TCP_SYN)
		return syn;
	return (b[1] & ~(TCP_PSH | TCP_ECE | TCP_CWR)) == TCP_ACK && (__u32)(b[0] >> 4) * 4 == h->l4_len;
}

#endif /* MFSD_PARSE_H */
