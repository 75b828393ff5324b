/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * yield_socket.h - what a connection is to yield.bpf.c, by the daemon's tables, and how it becomes that: deferred, urgent,
 * or given back to the algorithm that it ran before.
 */
#ifndef MFSD_YIELD_SOCKET_H
#define MFSD_YIELD_SOCKET_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "compat.h"
#include "kernel.h"
#include "mfsd.h"
#include "yield.h"

#define AF_INET		2
#define SOL_TCP		6
#define TCP_CONGESTION	13
#define LEFT		8    /* packets whose wait is remembered */
#define NAME_LEN	16   /* TCP_CA_NAME_MAX */
#define NON_RESTRICTED	1    /* TCP_CONG_NON_RESTRICTED */
#define PACING_NONE	0    /* enum sk_pacing */
#define PACING_NEEDED	1
#define PACING_FQ	2
#define INFINITE	0x7fffffff /* TCP_INFINITE_SSTHRESH */
#define INITIAL_WINDOW	10
#define UNHINTED_MS	5000 /* without a slot for so long, a connection goes back to what it ran before ... */
#define URGENT_MS	1000 /* ... and so it does when it has not been deferred for so long, if we hear when it is again */
#define SELDOM_SHIFT	10   /* of us: a millisecond */
#define RATE_SHIFT	10   /* of bytes/s, so that products of two fit */
#define CUBIC_WORDS	8 /* of icsk_ca_priv are cubic's; the rest is ours */

/* The classifier's; the loader puts them in place. */
MFSD_MMAP_ARRAY(mfsd_host, struct mfsd_host, 1);
MFSD_MMAP_ARRAY(mfsd_slots, struct mfsd_slot, MFSD_DEFAULT_SLOTS);
MFSD_HASH(mfsd_cookies, __u64, __u32, MFSD_DEFAULT_SLOTS);

/* Our own. */
MFSD_MMAP_ARRAY(mfsd_yield, struct mfsd_yield, 1);
MFSD_MAP(mfsd_paths, BPF_MAP_TYPE_LRU_HASH, struct mfsd_path_key, struct mfsd_path, MFSD_PATHS, 0);
MFSD_HASH(mfsd_far, __u8[16], struct mfsd_far, MFSD_FARS);
MFSD_MMAP_ARRAY(mfsd_adopted, struct mfsd_adopted, 1);

enum standing {
	SETTLED, /* not ours to touch, or not any more */
	OURS,	 /* put under our algorithm by us */
	FOREIGN, /* has chosen its algorithm itself */
};

/* What a socket was before we came, and how long its last packets have waited in this host's bands. */
struct before {
	char name[NAME_LEN];
	__u32 standing;
	__u32 last; /* of the packets */
	__u64 left[LEFT]; /* when TCP sent it (us, upper half), and how long until it left (us) */
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct before);
} mfsd_before SEC(".maps");

/* The loader puts another name in place of this one, here and below, where it is taken. */
const volatile char mfsd_name[NAME_LEN] __attribute__((aligned(8))) = "mfsd_yield";

extern void cubictcp_init(struct sock *sk) __ksym;
extern __u32 cubictcp_recalc_ssthresh(struct sock *sk) __ksym;
extern void cubictcp_cong_avoid(struct sock *sk, __u32 ack, __u32 acked) __ksym;
extern void cubictcp_state(struct sock *sk, __u8 state) __ksym;
extern void cubictcp_acked(struct sock *sk, const struct ack_sample *sample) __ksym;
extern __u32 tcp_reno_undo_cwnd(struct sock *sk) __ksym;

/* Our part of icsk_ca_priv, behind cubic's. */
struct mine {
	__u32 hinted_ms; /* never 0 */
	__u32 urgent_ms; /* since when it is not deferred, if it is not */
	struct mfsd_peer_clock clock; /* as mfsd_path's, of a peer that has another one for every connection */
	__u32 epoch; /* of the path, in which we were counted last */
	__u32 ahead_us; /* time stamp that packets got before it was due; 0: none */
	__u8 class;
	__u8 band;
	__u8 paced; /* by us */
	__u8 clocks; /* enum clocks */
	__u8 cubic; /* is what it ran before */
	__u8 chosen; /* by itself: nobody would put it under our algorithm once more */
	__u16 looked; /* when it was looked at last, by seldom() */
};

#define TCP(sk) ((struct tcp_sock *)(sk))
#define MINE(tp) ((struct mine *)&(tp)->inet_conn.icsk_ca_priv[CUBIC_WORDS])

static __always_inline struct mfsd_yield *config(void)
{
	__u32 zero = 0;

	return MFSD_LOOKUP(mfsd_yield, &zero);
}

/* The daemon is alive, and steers. */
static __always_inline int governed(__u64 now_ns, int *dead)
{
	struct mfsd_host *host;
	__u32 zero = 0;

	*dead = 1;
	host = MFSD_LOOKUP(mfsd_host, &zero);
	if (!host || host->abi_version != MFSD_ABI_VERSION)
		return 0;
	if (now_ns > host->heartbeat_ns && now_ns - host->heartbeat_ns > host->timeout_ns)
		return 0;
	*dead = 0;
	return host->flags & MFSD_HOST_ENFORCE;
}

/* Band of a connection; MFSD_BAND_KEEP if it has none. */
static __always_inline __u8 band_of(__u64 cookie, __u64 now_ns)
{
	struct mfsd_slot *slot;
	__u32 *row;

	row = MFSD_LOOKUP(mfsd_cookies, &cookie);
	slot = row ? MFSD_LOOKUP(mfsd_slots, row) : 0;
	return slot && now_ns <= slot->expires_ns && slot->band < MFSD_MAX_BANDS ? slot->band : MFSD_BAND_KEEP;
}

static __always_inline __u8 class_of(const struct mfsd_yield *y, __u8 band)
{
	return band < MFSD_MAX_BANDS ? y->class_of[band & (MFSD_MAX_BANDS - 1)] : MFSD_YIELD_NOT;
}

static __always_inline __u32 most_of(const struct mfsd_yield *y, const struct mfsd_path *p, __u8 class)
{
	__u32 target = p->far_target_us ? p->far_target_us : y->target_us;

	return class == MFSD_YIELD_SECOND ? target / 2 : target;
}

/* Bytes/s of the slower one of our link and, where it is known, the peer's. */
static __always_inline __u64 link_of(const struct mfsd_yield *y, const struct mfsd_path *p)
{
	return p->far_rate && p->far_rate < y->rate ? p->far_rate : y->rate;
}

/* Bytes/s that a connection may always send: a share of our link, hence as much of a slower one. */
static __always_inline __u64 floor_of(const struct mfsd_yield *y, const struct mfsd_path *p, __u8 band)
{
	__u64 floor = y->floor[band & (MFSD_MAX_BANDS - 1)];

	return floor * (link_of(y, p) >> RATE_SHIFT) / ((y->rate >> RATE_SHIFT) + !(y->rate >> RATE_SHIFT));
}

static __always_inline void key_of(struct tcp_sock *tp, struct mfsd_path_key *key)
{
	struct sock_common *sk = &tp->inet_conn.icsk_inet.sk.__sk_common;
	__u32 *peer = (__u32 *)key->peer;

	if (sk->skc_family == AF_INET) {
		peer[2] = MFSD_NET32(0xffff);
		peer[3] = sk->skc_daddr;
	} else {
		peer[0] = sk->skc_v6_daddr.in6_u.u6_addr32[0];
		peer[1] = sk->skc_v6_daddr.in6_u.u6_addr32[1];
		peer[2] = sk->skc_v6_daddr.in6_u.u6_addr32[2];
		peer[3] = sk->skc_v6_daddr.in6_u.u6_addr32[3];
	}
	key->netns = sk->skc_net.net->net_cookie;
	key->band = MINE(tp)->band;
}

static __always_inline void look_far(struct mfsd_path *p, const struct mfsd_path_key *key)
{
	struct mfsd_far *far = MFSD_LOOKUP(mfsd_far, key->peer);

	p->far_rate = far ? far->rate : 0;
	p->far_target_us = far ? far->target_us : 0;
}

static __always_inline struct mfsd_path *path_of(struct tcp_sock *tp)
{
	struct mfsd_path_key key = {};
	struct mfsd_path *p, fresh = {};

	key_of(tp, &key);
	p = MFSD_LOOKUP(mfsd_paths, &key);
	if (p)
		return p;
	look_far(&fresh, &key);
	fresh.paired_at = tp->tcp_mstamp - LONE_US;
	fresh.slice_at = fresh.base_since = fresh.epoch_at = tp->tcp_mstamp;
	fresh.empty_at = tp->tcp_mstamp > PROBE_US ? tp->tcp_mstamp - PROBE_US + PROBE_US / 5 : 0;
	fresh.base_us = tp->rtt_min.s[0].v; /* NEVER before the first; a way that is full would not show it now */
	fresh.base_next_us = fresh.least_us = NEVER;
	fresh.share = FIRST_SHARE;
	fresh.part = UNIT;
	fresh.epoch = 1;
	bpf_map_update_elem(&mfsd_paths, &key, &fresh, BPF_NOEXIST);
	return MFSD_LOOKUP(mfsd_paths, &key);
}

/* --- what a socket is ------------------------------------------------------------------------------------------ */

static __always_inline void pace(struct tcp_sock *tp, __u64 rate)
{
	struct sock *sk = (struct sock *)tp;
	struct mine *m = MINE(tp);

	if (sk->sk_pacing_status == PACING_FQ) {
		sk->sk_pacing_rate = rate ? rate : ~0UL;
	} else if (sk->sk_pacing_status == PACING_NEEDED && !m->paced) {
		if (rate && rate < sk->sk_pacing_rate) /* the application has it paced */
			sk->sk_pacing_rate = rate;
	} else if (rate) {
		sk->sk_pacing_rate = rate;
		sk->sk_pacing_status = PACING_NEEDED;
		m->paced = 1;
	} else if (m->paced) {
		/* What is sent in the rest of a gap is stamped with its end all the same: its round trip looks short. */
		if (tp->tcp_wstamp_ns > tp->tcp_mstamp * 1000)
			m->ahead_us = tp->tcp_wstamp_ns / 1000;
		sk->sk_pacing_status = PACING_NONE;
		m->paced = 0;
	}
}

/*
 * From deferred to urgent: what the way holds, with the queue that we have kept. What is under way may be stuck in the band
 * that it leaves, and nothing but what is sent behind it shows that it has been freed there (engine/rescue.py).
 */
static __always_inline void hurry(struct tcp_sock *tp, const struct mfsd_yield *y)
{
	struct mfsd_path *p = path_of(tp);
	__u64 window = INITIAL_WINDOW;

	pace(tp, 0);
	if (p && p->base_us != NEVER && tp->mss_cache)
		window = link_of(y, p) *
			 (p->base_us + late_of(p, tp->tcp_mstamp) + 2 * (__u64)most_of(y, p, MFSD_YIELD_FIRST)) / 1000000 /
			 tp->mss_cache;
	tp->snd_cwnd = tp->packets_out + (window < INITIAL_WINDOW ? INITIAL_WINDOW : window);
	tp->snd_ssthresh = INFINITE;
}

static __always_inline int is_cubic(const char *name)
{
	return name[0] == 'c' && name[1] == 'u' && name[2] == 'b' && name[3] == 'i' && name[4] == 'c' && !name[5];
}

/* Gives the socket to the algorithm that it ran before; icsk_ca_priv is not ours any more. 0 if that was possible. */
static __always_inline long give_back(struct tcp_sock *tp)
{
	char name[NAME_LEN] = "cubic", last[NAME_LEN] = "reno";
	struct before *before;

	pace(tp, 0);
	before = bpf_sk_storage_get(&mfsd_before, tp, 0, 0);
	if (before) {
		if (before->name[0]) /* else it has chosen us itself */
			__builtin_memcpy(name, before->name, sizeof(name));
		before->standing = SETTLED;
	}
	if (!bpf_setsockopt(tp, SOL_TCP, TCP_CONGESTION, name, sizeof(name)))
		return 0;
	return bpf_setsockopt(tp, SOL_TCP, TCP_CONGESTION, last, sizeof(last));
}

/* From one deferred band to another: the way is the same. */
static __always_inline void move(struct tcp_sock *tp, __u8 band)
{
	struct mfsd_path *from = path_of(tp), *to;

	MINE(tp)->band = band;
	to = path_of(tp);
	if (!from || !to || to->base_us != NEVER)
		return;
	to->base_us = from->base_us;
	to->base_next_us = from->base_next_us;
	to->base_since = from->base_since;
	to->empty_at = from->empty_at;
	to->clock = from->clock;
}

static __always_inline __u32 ms_of(const struct tcp_sock *tp)
{
	return (__u32)(tp->tcp_mstamp / 1000) | 1;
}

/* Changes about once in a millisecond; wraps after a minute. */
static __always_inline __u16 seldom(const struct tcp_sock *tp)
{
	return tp->tcp_mstamp >> SELDOM_SHIFT;
}

/* Looks what the socket is now, and makes it that. 0 when it is not ours any more, or not yet. */
static __always_inline int settle(struct tcp_sock *tp, const struct mfsd_yield *y)
{
	__u64 now_ns = tp->tcp_mstamp * 1000;
	__u8 band = MFSD_BAND_KEEP, class;
	struct mine *m = MINE(tp);
	__u32 now = ms_of(tp);
	int dead;

	if (!m->hinted_ms)
		return 0; /* has chosen us before it was connected, and this is the acknowledgement of its SYN: before mfsd_init */
	if (governed(now_ns, &dead))
		band = band_of(tp->inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter, now_ns);
	class = class_of(y, band);
	if (band != MFSD_BAND_KEEP)
		m->hinted_ms = now;
	if (class != MFSD_YIELD_NOT || m->class != MFSD_YIELD_NOT)
		m->urgent_ms = now;
	if (m->class != MFSD_YIELD_NOT && class != MFSD_YIELD_NOT && band != m->band)
		move(tp, band);
	if (m->class != MFSD_YIELD_NOT && class == MFSD_YIELD_NOT)
		hurry(tp, y);
	if (class == MFSD_YIELD_NOT &&
	    (dead || !m->cubic || now - m->hinted_ms > UNHINTED_MS || (!m->chosen && now - m->urgent_ms > URGENT_MS)) &&
	    !give_back(tp))
		return 0;
	if (m->class != MFSD_YIELD_NOT && class == MFSD_YIELD_NOT)
		cubictcp_init((struct sock *)tp);
	m->class = class;
	m->band = band;
	m->looked = seldom(tp);
	return 1;
}

#endif /* MFSD_YIELD_SOCKET_H */
